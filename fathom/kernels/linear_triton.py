"""y = x W^T on a GPU for stored FP8, BF16 and float32 weights. Reference 4; the references are in `linear`.

Two classes of results. In each a row has the same bits whatever other rows there are:
  few    up to FEW rows: `linear_cuda`; where that lacks the form a program holds its whole tile of weights in
         registers, loaded before it waits for the kernel before it, and multiplies in float32 without tensor cores.
         Every product is exact; only the sum rounds.
  tiles  more rows: tensor cores, BF16 operands (exact: FP8 times a power of two), sums in float32 in the order of K.
         Rows in float32 are cut into three BF16 pieces, whose products are exact too.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, fetch, from_e8m0, operand, options, power_of_two
from fathom.kernels.linear import Part
from fathom.kernels.linear_cuda import linears

FEW = 64
"""Rows of the first class. A decode step stays below, a prefill call above: the caller pads."""
_FLOATS = (torch.bfloat16, torch.float32)
_SMALL = 1 << 23
"""Elements of a weight below which tiles are small, so that there are enough programs."""


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Any:
    """`linear.linear` for the forms above; NotImplemented for others."""
    return _product(x, weight, scale, 1, dtype or x.dtype)


def grouped_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Any:
    """`linear.grouped_linear`, likewise."""
    return _product(x.flatten(1), weight, scale, x.shape[1], x.dtype)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, groups: int, dtype: torch.dtype) -> Any:
    stored = weight.dtype == torch.float8_e4m3fn and scale is not None and scale.dtype == torch.float8_e8m0fnu
    if x.dtype not in _FLOATS or not (stored or (scale is None and weight.dtype in _FLOATS)):
        return NotImplemented
    if weight.shape[1] % (128 if stored else 8) or weight.shape[0] // groups % (128 if groups > 1 else 1):
        return NotImplemented
    if not x.shape[0]:
        return x.new_empty((0, weight.shape[0]), dtype=dtype)
    if x.shape[0] <= FEW:
        out = linears(x, (Part(weight, scale, dtype=dtype),), groups=groups)
        return few(x, weight, scale, groups, dtype) if out is NotImplemented else out[0]
    if weight.dtype == torch.float32 or weight.shape[1] % 64:
        return NotImplemented
    return tiles(x, weight, scale, groups, dtype)


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


def tiles(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, groups: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """As `few`, but no float32 weights; K a multiple of 64."""
    x, rows, (n, k) = x.contiguous(), x.shape[0], weight.shape
    out = torch.empty((rows, n), dtype=dtype, device=x.device)
    tall, wide, deep, warps, stages = tile_shape(rows, n // groups, k, x.dtype)
    _tiles[(triton.cdiv(n, tall), triton.cdiv(rows, wide))](
        x, weight, weight if scale is None else scale.view(torch.uint8), out, rows, n, x.shape[1], n // groups, k, tall,
        wide, deep, scale is not None, n % tall != 0, PLAIN, **options(x, warps, stages),
    )  # fmt: skip
    return out


def tile_shape(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Weight rows, x rows and columns of a step, warps, stages."""
    tall = 128 if n % 128 == 0 and n * rows >= 128 * 128 * 64 else 64
    if dtype == torch.float32:
        return 64, 64, 64, 4, 2
    if rows <= 64:
        return 64, max(16, power_of_two(rows)), 128 if k % 128 == 0 else 64, 4, 4
    return tall, 128, 128 if k % 128 == 0 else 64, 8 if tall == 128 else 4, 3


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


@triton.jit
def _tiles(
    x, w, ws, out, T, N, XROW, PER_GROUP, K: tl.constexpr, BN: tl.constexpr, MT: tl.constexpr, BK: tl.constexpr,
    SCALED: tl.constexpr, RAGGED: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    rn = first + tl.arange(0, BN)
    rm = tl.program_id(1) * MT + tl.arange(0, MT)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rw = tl.where(rn < N, rn, 0) if RAGGED else rn
    rx = tl.where(rm < T, rm, 0).to(tl.int64)
    wp = w + rw.to(tl.int64)[:, None] * K
    xp = x + (first // PER_GROUP) * K + rx[None, :] * XROW
    acc = tl.zeros((BN, MT), tl.float32)
    for k0 in range(0, K, BK):
        rk = k0 + tl.arange(0, BK)
        tile = tl.load(wp + rk[None, :])
        rows = tl.load(xp + rk[:, None])
        if SCALED:
            byte = tl.load(ws + (first // 128) * (K // 128) + k0 // 128)
            tile = _scaled(tile, byte, PLAIN)
        acc = _multiplied(operand(tile, PLAIN), rows, acc, PLAIN)
    place = rx[None, :] * N + rn[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(rm < T)[None, :] & (rn < N)[:, None])


@triton.jit
def _scaled(tile, byte, PLAIN: tl.constexpr):
    if PLAIN:
        return tile.to(tl.float32) * from_e8m0(byte)
    else:
        return tile.to(tl.bfloat16) * (byte.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True)


@triton.jit
def _multiplied(tile, rows, acc, PLAIN: tl.constexpr):
    if PLAIN:
        return tl.dot(tile, rows.to(tl.float32), acc, input_precision="ieee")
    elif rows.dtype == tl.float32:
        high = rows.to(tl.bfloat16)
        rest = rows - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(tile, high, tl.dot(tile, middle, tl.dot(tile, low, acc)))
    else:
        return tl.dot(tile, rows, acc)
