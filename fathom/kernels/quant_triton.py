"""Activations for the FP8 and FP4 kernels: RMS norm if wanted, then e4m3 with a scale per 128. Reference 4.

The torch reference is `quant.fp8_sim(x, 128)` (after `norm.normalised` and a rounding to BF16).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import fp8_scale, inverse_pow2, options, power_of_two, round_e4m3, swiglu
from fathom.kernels.quant import WEIGHT_BLOCK

PLAIN_ORDER, PAIRS, GRID = 0, 1, 2
"""How `quantise` lays its values out."""
_DTYPES = {PLAIN_ORDER: torch.float8_e4m3fn, PAIRS: torch.float16}
_FLOATS = (torch.bfloat16, torch.float32)
_known: Any = WeakIdKeyDictionary()
_halves: Any = WeakIdKeyDictionary()


def note(x: Tensor, values: Tensor, scales: Tensor, exact: bool = False) -> None:
    """Whoever makes x may leave its form in PLAIN_ORDER for those who read it; x does not change afterwards.

    exact: x is no more than that form says.
    """
    _known[x] = values, scales, exact


def form_of(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The values and scales that x is exactly, where somebody knew."""
    values, scales, exact = _known.get(x, (None, None, False))
    return (values, scales) if exact else None


def known(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The form of x in PLAIN_ORDER, if its maker left it."""
    found = _known.get(x)
    return None if found is None else found[:2]


def note_halves(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """Likewise a row of x [T, ...] as FP16 values times a float32 power of two for 64 columns.

    Products of it have other bits than those of x in BF16: whoever reads x is to get this very tensor.
    """
    _halves[x] = values, scales


def halves(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """That form of x, if its maker left it."""
    found: tuple[Tensor, Tensor] | None = _halves.get(x)
    return found


def quantise(x: Tensor, form: int = PLAIN_ORDER, block: int = WEIGHT_BLOCK) -> tuple[Tensor, Tensor]:
    """x [T, K] BF16 or float32 (K a multiple of `block`) -> (values, scales [T, K / block] float32 powers of two).

    values  PLAIN_ORDER: e4m3 [T, K];
            PAIRS: the same as FP16 in four planes, int32 [T, 4, K / 8]: word i of plane p is the pair
            (8i + p, 8i + p + 4), so that neighbouring lanes of the FP4 kernels read neighbouring words;
            GRID: values times scales in the dtype of x [T, K], with their form noted
    """
    left = known(x) if form == PLAIN_ORDER and block == WEIGHT_BLOCK else None
    if left is not None:
        return left
    x, (rows, k) = x.contiguous(), x.shape
    values = torch.empty((rows, k), dtype=_DTYPES.get(form, x.dtype), device=x.device)
    eights = torch.empty((rows, k), dtype=torch.float8_e4m3fn, device=x.device) if form == GRID else values
    scales = torch.empty((rows, k // block), dtype=torch.float32, device=x.device)
    if rows:
        _quantise[(rows,)](x, values, eights, scales, k, power_of_two(k), block, form, **options(x, 4))
    if form == GRID and block == WEIGHT_BLOCK:
        note(values, eights, scales, exact=True)
    return values.view(torch.int32).unflatten(-1, (4, -1)) if form == PAIRS else values, scales


def fp8_sim(x: Tensor, block: int) -> Any:
    """`quant.fp8_sim` for whole blocks of 64 or 128; NotImplemented for others."""
    if x.dtype not in _FLOATS or block not in (64, 128) or x.shape[-1] % block:
        return NotImplemented
    if x.dim() == 2:
        return quantise(x, GRID, block)[0]
    return quantise(x.flatten(0, -2) if x.dim() > 1 else x[None], GRID, block)[0].view(x.shape)


def gated(gate_up: Tensor, limit: float, quantize: bool) -> Any:
    """`experts.gated` for a width of a multiple of 128; NotImplemented for others."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.dtype not in _FLOATS or width % WEIGHT_BLOCK:
        return NotImplemented
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    values = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=gate_up.device) if quantize else out
    scales = torch.empty((rows, width // WEIGHT_BLOCK), dtype=torch.float32, device=gate_up.device)
    if rows:
        _gated[(rows,)](
            gate_up.contiguous(), out, values, scales, width, power_of_two(width), limit, quantize, **options(out, 4)
        )
    if quantize:
        note(out, values, scales, exact=True)
    return out


@triton.jit
def on_grid(v, B: tl.constexpr, BLOCK: tl.constexpr):
    """float32 v [B] in blocks: the e4m3 values [B / BLOCK, BLOCK] and their scales [B / BLOCK], both float32."""
    blocks = tl.reshape(v, (B // BLOCK, BLOCK))
    scale = fp8_scale(tl.max(tl.abs(blocks), 1))
    return round_e4m3(blocks * inverse_pow2(scale)[:, None]), scale


@triton.jit
def _quantise(
    x, values, eights, scales, K, B: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, B)
    inside = r < K
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    q, scale = on_grid(tl.load(x + row * K + r, mask=inside, other=0.0).to(tl.float32), B, BLOCK)
    rb = tl.arange(0, B // BLOCK)
    tl.store(scales + row * (K // BLOCK) + rb, scale, mask=rb < K // BLOCK)
    if FORM == 0:
        tl.store(values + row * K + r, tl.reshape(q, (B,)).to(tl.float8e4nv), mask=inside)
    elif FORM == 1:
        place = (r % 4) * (K // 4) + (r // 8) * 2 + r % 8 // 4
        tl.store(values + row * K + place, tl.reshape(q, (B,)).to(tl.float16), mask=inside)
    else:
        full = tl.reshape(q * scale[:, None], (B,)).to(values.dtype.element_ty)
        tl.store(values + row * K + r, full, mask=inside)
        tl.store(eights + row * K + r, tl.reshape(q, (B,)).to(tl.float8e4nv), mask=inside)


@triton.jit
def _gated(
    gate_up, out, values, scales, I, B: tl.constexpr, LIMIT: tl.constexpr, QUANTIZE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, B)
    inside = r < I
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(gate_up + row * 2 * I + r, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(gate_up + row * 2 * I + I + r, mask=inside, other=0.0).to(tl.float32)
    u = swiglu(a, b, LIMIT).to(out.dtype.element_ty)
    if QUANTIZE:
        q, scale = on_grid(u.to(tl.float32), B, 128)
        rb = tl.arange(0, B // 128)
        tl.store(values + row * I + r, tl.reshape(q, (B,)).to(tl.float8e4nv), mask=inside)
        tl.store(scales + row * (I // 128) + rb, scale, mask=rb < I // 128)
        u = tl.reshape(q * scale[:, None], (B,)).to(out.dtype.element_ty)
    tl.store(out + row * I + r, u, mask=inside)
