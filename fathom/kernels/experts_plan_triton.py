"""Which pairs of a token and an expert are multiplied together: sorted by expert, cut into tiles, all on the device.

Two launches, whose programs are the experts: each counts its pairs, then puts them where the counts say.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import options, power_of_two

_ALIGNED = 8
_SCAN = 8192
_WIDTHS = ((128, 64), (64, 24), (32, 12), (16, 0))
"""Slots of a tile, and the mean of an expert's pairs from which on it is taken: most experts should fit one tile."""


@dataclass(frozen=True)
class Plan:
    """Pairs in the order of their experts, each expert's from a multiple of 8 on.

    pairs int32 [S]: the pair in each slot, -1 in a gap. Per tile of `wide` slots: its expert (E: none), its first slot
    and the end of the expert's. k: pairs of a token.
    """

    pairs: Tensor
    expert: Tensor
    first: Tensor
    end: Tensor
    wide: int
    k: int


def planned(chosen: Tensor, experts: int) -> Plan:
    """For chosen ids [T, k] of `experts` experts. Sizes are upper bounds, so that the host need not ask."""
    pairs, device = chosen.numel(), chosen.device
    wide = next(slots for slots, mean in _WIDTHS if pairs >= mean * experts)
    # The last tile may reach over the last pair: it reads what is there, and stores nothing of it.
    slots = -(-(pairs + (_ALIGNED - 1) * min(experts, pairs)) // 16) * 16 + wide
    counts, order, expert, first, end = (
        torch.empty(n, dtype=torch.int32, device=device)
        for n in (experts, slots, *[pairs // wide + min(experts, pairs)] * 3)
    )
    chosen = chosen.contiguous()
    _count[(experts,)](chosen, counts, pairs, _SCAN, **options(chosen, 8))
    _place[(experts,)](
        chosen, counts, order, expert, first, end, pairs, slots, len(expert), experts, power_of_two(experts), wide,
        _ALIGNED, _SCAN, **options(chosen, 8),
    )  # fmt: skip
    return Plan(order, expert, first, end, wide, chosen.shape[1])


def by_slot(scales: Tensor, plan: Plan, shares: Tensor | None = None) -> Tensor:
    """Scales as the products read them: [G, S] from [S, G] by slot, or [G + 1, S] from [T, G] by token with the pairs'
    shares [T, k] behind them."""
    groups, slots = scales.shape[1], len(plan.pairs)
    out = torch.empty((groups + (shares is not None), slots), dtype=torch.float32, device=scales.device)
    k = 0 if shares is None else shares.shape[1]
    _columns[(triton.cdiv(slots, 64),)](
        scales, scales if shares is None else shares.contiguous(), plan.pairs, out, slots, groups, power_of_two(groups),
        64, k, **options(scales, 4),
    )  # fmt: skip
    return out


@triton.jit
def _count(chosen, counts, P, B: tl.constexpr, PDL: tl.constexpr):
    r = tl.arange(0, B)
    found = tl.zeros((B,), tl.int32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = 0
    while i < P:
        ids = tl.load(chosen + i + r, mask=i + r < P, other=-1)
        found += (ids == tl.program_id(0)).to(tl.int32)
        i += B
    tl.store(counts + tl.program_id(0), tl.sum(found, 0))


@triton.jit
def _place(
    chosen, counts, order, expert, first, end, P, S, TILES, E, EB: tl.constexpr, MT: tl.constexpr,
    ALIGNED: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    re = tl.arange(0, EB)
    r = tl.arange(0, B)
    few = tl.arange(0, 64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    count = tl.load(counts + re, mask=re < E, other=0)
    start = tl.sum(tl.where(re < e, (count + ALIGNED - 1) // ALIGNED * ALIGNED, 0), 0)
    tile = tl.sum(tl.where(re < e, (count + MT - 1) // MT, 0), 0)
    stop = start + tl.sum(tl.where(re == e, count, 0), 0)
    at = start
    i = 0
    while i < P:
        hit = (tl.load(chosen + i + r, mask=i + r < P, other=-1) == e).to(tl.int32)
        tl.store(order + at + tl.cumsum(hit, 0) - 1, i + r, mask=hit == 1)
        at += tl.sum(hit, 0)
        i += B
    # The last expert also clears what is behind: slots without a pair, tiles without an expert.
    last = e == E - 1
    until = tl.where(last, S, (stop + ALIGNED - 1) // ALIGNED * ALIGNED)
    while at < until:
        tl.store(order + at + few, -1, mask=at + few < until)
        at += 64
    after = tile + (stop - start + MT - 1) // MT
    until = tl.where(last, TILES, after)
    i = tile
    while i < until:
        n = i + few
        tl.store(expert + n, tl.where(n < after, e, E), mask=n < until)
        tl.store(first + n, start + (n - tile) * MT, mask=n < until)
        tl.store(end + n, tl.zeros_like(n) + stop, mask=n < until)
        i += 64


@triton.jit
def _columns(
    scales, shares, pairs, out, S, G, GB: tl.constexpr, B: tl.constexpr, TOPK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0) * B + tl.arange(0, B)
    rg = tl.arange(0, GB)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = r
    inside = r < S
    if TOPK:
        pair = tl.load(pairs + r, mask=inside, other=-1)
        row = pair // TOPK
        inside = pair >= 0
        share = tl.load(shares + pair, mask=inside, other=0.0)
        tl.store(out + G * S + r, share, mask=r < S)
    value = tl.load(scales + row[:, None] * G + rg[None, :], mask=inside[:, None] & (rg < G)[None, :], other=0.0)
    tl.store(out + rg[None, :] * S + r[:, None], value, mask=(r < S)[:, None] & (rg < G)[None, :])
