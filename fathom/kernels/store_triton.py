"""What stands between a layer's projections and its attention, in one launch. Reference 2.5 to 2.8, 4.

The torch reference is `store`; a step on Hopper has `store_cuda`, which comes here for what it lacks. A program does
one thing for one token: its window row, its part of an entry or of an index key, the queries of a few heads, or the
index queries of a few. What other programs of the launch write is never read: rows of neighbours in the batch are taken
from the projections, and only a launch of few tokens writes into rings that it reads.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, operand, options, power_of_two
from fathom.kernels.decode import Memory, Tokens
from fathom.kernels.quant import hadamard_matrix
from fathom.kernels.store import Norms, Projected
from fathom.kernels.stored import BLOCK
from fathom.kernels.stored_triton import bf16, fp4, normed, planes_of, rounded, store_key, store_row, turn_of, turned

_HEADS, _INDEX_HEADS = 4, 16
"""Heads that a program makes the queries of."""
_ITEMS = 8
"""Items that are pooled at a time."""


def prepare(made: Projected, tokens: Tokens, memory: Memory, norms: Norms) -> Any:
    """`store.prepare`; NotImplemented for other types than BF16 and for fronts that are no multiple of 64."""
    out = _launched(made, tokens, memory, norms, True, True)
    return out if out is NotImplemented else out[:2]


def enter(made: Projected, tokens: Tokens, memory: Memory, norms: Norms) -> Any:
    """`store.enter`, likewise."""
    return _launched(made, tokens, memory, norms, True, False)


def remember(
    made: Projected, tokens: Tokens, memory: Memory, norms: Norms, first: int, last: int, end: int | None
) -> Any:
    """`store.remember`, likewise."""
    first = max(first, last - max(memory.window.per, _tail(memory)))
    part = made.rows(first, last)
    there = Tokens(tokens.slots[first:last], tokens.positions[first:last], tokens.turns[:, first:last])
    if _launched(part, there, memory, norms, False, True, end or 0) is NotImplemented:
        return NotImplemented
    return None


def _launched(
    made: Projected, tokens: Tokens, memory: Memory, norms: Norms, enters: bool, keeps: bool, end: int = 0
) -> Any:
    """Queries, index queries and rows; those that are not asked for hold nothing."""
    q, kv, index_q = made.q, made.kv, made.index_q
    count, heads, width = q.shape
    if q.dtype != torch.bfloat16 or kv.dtype != torch.bfloat16 or (width - memory.window.rope) % BLOCK:
        return NotImplemented
    if index_q is not None and index_q.shape[2] not in (32, 64, 128):
        return NotImplemented
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    iq = q if index_q is None else index_q.contiguous()
    iout = torch.empty_like(iq)
    rows = kv if keeps else torch.empty((count, width), dtype=kv.dtype, device=kv.device)
    index_heads, dim = iq.shape[1:] if index_q is not None else (0, 32)
    blocks = (triton.cdiv(heads, _HEADS), triton.cdiv(index_heads, _INDEX_HEADS)) if enters else (0, 0)
    turn, of_block = tokens.turn(memory.ratio), tokens.turn(memory.ratio, block=True)
    entry = _place(memory, memory.entries, made.entries, memory.tail, norms.entries, kv, norms)
    key = _place(memory, memory.keys, made.keys, memory.key_tail, norms.keys, kv, norms)
    _prepare[(3 + sum(blocks), count)](
        q, out, iq, iout, hadamard_matrix(dim, torch.bfloat16, q.device), kv, norms.kv, rows, *planes_of(memory.window),
        turn, of_block, tokens.slots, tokens.positions, memory.table, *entry, *key, norms.eps, kv.stride(0), heads,
        index_heads, memory.table.shape[1], blocks[0], end, width, power_of_two(width), memory.window.rope, dim,
        memory.ratio, memory.window.per, _tail(memory), 128 // max(memory.ratio, 1),
        memory.keys is not None and memory.keys.packed, _HEADS, _INDEX_HEADS, _ITEMS, enters, keeps, PLAIN,
        **options(q, 4),
    )  # fmt: skip
    return out, None if index_q is None else iout, rows


def _tail(memory: Memory) -> int:
    return 1 if memory.tail is None else memory.tail.shape[1]


def _place(memory: Memory, store: Any, projected: Any, tail: Any, weights: Any, none: Tensor, norms: Norms) -> Any:
    """Of a compressor: projections and their stride, tail, bias, norm, and the planes where entries go."""
    if store is None:
        return none, 0, none, none, norms.kv, none, none, none
    return projected, projected.stride(0), tail, weights.ape, weights.norm, *planes_of(store)


@triton.jit
def _items(
    at, column, inside, projected, STRIDE, tail, ape, slots, positions, b, slot, position, W: tl.constexpr,
    RING: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """Values and gates [n, columns] of the sequence's tokens at positions `at` [n] <= position; gates -inf before 0."""
    source = b - (position - at)
    near = (source >= 0) & (at >= 0)
    near = near & (tl.load(slots + source, mask=near, other=-1) == slot)
    near = near & (tl.load(positions + source, mask=near, other=-1) == at)
    mine = near[:, None] & inside[None, :]
    place = projected + source.to(tl.int64)[:, None] * STRIDE + column[None, :]
    bias = tl.load(ape + (at % RATIO)[:, None] * W + column[None, :], mask=mine, other=0.0)
    value = tl.load(place, mask=mine, other=0.0)
    gate = tl.load(place + W, mask=mine, other=0.0) + bias
    kept = ((at >= 0) & (near == 0))[:, None] & inside[None, :]
    place = tail + (slot.to(tl.int64) * RING + at % RING)[:, None] * (2 * W) + column[None, :]
    value = tl.where(mine, value, tl.load(place, mask=kept, other=0.0))
    gate = tl.where(mine, gate, tl.load(place + W, mask=kept, other=0.0))
    return value, tl.where((at >= 0)[:, None], gate, float("-inf"))


@triton.jit
def _add(value, gate, top, total, acc):
    """Online softmax over items: n more, [n, columns]."""
    new = tl.maximum(top, tl.max(gate, 0))
    shrink = tl.exp(top - new)
    share = tl.exp(gate - new[None, :])
    return new, total * shrink + tl.sum(share, 0), acc * shrink + tl.sum(share * value, 0)


@triton.jit
def _compressed(
    projected, STRIDE, tail, ape, norm, codes, rope, scales, turn, slots, positions, table, mixer, b, slot, position,
    EPS, PAGES, D: tl.constexpr, B: tl.constexpr, ROPE: tl.constexpr, RATIO: tl.constexpr, RING: tl.constexpr,
    PER: tl.constexpr, KEY: tl.constexpr, PACKED: tl.constexpr, ITEMS: tl.constexpr, ENTERS: tl.constexpr,
    KEEPS: tl.constexpr, END,
):  # fmt: skip
    """Keep a token's values and gates; where it closes its block, pool the block and store the entry."""
    HALVES: tl.constexpr = 2 if RATIO == 4 else 1
    W: tl.constexpr = HALVES * D
    r = tl.arange(0, B)
    inside = r < D
    own = projected + b.to(tl.int64) * STRIDE + r
    row = tail + (slot.to(tl.int64) * RING + position % RING) * (2 * W) + r
    bias = ape + (position % RATIO) * W + r
    if KEEPS:
        kept = inside & (position >= END - RING)
        for half in tl.static_range(HALVES):
            tl.store(row + half * D, tl.load(own + half * D, mask=kept), mask=kept)
            biased = tl.load(own + W + half * D, mask=kept) + tl.load(bias + half * D, mask=kept)
            tl.store(row + W + half * D, biased, mask=kept)
    closes = (position + 1) % RATIO == 0
    if not ENTERS:
        closes = False
    if closes:
        high = r + (HALVES - 1) * D
        top = tl.full((B,), -1e38, tl.float32)
        total = tl.zeros((B,), tl.float32)
        acc = tl.zeros((B,), tl.float32)
        if RATIO == 4:
            at = position - 7 + tl.arange(0, 4)
            value, gate = _items(
                at, r, inside, projected, STRIDE, tail, ape, slots, positions, b, slot, position, W, RING, RATIO
            )
            top, total, acc = _add(value, gate, top, total, acc)
            value, gate = _items(
                at + 4, high, inside, projected, STRIDE, tail, ape, slots, positions, b, slot, position, W, RING, RATIO
            )
            top, total, acc = _add(value, gate, top, total, acc)
        else:
            for first in range(position + 1 - RATIO, position + 1, ITEMS):
                value, gate = _items(
                    first + tl.arange(0, ITEMS), r, inside, projected, STRIDE, tail, ape, slots, positions, b, slot,
                    position, W, RING, RATIO,
                )  # fmt: skip
                top, total, acc = _add(value, gate, top, total, acc)
        pooled = tl.where(inside, acc / total, 0.0)
        x = normed(tl.reshape(bf16(pooled), (1, B)), D, EPS)
        x = bf16(x * tl.load(norm + r, mask=inside, other=0.0).to(tl.float32)[None, :])
        cos, sin = turn_of(turn + b * ROPE, B, D, ROPE, 0)
        x = turned(x, cos, sin, 1, B)
        block = position // RATIO
        page = tl.load(table + slot * PAGES + block // PER).to(tl.int64)
        if KEY:
            square = tl.load(mixer + r[:, None] * D + r[None, :]).to(tl.float32)
            mixed = bf16(tl.sum(tl.reshape(x, (B, 1)) * square, 0))
            store_key(tl.reshape(mixed, (1, B)), codes, scales, page * PER + block % PER, D, PACKED)
        else:
            store_row(x, codes, rope, scales, page * PER + block % PER, B, D, ROPE)


@triton.jit(do_not_specialize=["END"], do_not_specialize_on_alignment=["slots", "positions"])
def _prepare(
    q, out, iq, iout, mixer, kv, weight, rows, codes, rope, scales, turns, block_turns, slots, positions, table,
    eproj, ESTRIDE, etail, eape, enorm, ecodes, erope, escales, kproj, KSTRIDE, ktail, kape, knorm, kcodes, krope,
    kscales, EPS, KVSTRIDE, H, IH, PAGES, QBLOCKS, END, C: tl.constexpr, B: tl.constexpr, ROPE: tl.constexpr,
    D: tl.constexpr, RATIO: tl.constexpr, RING: tl.constexpr, TAIL: tl.constexpr, PER: tl.constexpr,
    PACKED: tl.constexpr, HB: tl.constexpr, IB: tl.constexpr, ITEMS: tl.constexpr, ENTERS: tl.constexpr,
    KEEPS: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    role = tl.program_id(0)
    b = tl.program_id(1)
    r = tl.arange(0, B)
    slot = tl.load(slots + b)
    position = tl.load(positions + b)
    # Before the wait what does not change: later each would be another wait for memory.
    turn = turns + b * ROPE
    cos, sin = turn_of(turn, B, C, ROPE, 0)
    weights = tl.load(weight + r, mask=(r < C) & (role == 0), other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if role == 0:
        if slot >= 0:
            x = tl.load(kv + b.to(tl.int64) * KVSTRIDE + r, mask=r < C, other=0.0).to(tl.float32)
            x = normed(tl.reshape(x, (1, B)), C, EPS)
            x = turned(bf16(x * weights[None, :]), cos, sin, 1, B)
            if not KEEPS:
                tl.store(rows + b.to(tl.int64) * C + r, rounded(x, B, C, ROPE), mask=r < C)
            elif position >= END - RING:
                store_row(x, codes, rope, scales, slot.to(tl.int64) * RING + position % RING, B, C, ROPE)
    elif role == 1:
        if RATIO > 0:
            if slot >= 0:
                _compressed(
                    eproj, ESTRIDE, etail, eape, enorm, ecodes, erope, escales, block_turns, slots, positions, table,
                    mixer, b, slot, position, EPS, PAGES, C, B, ROPE, RATIO, TAIL, PER, False, False, ITEMS, ENTERS,
                    KEEPS, END,
                )  # fmt: skip
    elif role == 2:
        if RATIO == 4:
            if slot >= 0:
                _compressed(
                    kproj, KSTRIDE, ktail, kape, knorm, kcodes, krope, kscales, block_turns, slots, positions, table,
                    mixer, b, slot, position, EPS, PAGES, D, D, ROPE, 4, TAIL, PER, True, PACKED, ITEMS, ENTERS,
                    KEEPS, END,
                )  # fmt: skip
    elif role < 3 + QBLOCKS:
        heads = (role - 3) * HB + tl.arange(0, HB)
        mask = (heads < H)[:, None] & (r < C)[None, :]
        place = (b.to(tl.int64) * H + heads)[:, None] * C + r[None, :]
        x = bf16(normed(tl.load(q + place, mask=mask, other=0.0).to(tl.float32), C, EPS))
        tl.store(out + place, turned(x, cos, sin, HB, B).to(tl.bfloat16), mask=mask)
    else:
        if RATIO == 4:
            rd = tl.arange(0, D)
            index_heads = (role - 3 - QBLOCKS) * IB + tl.arange(0, IB)
            there = (index_heads < IH)[:, None] & (rd < D)[None, :]
            spot = (b.to(tl.int64) * IH + index_heads)[:, None] * D + rd[None, :]
            square = operand(tl.load(mixer + rd[:, None] * D + rd[None, :]), PLAIN)
            index_cos, index_sin = turn_of(turn, D, D, ROPE, 0)
            v = turned(tl.load(iq + spot, mask=there, other=0.0).to(tl.float32), index_cos, index_sin, IB, D)
            y, scale = fp4(bf16(tl.dot(operand(v.to(tl.bfloat16), PLAIN), square, input_precision="ieee")), IB, D)
            tl.store(iout + spot, tl.reshape(y * scale[:, :, None], (IB, D)).to(tl.bfloat16), mask=there)
