"""Routed FP4 experts on a GPU for many tokens: grouped products on FP8 tensor cores. Reference 2.10 and 4.

The torch reference is `experts.experts`; names and repacked weights are those of `experts_pairs_triton`. This is the
class of prefill, any number of tokens above a decode step's: a token's result has the same bits in any company, also
where another number of tokens takes another width of tiles.

Pairs are sorted by expert into slots. A weight becomes the e4m3 number that is its value over the largest scale of its
128 x 128 block, which is exact while no scale of the block is more than 2^11 below that (else: NotImplemented).
Products are exact, tensor cores sum 128 columns, and what is above is summed in float32.
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

from fathom.kernels.common_triton import PLAIN, fp4, from_e8m0, operand, options
from fathom.kernels.experts_pairs_triton import Fp4Experts, combine
from fathom.kernels.experts_plan_triton import Plan, by_slot, planned
from fathom.kernels.quant_triton import quantise

_SPREAD, _LOWEST = 11, 7
"""Powers of two that e4m3 holds beside those of e2m1, and the least exponent byte of a block's largest scale."""
_SHAPES = {128: (64, 4), 64: (128, 3), 32: (128, 4), 16: (128, 4)}
"""Rows of weights and stages of a tile of so many slots. With 128 slots, 64 rows leave room for two programs on a
multiprocessor."""
_tops: Any = WeakIdKeyDictionary()


def many(
    x: Tensor, chosen: Tensor, shares: Tensor, weights: Fp4Experts, limit: float, shared: Tensor | None = None
) -> Any:
    """x [T, D] BF16, chosen [T, k], shares float32 [T, k] -> as `combine`. Any T; D and I multiples of 128, else
    NotImplemented."""
    tops = None if (x.shape[1] | weights.w2.shape[2] * 8) % 128 else tops_of(weights)
    if tops is None:
        return NotImplemented
    plan = planned(chosen, weights.w13.shape[0])
    values, scales = quantise(x)
    hidden = gate_up(values, by_slot(scales, plan, shares), weights, tops[0], plan, limit)
    values, scales = quantise(hidden)
    parts = down(values, by_slot(scales, plan), weights, tops[1], plan, chosen.numel())
    return combine(parts, chosen.shape[1], shared)


def gate_up(x: Tensor, scales: Tensor, weights: Fp4Experts, tops: Tensor, plan: Plan, limit: float) -> Tensor:
    """share * silu(min(a, limit)) * clamp(b, -limit, limit), [a, b] = w13[e] x, for every slot: BF16 [S, I].

    x e4m3 [T, D] with scales and shares [D / 128 + 1, S] by slot.
    """
    out = torch.empty((len(plan.pairs), weights.w13.shape[1] // 2), dtype=torch.bfloat16, device=x.device)
    _launch(x, scales, weights.w13, weights.s13, tops, plan, out, limit)
    return out


def down(x: Tensor, scales: Tensor, weights: Fp4Experts, tops: Tensor, plan: Plan, pairs: int) -> Tensor:
    """w2[e] x for every pair, BF16 [P, D]; x e4m3 [S, I] with scales [I / 128, S], both by slot."""
    out = torch.empty((pairs, weights.w2.shape[1]), dtype=torch.bfloat16, device=x.device)
    _launch(x, scales, weights.w2, weights.s2, tops, plan, out)
    return out


def _launch(
    x: Tensor, scales: Tensor, w: Tensor, s: Tensor, tops: Tensor, plan: Plan, out: Tensor, limit: float | None = None
) -> None:
    """Programs for the same slots stand side by side: they share x, whose tile stays in the L2 cache."""
    rows, k = out.shape[1], w.shape[2] * 8
    tall, stages = _SHAPES[plan.wide]
    _grouped[(rows // (tall if limit is None else tall // 2), len(plan.expert))](
        x, scales, w.view(torch.uint8), s.view(torch.int32), tops, plan.pairs, plan.expert, plan.first, plan.end, out,
        len(w), len(plan.pairs), rows, k, tall, plan.wide, stages, 1 if limit is None else plan.k, limit or 0.0,
        limit is not None, PLAIN, **options(x, 4),
    )  # fmt: skip


def tops_of(weights: Fp4Experts) -> tuple[Tensor, Tensor] | None:
    """The exponent byte of the largest scale of each block of 128 x 128 weights, of gate and up together:
    uint8 [E, I / 128, D / 128] and [E, D / 128, I / 128]; None where a scale is too far below. Found at the first call,
    which waits for the device, and kept with the weights.
    """
    if weights.w13 not in _tops:
        found = [_extremes(weights.w13, weights.s13, 2), _extremes(weights.w2, weights.s2, 1)]
        _tops[weights.w13] = None if any(top is None for top in found) else tuple(found)
    kept: tuple[Tensor, Tensor] | None = _tops[weights.w13]
    return kept


def _extremes(words: Tensor, scales: Tensor, halves: int) -> Tensor | None:
    experts, rows, groups = words.shape[0], words.shape[1], words.shape[2] // 16
    most, least = (
        torch.empty((experts, halves, rows // (128 * halves), groups), dtype=torch.uint8, device=words.device)
        for _ in range(2)
    )
    _bounds[(experts * rows // 128, groups)](words, scales, most, least, groups, **options(words, 4))
    top, low = most.amax(1).int(), least.amin(1).int()
    fits = (low > top) | ((top - low <= _SPREAD) & (top >= _LOWEST))
    return torch.where(low > top, 127, top).to(torch.uint8) if bool(fits.all()) else None


@triton.jit
def _bounds(words, scales, most, least, G, PDL: tl.constexpr):
    """The largest and the least scale of a block, of those with a weight that is not zero."""
    rn = (tl.program_id(0) * 128 + tl.arange(0, 128)).to(tl.int64)
    k = tl.program_id(1)
    r4 = tl.arange(0, 4)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = words + rn[:, None, None] * (G * 16) + k * 16 + r4[None, :, None] * 4 + r4[None, None, :]
    some = tl.max(tl.load(place) & 0x3F3F3F3F, 2) > 0
    scale = tl.load(scales + rn[:, None] * (G * 4) + k * 4 + r4[None, :]).to(tl.int32)
    here = tl.program_id(0).to(tl.int64) * G + k
    tl.store(most + here, tl.max(tl.max(tl.where(some, scale, 0), 1), 0).to(tl.uint8))
    tl.store(least + here, tl.min(tl.min(tl.where(some, scale, 255), 1), 0).to(tl.uint8))


@triton.jit
def _unpack_asm(byte, low, high):
    """Four bytes of a repacked word -> its weights 0..3 and 4..7 in e4m3: magnitudes from a table of eight bytes."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 d,m,n,s;
        shl.b32 d,$2,1; and.b32 m,$2,0x07070707; lop3.b32 m,d,0x70707070,m,0xEA; shr.u32 n,m,16;
        prmt.b32 m,$3,$7,m; prmt.b32 n,$3,$7,n;
        prmt.b32 s,d,$2,0x5140; lop3.b32 $0,s,0x80808080,m,0xEA;
        prmt.b32 s,d,$2,0x7362; lop3.b32 $1,s,0x80808080,n,0xEA; }""",
        "=&r,=&r,r,r,r,r,r,r,r,r,r",
        [byte, low, high],
        dtype=(tl.float8e4nv, tl.float8e4nv),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unpack_plain(pointer, lane, up):
    """The same from the words themselves: place b of a row has weights b % 4 and b % 4 + 4 of word b // 4."""
    word = tl.load((pointer - lane).to(tl.pointer_type(tl.int32)))
    low = tl.zeros_like(word).to(tl.float32)
    high = low
    for j in tl.static_range(4):
        low = tl.where(lane == j, fp4(word, j), low)
        high = tl.where(lane == j, fp4(word, 4 + j), high)
    return low * from_e8m0(up + 122), high * from_e8m0(up + 122)


@triton.jit
def _weights(pointer, word, top, BN: tl.constexpr, PLAIN: tl.constexpr):
    """BN rows of 128 weights over 2^(top - 6): `word` [BN] holds the rows' four scales. The tables of e4m3 magnitudes
    (of e2m1's at five powers less) are raised by the steps that a scale is above the least one possible."""
    scale = (word[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255
    if PLAIN:
        up = tl.minimum(tl.maximum(scale - top + 11, 0), 11)
        full = tl.reshape(tl.broadcast_to(up[:, :, None], (BN, 4, 16)), (BN, 64))
        a, b = _unpack_plain(pointer, tl.zeros_like(full) + tl.arange(0, 64)[None, :] % 4, full)
    else:  # the byte for zero stays zero, also where a scale of nothing but zeros makes the others anything
        low = 0x14100800 + (11 - top) * 0x08080800 + scale * 0x08080800
        high = 0x24201C18 + (11 - top) * 0x08080808 + scale * 0x08080808
        low = tl.reshape(tl.broadcast_to(low[:, :, None], (BN, 4, 16)), (BN, 64))
        high = tl.reshape(tl.broadcast_to(high[:, :, None], (BN, 4, 16)), (BN, 64))
        a, b = _unpack_asm(tl.load(pointer), low, high)
    eights = tl.reshape(tl.join(a, b), (BN, 16, 4, 2))
    return tl.reshape(tl.permute(eights, (0, 1, 3, 2)), (BN, 128))


@triton.jit
def _grouped(
    x, xs, w, s, tops, pairs, expert, first, end, out, E, S, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr,
    MT: tl.constexpr, STAGES: tl.constexpr, TOPK: tl.constexpr, LIMIT: tl.constexpr, GATED: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN rows of an expert times the slots of one tile. GATED: half of them gate rows, half up rows N further down,
    eight by eight so that a thread holds both, joined by SwiGLU; x is by token. Else x is by slot, `out` by pair."""
    tile = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    e = tl.load(expert + tile)
    if e >= E:
        return
    G: tl.constexpr = K // 128
    start = tl.multiple_of(tl.load(first + tile), 8)
    slot = start + tl.arange(0, MT)
    inside = slot < tl.load(end + tile)
    i = tl.arange(0, BN)
    if GATED:
        begin = tl.program_id(0) * (BN // 2)
        row = e.to(tl.int64) * (2 * N) + begin + i // 16 * 8 + i % 8 + (i // 8 % 2) * N
        source = tl.load(pairs + slot, mask=inside, other=0) // TOPK
    else:
        begin = tl.program_id(0) * BN
        row = e.to(tl.int64) * N + begin + i
        source = slot
    wp = w + row[:, None] * (K // 2) + tl.arange(0, 64)[None, :]
    sp = s + row * G
    tp = tops + (e * (N // 128) + begin // 128) * G
    xp = x + source.to(tl.int64)[None, :] * K + tl.arange(0, 128)[:, None]
    xsp = xs + slot
    acc = tl.zeros((BN, MT), tl.float32)
    following = tl.load(tp).to(tl.int32)
    # Stated stages: so the factors, which no product reads, are also loaded ahead.
    for k in tl.range(G, num_stages=STAGES):
        top = following
        following = tl.load(tp + tl.minimum(k + 1, G - 1)).to(tl.int32)
        rows = operand(tl.load(xp + k * 128, mask=inside[None, :], other=0.0), PLAIN)
        factor = tl.load(xsp + k * S) * from_e8m0(top - 6)
        weights = _weights(wp + k * 64, tl.load(sp + k), top, BN, PLAIN)
        acc += tl.dot(weights, rows, input_precision="ieee") * factor[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 16, 2, 8, MT)), (0, 2, 3, 1)))
        gate = tl.minimum(tl.reshape(gate, (BN // 2, MT)), LIMIT)
        up = tl.minimum(tl.maximum(tl.reshape(up, (BN // 2, MT)), -LIMIT), LIMIT)
        acc = gate / (1.0 + tl.exp(-gate)) * up * tl.load(xsp + G * S)[None, :]
        place = slot.to(tl.int64)[None, :] * N + (begin + tl.arange(0, BN // 2))[:, None]
    else:
        pair = tl.load(pairs + slot, mask=inside, other=0)
        place = pair.to(tl.int64)[None, :] * N + (begin + i)[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside[None, :])
