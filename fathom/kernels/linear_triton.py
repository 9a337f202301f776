"""y = x W^T on a GPU for stored FP8, BF16 and float32 weights. Reference 4; the references are in `linear`.

Two classes of results. In each a row has the same bits whatever other rows there are:
  few    up to FEW rows, a decode step: `linear_cuda`; where that lacks the form a program holds its whole tile of
         weights in registers, loaded before it waits for the kernel before it, and multiplies in float32 without tensor
         cores. Every product is exact; only the sum rounds.
  many   more rows, prefill: `product_triton`, on tensor cores.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels import linear as references
from fathom.kernels import linear_cuda
from fathom.kernels.common_triton import PLAIN, fetch, from_e8m0, options, power_of_two
from fathom.kernels.linear import Part
from fathom.kernels.norm import rms_norm
from fathom.kernels.product_triton import eights, sixteens, widened
from fathom.kernels.quant import fp8_sim
from fathom.kernels.quant_triton import form_of, halves, quantise

FEW = 64
"""Rows of the first class. A decode step stays below, a prefill call above: the caller pads."""
_FLOATS = (torch.bfloat16, torch.float32)
_SMALL = 1 << 23
"""Elements of a weight below which tiles are small, so that there are enough programs."""


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
    """`linear.linear` for the forms above; NotImplemented for others."""
    return _product(x, weight, scale, 1, dtype or x.dtype)


def grouped_linear(x: Tensor, groups: int, weight: Tensor, scale: Tensor | None = None) -> Any:
    """`linear.grouped_linear`, likewise."""
    return _product(x, weight, scale, groups, x.dtype)


def linears(x: Tensor, parts: Sequence[Part], norm: Tensor | None = None, eps: float = 0.0) -> Any:
    """`linear.linears`, likewise: in one launch for few rows; for many, x is rounded once for all parts."""
    if x.shape[0] <= FEW:
        return linear_cuda.linears(x, parts, norm, eps)
    if x.dtype not in _FLOATS or x.shape[1] % 128 or not all(isinstance(part.weight, Tensor) for part in parts):
        return NotImplemented
    x = x if norm is None else rms_norm(x, norm, eps)
    form = quantise(x) if any(part.quantised for part in parts) else None
    return [_part(x, form, part) for part in parts]


def _part(x: Tensor, form: tuple[Tensor, Tensor] | None, part: Part) -> Tensor:
    weight, scale = part.weight, part.scale
    if part.quantised and form and scale is not None and isinstance(weight, Tensor) and _stored(weight, scale):
        return eights(*form, weight, scale, part.dtype or x.dtype)
    return references.linear(fp8_sim(x, 128) if part.quantised else x, weight, scale, part.dtype)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, groups: int, dtype: torch.dtype) -> Any:
    stored = _stored(weight, scale)
    if x.dtype not in _FLOATS or not (stored or (scale is None and weight.dtype in _FLOATS)):
        return NotImplemented
    if weight.shape[1] % (128 if stored else 8) or weight.shape[0] // groups % (128 if groups > 1 else 1):
        return NotImplemented
    left, x = halves(x), x if x.dim() == 2 else x.flatten(1)
    if not x.shape[0]:
        return x.new_empty((0, weight.shape[0]), dtype=dtype)
    if x.shape[0] <= FEW:
        out = linear_cuda.linears(x, (Part(weight, scale, dtype=dtype),), groups=groups, halves=left)
        return few(x, weight, scale, groups, dtype) if out is NotImplemented else out[0]
    if weight.dtype == torch.float32 or weight.shape[1] % 64:
        return NotImplemented
    return many(x, weight, scale, groups, dtype)


def _stored(weight: Tensor, scale: Tensor | None) -> bool:
    return weight.dtype == torch.float8_e4m3fn and scale is not None and scale.dtype == torch.float8_e8m0fnu


def many(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, groups: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """As `few`, but no float32 weights; K a multiple of 64. In FP8 where x is known to be on its grid."""
    form = form_of(x) if scale is not None and groups == 1 else None
    if scale is None:
        return sixteens(x, weight, groups, dtype)
    return sixteens(x, widened(weight, scale), groups, dtype) if form is None else eights(*form, weight, scale, dtype)


def few(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, groups: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """x [T, groups * K] times weight [N, K] -> [T, N] in `dtype`; output rows g * N / groups.. read group g of x.

    x BF16 or float32; weight e4m3 with scale [N / 128, K / 128] E8M0, or BF16 / float32 without.
    """
    x, rows, (n, k) = x.contiguous(), x.shape[0], weight.shape
    out = torch.empty((rows, n), dtype=dtype, device=x.device)
    block, warps = few_tile(n, k, weight.element_size())
    together, share = rows_together(rows)
    _few[(triton.cdiv(n, block), triton.cdiv(rows, share))](
        x, weight, weight if scale is None else scale.view(torch.uint8), out, rows, n, x.shape[1], n // groups, k,
        power_of_two(k), block, together, share, scale is not None, n % block != 0, **options(x, warps),
    )  # fmt: skip
    return out


def few_tile(n: int, k: int, size: int) -> tuple[int, int]:
    """Weight rows and warps a program: 16 to 32 KiB of weights, 128 bytes a thread; found by measurement."""
    if PLAIN:
        return 64, 1
    columns = power_of_two(k) * size
    block = max(1, min(16, (32768 if columns > 2048 else 16384) // columns))
    if n * k < _SMALL and columns >= 4096:
        block = max(1, block // 2)
    return block, 8 if block * columns > 16384 or columns >= 4096 else 4


def rows_together(rows: int) -> tuple[int, int]:
    """How many rows are multiplied at once, and how many a program takes one after the other."""
    return (1, 1) if rows == 1 else (2, 16)


@triton.jit
def _few(
    x, w, ws, out, T, N, XROW, PER_GROUP, K: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    SHARE: tl.constexpr, SCALED: tl.constexpr, RAGGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = B != K
    first = tl.program_id(0) * BN
    rn = first + tl.arange(0, BN)
    rk = tl.arange(0, B)
    inside = (rk < K)[None, :] & (rn < N)[:, None]
    if PDL:
        gdc_launch_dependents()
    tile = fetch(w + rn.to(tl.int64)[:, None] * K + rk[None, :], inside, MASKED or RAGGED)
    if SCALED:
        scale = from_e8m0(fetch(ws + (first // 128) * (K // 128) + rk // 128, rk < K, MASKED))
    if PDL:
        gdc_wait()
    xg = x + (first // PER_GROUP) * K + rk
    t0 = tl.program_id(1) * SHARE
    end = tl.minimum(t0 + SHARE, T)
    while t0 < end:
        for i in tl.static_range(R):
            t = tl.minimum(t0 + i, T - 1).to(tl.int64)
            row = fetch(xg + t * XROW, rk < K, MASKED).to(tl.float32)
            if SCALED:
                row = row * scale
            y = tl.sum(tile.to(tl.float32) * row[None, :], 1)
            tl.store(out + t * N + rn, y.to(out.dtype.element_ty), mask=rn < N)
        t0 += R
