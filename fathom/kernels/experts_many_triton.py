"""Routed FP4 experts on a GPU for many tokens: grouped products on tensor cores. Reference 2.10 and 4.

The torch reference is `experts.experts`; names as in `experts_triton`, whose repacked weights are read. Weights and
activations are exact in BF16 with their scales multiplied in, sums are float32. The pairs are sorted by expert on the
device and cut into tiles of TILE pairs; a pair's result does not depend on its place in a tile.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, e2m1, from_e8m0, operand, options
from fathom.kernels.experts_triton import Fp4Experts, combine
from fathom.kernels.quant_triton import HALVES, quantise

TILE = 64


@dataclass(frozen=True)
class Schedule:
    """Pairs in expert order, cut into tiles: order int32 [P]; per tile its expert (E: none), first and end in order."""

    order: Tensor
    expert: Tensor
    first: Tensor
    end: Tensor


def schedule(chosen: Tensor, experts: int) -> Schedule:
    """For chosen ids [T, k] of `experts` experts. The number of tiles is an upper bound, so the host need not ask."""
    ids, order = chosen.flatten().sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype))
    tiles = (bounds.diff() + TILE - 1) // TILE
    ends = tiles.cumsum(0)
    number = torch.arange(ids.numel() // TILE + min(experts, ids.numel()), device=ids.device)
    expert = torch.searchsorted(ends, number, right=True)
    owner = expert.clamp(max=experts - 1)
    first = bounds[owner] + (number - (ends - tiles)[owner]) * TILE
    return Schedule(order.int(), expert.int(), first.int(), bounds[owner + 1].int())


def many(
    x: Tensor, chosen: Tensor, shares: Tensor, weights: Fp4Experts, limit: float, shared: Tensor | None = None
) -> Tensor:
    """x [T, D] BF16, chosen [T, k], shares float32 [T, k] -> as `experts_triton.combine`. Any T."""
    plan = schedule(chosen, weights.w13.shape[0])
    hidden = grouped_gate_up(quantise(x, HALVES)[0], shares, weights, plan, limit)
    return combine(grouped_down(quantise(hidden, HALVES)[0], weights, plan), chosen.shape[1], shared)


def grouped_gate_up(x: Tensor, shares: Tensor, weights: Fp4Experts, plan: Schedule, limit: float) -> Tensor:
    """`experts_triton.gate_up` of x [T, 2, D / 2] from `quantise(..., HALVES)`: BF16 [P, I]."""
    width, words = weights.w13.shape[1] // 2, weights.w13.shape[2]
    out = torch.empty((shares.numel(), width), dtype=torch.bfloat16, device=x.device)
    rows = 64
    _grouped[(width // rows, plan.expert.numel())](
        x, weights.w13.view(torch.uint8), weights.s13, plan.order, plan.expert, plan.first, plan.end, shares, out,
        weights.w13.shape[0], width, words * 8, rows, TILE, 64, shares.shape[1], limit, True, PLAIN,
        **options(x, 4, 3),
    )  # fmt: skip
    return out


def grouped_down(x: Tensor, weights: Fp4Experts, plan: Schedule) -> Tensor:
    """`experts_triton.down` of x [P, 2, I / 2]: float32 [P, D]."""
    hidden, words = weights.w2.shape[1:]
    out = torch.empty((x.shape[0], hidden), dtype=torch.float32, device=x.device)
    rows = 128
    _grouped[(hidden // rows, plan.expert.numel())](
        x, weights.w2.view(torch.uint8), weights.s2, plan.order, plan.expert, plan.first, plan.end, x, out,
        weights.w2.shape[0], hidden, words * 8, rows, TILE, 64, 1, 0.0, False, PLAIN, **options(x, 4, 3),
    )  # fmt: skip
    return out


@triton.jit
def _unpack_asm(byte):
    """Four bytes of a repacked word -> its weights 0..3 and 4..7 in BF16: both bytes of a value come from tables."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 m,n,h,l,s;
        and.b32 m,$4,0x77777777; shr.u32 n,m,16;
        prmt.b32 h,0x3F3F3F00,0x40404040,m; prmt.b32 l,0xC0800000,0xC0804000,m;
        lop3.b32 h,$4,0x80808080,h,0xEA;
        prmt.b32 $0,l,h,0x5140; prmt.b32 $1,l,h,0x7362;
        prmt.b32 h,0x3F3F3F00,0x40404040,n; prmt.b32 l,0xC0800000,0xC0804000,n;
        shl.b32 s,$4,4; lop3.b32 h,s,0x80808080,h,0xEA;
        prmt.b32 $2,l,h,0x5140; prmt.b32 $3,l,h,0x7362; }""",
        "=&r,=&r,=&r,=&r,r",
        [byte],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unpack_plain(pointer, word_bytes):
    """The same from the words themselves: byte b of a row holds weights b % 4 and b % 4 + 4 of word b // 4."""
    lane = word_bytes % 4
    word = tl.load((pointer - lane).to(tl.pointer_type(tl.int32)))
    low = tl.zeros_like(word).to(tl.float32)
    high = low
    for j in tl.static_range(4):
        low = tl.where(lane == j, e2m1(word, 4 * j, 8 * j + 7), low)
        high = tl.where(lane == j, e2m1(word, 16 + 4 * j, 8 * j + 3), high)
    return low, high


@triton.jit
def _tile(w, s, row, k0, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PLAIN: tl.constexpr):
    """BN rows of BK bytes as BF16 with their scales: the first and the last four of every eight weights."""
    rk = k0 + tl.arange(0, BK)
    pointer = w + row[:, None] * (K // 2) + rk[None, :]
    if PLAIN:
        low, high = _unpack_plain(pointer, rk[None, :] + tl.zeros_like(row)[:, None])
    else:
        low, high = _unpack_asm(tl.load(pointer))
    byte = tl.load(s + row[:, None] * (K // 32) + (k0 // 16 + tl.arange(0, BK // 16))[None, :])
    scale = from_e8m0(byte) if PLAIN else (byte.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, BK // 16, 16)), (BN, BK))
    return low * scale, high * scale


@triton.jit
def _grouped(
    x, w, s, order, expert, first, end, shares, out, E, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    MT: tl.constexpr, BK: tl.constexpr, TOPK: tl.constexpr, LIMIT: tl.constexpr, GATED: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN rows of an expert times the tokens of one tile. GATED: also the BN rows N further down, joined by SwiGLU."""
    tile = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    e = tl.load(expert + tile)
    if e >= E:
        return
    start = tl.load(first + tile)
    rm = start + tl.arange(0, MT)
    inside = rm < tl.load(end + tile)
    pair = tl.load(order + rm, mask=inside, other=0)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = e.to(tl.int64) * (2 * N if GATED else N) + rn
    xr = x + (pair // TOPK).to(tl.int64)[None, :] * K
    acc = tl.zeros((BN, MT), tl.float32)
    up = tl.zeros((BN, MT), tl.float32)
    for k0 in range(0, K // 2, BK):
        rk = k0 + tl.arange(0, BK)
        xa = operand(tl.load(xr + rk[:, None]), PLAIN)
        xb = operand(tl.load(xr + K // 2 + rk[:, None]), PLAIN)
        low, high = _tile(w, s, row, k0, K, BN, BK, PLAIN)
        acc = tl.dot(low, xa, acc, input_precision="ieee")
        acc = tl.dot(high, xb, acc, input_precision="ieee")
        if GATED:
            low, high = _tile(w, s, row + N, k0, K, BN, BK, PLAIN)
            up = tl.dot(low, xa, up, input_precision="ieee")
            up = tl.dot(high, xb, up, input_precision="ieee")
    if GATED:
        gate = tl.minimum(acc, LIMIT)
        acc = gate / (1.0 + tl.exp(-gate)) * tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        acc = acc * tl.load(shares + pair, mask=inside, other=0.0)[None, :]
    place = pair.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside[None, :])
