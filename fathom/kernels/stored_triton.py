"""Stored rows and index keys in Triton, from values to planes and back. Reference 4, 5.2; torch's form is `stored`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import fp8_scale, from_e8m0, inverse_pow2, options, power_of_two, round_e4m3
from fathom.kernels.stored import BLOCK, Keys, Rows


def recent(window: Rows, slot: int, first: int, count: int) -> Any:
    """`store.recent`; NotImplemented for fronts that are no multiple of 64."""
    if (window.width - window.rope) % BLOCK:
        return NotImplemented
    out = torch.empty((count, window.width), dtype=torch.bfloat16, device=window.data.device)
    if count:
        _recent[(count,)](
            *planes_of(window), out, slot, first, window.width, power_of_two(window.width), window.rope, window.per,
            **options(out, 1),
        )  # fmt: skip
    return out


def planes_of(store: Rows | Keys) -> tuple[Tensor, Tensor, Tensor]:
    """Data as e4m3 (packed keys: as bytes), as BF16, and scales."""
    codes = store.data if isinstance(store, Keys) and store.packed else store.data.view(torch.float8_e4m3fn)
    return codes, store.data.view(torch.bfloat16), store.scales


@triton.jit
def bf16(x):
    """Rounded to BF16, as float32."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def turn_of(turn, B: tl.constexpr, C: tl.constexpr, ROPE: tl.constexpr, FROM):
    """cos and sin [1, B / 2] of columns FROM .. FROM + B of a row, of which the last ROPE of C are turned."""
    pair = tl.arange(0, B // 2) + FROM // 2 - (C - ROPE) // 2
    inside = (pair >= 0) & (pair < ROPE // 2)
    cos = tl.load(turn + 2 * pair, mask=inside, other=1.0)
    return cos[None, :], tl.load(turn + 2 * pair + 1, mask=inside, other=0.0)[None, :]


@triton.jit
def turned(x, cos, sin, R: tl.constexpr, B: tl.constexpr):
    """x [R, B] turned and rounded to BF16; back with -sin."""
    even, odd = tl.split(tl.reshape(x, (R, B // 2, 2)))
    return tl.reshape(tl.join(bf16(even * cos - odd * sin), bf16(even * sin + odd * cos)), (R, B))


@triton.jit
def normed(x, C: tl.constexpr, EPS):
    return x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / C + EPS))[:, None]


@triton.jit
def rounded(x, B: tl.constexpr, C: tl.constexpr, ROPE: tl.constexpr):
    """The values [B] of x [1, B] once it is stored as a row."""
    v = tl.reshape(x, (B // 64, 64))
    scale = fp8_scale(tl.max(tl.abs(v), 1))[:, None]
    front = tl.reshape(round_e4m3(v * inverse_pow2(scale)) * scale, (B,))
    return tl.where(tl.arange(0, B) < C - ROPE, front, tl.reshape(x, (B,))).to(tl.bfloat16)


@triton.jit
def store_row(x, codes, rope, scales, row, B: tl.constexpr, C: tl.constexpr, ROPE: tl.constexpr):
    """x [1, B] as a stored row."""
    FRONT: tl.constexpr = C - ROPE
    r = tl.arange(0, B)
    rb = tl.arange(0, B // 64)
    v = tl.reshape(x, (B // 64, 64))
    scale = fp8_scale(tl.max(tl.abs(v), 1))
    q = tl.reshape(round_e4m3(v * inverse_pow2(scale)[:, None]), (B,))
    tl.store(codes + row * (FRONT + 2 * ROPE) + r, q.to(tl.float8e4nv), mask=r < FRONT)
    PADDED: tl.constexpr = (FRONT + 511) // 512 * 8
    exponent = scale.to(tl.int32, bitcast=True) >> 23
    tl.store(scales + row * PADDED + rb, exponent.to(tl.uint8), mask=rb * 64 < FRONT)
    place = rope + row * (FRONT // 2 + ROPE) + FRONT // 2 + r - FRONT
    tl.store(place, tl.reshape(x, (B,)).to(tl.bfloat16), mask=(r >= FRONT) & (r < C))


@triton.jit
def fp4(x, R: tl.constexpr, D: tl.constexpr):
    """x [R, D] on the e2m1 grid: values over their scales [R, D / 32, 32], and the scales [R, D / 32]."""
    v = tl.reshape(x, (R, D // 32, 32))
    amax = tl.maximum(tl.max(tl.abs(v), 2), 7.052966104933725e-38)
    bits = tl.div_rn(amax, 6.0 + tl.zeros_like(amax)).to(tl.int32, bitcast=True)
    scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    y = v * inverse_pow2(scale)[:, :, None]
    step = tl.where(tl.abs(y) < 2.0, 0.5, tl.where(tl.abs(y) < 4.0, 1.0, 2.0))
    inverse = tl.where(tl.abs(y) < 2.0, 2.0, tl.where(tl.abs(y) < 4.0, 1.0, 0.5))
    return ((y * inverse + 12582912.0) - 12582912.0) * step, scale


@triton.jit
def store_key(x, codes, scales, row, D: tl.constexpr, PACKED: tl.constexpr):
    """x [1, D] as a stored index key."""
    y, scale = fp4(x, 1, D)
    if PACKED:
        size = tl.abs(y)
        code = tl.where(size < 2.0, size * 2.0, tl.where(size < 4.0, size + 2.0, size * 0.5 + 4.0)).to(tl.int32)
        code = code | tl.where(tl.reshape(x, (1, D // 32, 32)).to(tl.int32, bitcast=True) < 0, 8, 0)
        low, high = tl.split(tl.reshape(code, (D // 2, 2)))
        tl.store(codes + row * (D // 2) + tl.arange(0, D // 2), (low | (high << 4)).to(tl.uint8))
        exponent = tl.reshape(scale, (D // 32,)).to(tl.int32, bitcast=True) >> 23
        tl.store(scales + row * (D // 32) + tl.arange(0, D // 32), exponent.to(tl.uint8))
    else:
        v = tl.reshape(y * scale[:, :, None], (1, D))
        one = _key_scale(v)
        tl.store(
            codes + row * D + tl.arange(0, D)[None, :], round_e4m3(v * inverse_pow2(one)[:, None]).to(tl.float8e4nv)
        )
        tl.store(scales + row + tl.arange(0, 1), one)


@triton.jit
def _key_scale(v):
    """The one power of two under which a row of FP4 values fits into e4m3."""
    amax = tl.maximum(tl.max(tl.abs(v), 1), 7.888609052210118e-31)
    bits = tl.div_rn(amax, 448.0 + tl.zeros_like(amax)).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["SLOT", "FIRST"])
def _recent(
    codes, rope, scales, out, SLOT, FIRST, C: tl.constexpr, B: tl.constexpr, ROPE: tl.constexpr, RING: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    r = tl.arange(0, B)
    FRONT: tl.constexpr = C - ROPE
    PADDED: tl.constexpr = (FRONT + 511) // 512 * 8
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = SLOT * RING + (FIRST + i) % RING
    code = tl.load(codes + row * (FRONT + 2 * ROPE) + r, mask=r < FRONT, other=0.0).to(tl.float32)
    scale = from_e8m0(tl.load(scales + row * PADDED + r // 64, mask=r < FRONT, other=127))
    end = tl.load(rope + row * (FRONT // 2 + ROPE) + FRONT // 2 + r - FRONT, mask=(r >= FRONT) & (r < C), other=0.0)
    value = tl.where(r < FRONT, code * scale, end.to(tl.float32))
    tl.store(out + i * C + r, value.to(tl.bfloat16), mask=r < C)
