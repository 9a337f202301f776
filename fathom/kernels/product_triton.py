"""Products of many rows on tensor cores: the class of prefill. A row's bits depend on nothing but the row.

eights    e4m3 rows and weights with their scales: 128 columns at a time are summed by the FP8 tensor cores, and those
          sums, times the scales of their blocks, in float32 in the order of K. cuBLAS has this product on Hopper; the
          kernel here has the same bits and is about 1.4 times slower.
sixteens  BF16 weights: sums in float32 in the order of K. Rows in float32 are cut into three BF16 pieces, so that
          every product is exact.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, from_e8m0, operand, options
from fathom.kernels.quant import from_scale

_GROUP = 8
"""Tiles of rows that are multiplied by the same weights one after the other, while those are in the L2 cache."""
_floats: Any = WeakIdKeyDictionary()
"""Stored scales in float32, as cuBLAS reads them."""


def eights(x: Tensor, scales: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 x [T, K] with float32 scales [T, K / 128] times e4m3 weight [N, K] with E8M0 scale [N / 128, K / 128]."""
    by_column = scales.t().contiguous()
    if _has_blocks(x, weight) and dtype == torch.bfloat16:
        return torch._scaled_mm(x, weight.t(), by_column.t(), _floats_of(scale).t(), out_dtype=dtype)
    return eights_here(x, by_column, weight, scale, dtype)


def eights_here(x: Tensor, by_column: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same without cuBLAS; by_column: the scales of x as [K / 128, T]."""
    rows, (n, k) = x.shape[0], weight.shape
    out = torch.empty((rows, n), dtype=dtype, device=x.device)
    tall, wide, warps, stages = (16, 128, 1, 1) if PLAIN else (64, 128, 4, 4)
    _eights[(triton.cdiv(rows, tall) * triton.cdiv(n, wide),)](
        x, by_column, weight, scale.view(torch.uint8), out, rows, n, k, tall, wide, _GROUP, stages, PLAIN,
        **options(x, warps),
    )  # fmt: skip
    return out


def _has_blocks(x: Tensor, weight: Tensor) -> bool:
    """Whether cuBLAS multiplies e4m3 of these sizes with scales of 1 x 128 and 128 x 128 blocks there."""
    rows, (n, k) = x.shape[0], weight.shape
    return rows % 16 == 0 and n % 128 == 0 and k % 512 == 0 and _is_hopper(x.device)


@lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    """Hopper, with CUDA 12.9 or newer."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return device.type == "cuda" and version >= (12, 9) and torch.cuda.get_device_capability(device)[0] == 9


def _floats_of(scale: Tensor) -> Tensor:
    """A stored scale in float32. Kept with it."""
    if scale not in _floats:
        _floats[scale] = from_scale(scale)
    kept: Tensor = _floats[scale]
    return kept


def widened(weight: Tensor, scale: Tensor) -> Tensor:
    """e4m3 weight [N, K] times its E8M0 scale [N / 128, K / 128], exact in BF16."""
    (n, k), out = weight.shape, torch.empty_like(weight, dtype=torch.bfloat16)
    _widen[(k // 128, triton.cdiv(n, 64))](weight, scale.view(torch.uint8), out, n, k, 64, **options(weight, 4))
    return out


def sixteens(x: Tensor, weight: Tensor, groups: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [T, groups * K], BF16 or float32, times BF16 weight [N, K] -> [T, N] in `dtype`; K a multiple of 64.

    Output rows g * N / groups.. read group g of x.
    """
    x, rows, (n, k) = x.contiguous(), x.shape[0], weight.shape
    out = torch.empty((rows, n), dtype=dtype, device=x.device)
    tall, wide, warps, stages = _shape(rows, n, x.dtype)
    _sixteens[(triton.cdiv(rows, tall) * triton.cdiv(n, wide),)](
        x, weight, out, rows, n, x.shape[1], n // groups, k, tall, wide, 64, _GROUP, n % wide != 0, PLAIN,
        **options(x, warps, stages),
    )  # fmt: skip
    return out


def _shape(rows: int, n: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows of x and of the weight, warps, stages; found by measurement on one H200."""
    if PLAIN:
        return 16, 128, 1, 1
    if dtype == torch.float32:
        return 64, 64, 4, 2
    return (128, 128, 4, 3) if rows * n > 128 * 128 * 132 else (64, 128, 4, 4)


@triton.jit
def _tile(T, N, MT: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of rows and which of weights a program has: GROUP tiles of rows for one of weights, then the next."""
    pid = tl.program_id(0)
    per = GROUP * tl.cdiv(N, BN)
    first = pid // per * GROUP
    size = tl.minimum(tl.cdiv(T, MT) - first, GROUP)
    return first + pid % per % size, pid % per // size


@triton.jit
def _eights(
    x, xs, w, ws, out, T, N, K: tl.constexpr, MT: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m, n = _tile(T, N, MT, BN, GROUP)
    rm = m * MT + tl.arange(0, MT)
    rn = n * BN + tl.arange(0, BN)
    rk = tl.arange(0, 128)
    rx = tl.where(rm < T, rm, 0)
    G: tl.constexpr = K // 128
    xp = x + rx.to(tl.int64)[:, None] * K + rk[None, :]
    wp = w + tl.where(rn < N, rn, 0).to(tl.int64)[None, :] * K + rk[:, None]
    wsp = ws + (n * BN // 128) * G
    following = tl.load(wsp)
    acc = tl.zeros((MT, BN), tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # Stated stages: so the scales of x, which no product reads, are also loaded ahead.
    for k in tl.range(G, num_stages=STAGES):
        byte = following
        following = tl.load(wsp + tl.minimum(k + 1, G - 1))
        a = operand(tl.load(xp + k * 128), PLAIN)
        b = operand(tl.load(wp + k * 128), PLAIN)
        scale = tl.load(xs + k * T + rx) * from_e8m0(byte)
        acc += tl.dot(a, b, input_precision="ieee") * scale[:, None]
    place = out + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(rm < T)[:, None] & (rn < N)[None, :])


@triton.jit
def _widen(w, ws, out, N, K, BN: tl.constexpr, PDL: tl.constexpr):
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    place = rn.to(tl.int64)[:, None] * K + tl.program_id(0) * 128 + tl.arange(0, 128)[None, :]
    inside = (rn < N)[:, None]
    tile = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
    scale = from_e8m0(tl.load(ws + (tl.program_id(1) * BN // 128) * (K // 128) + tl.program_id(0)))
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(out + place, (tile * scale).to(tl.bfloat16), mask=inside)


@triton.jit
def _sixteens(
    x, w, out, T, N, XROW, PER_GROUP, K: tl.constexpr, MT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, RAGGED: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m, n = _tile(T, N, MT, BN, GROUP)
    rm = m * MT + tl.arange(0, MT)
    rn = n * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    rw = tl.where(rn < N, rn, 0) if RAGGED else rn
    xp = x + (n * BN // PER_GROUP) * K + tl.where(rm < T, rm, 0).to(tl.int64)[:, None] * XROW + rk[None, :]
    wp = w + rw.to(tl.int64)[None, :] * K + rk[:, None]
    acc = tl.zeros((MT, BN), tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for k in range(0, K, BK):
        acc = _multiplied(tl.load(xp + k), tl.load(wp + k), acc, PLAIN)
    place = out + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(rm < T)[:, None] & (rn < N)[None, :])


@triton.jit
def _multiplied(rows, tile, acc, PLAIN: tl.constexpr):
    if PLAIN:
        return tl.dot(rows.to(tl.float32), tile.to(tl.float32), acc, input_precision="ieee")
    elif rows.dtype == tl.float32:
        high = rows.to(tl.bfloat16)
        rest = rows - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, tile, tl.dot(middle, tile, tl.dot(low, tile, acc)))
    else:
        return tl.dot(rows, tile, acc)
