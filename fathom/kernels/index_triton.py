"""The indexer of a decode step: scores through the page table, then an exact choice. Reference 2.8.

The torch reference is `decode.select`. Grids depend on the longest sequence that is allowed, loops on the one that is
there. The choice is a search for the k-th largest score, two bits of its pattern at a time; above 8192 keys first in
each chunk of so many, then among the chunks' best. It is exact for any scores, and in the order of the sequence.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels import index_cuda
from fathom.kernels.common_triton import PLAIN, from_e8m0, inverse_pow2, operand, options, power_of_two
from fathom.kernels.decode import Memory, Tokens

KEYS = 64 if PLAIN else 128
"""Keys that are scored at a time."""
CHUNK = 64 if PLAIN else 8192
"""Scores that a program chooses among."""
_PROGRAMS = 528
"""Programs that score, all tokens together: four on each multiprocessor of an H200."""


def select(q: Tensor, weights: Tensor, tokens: Tokens, memory: Memory, k: int, most: int) -> Any:
    """`decode.select`; NotImplemented for key widths that are no power of two."""
    assert memory.keys is not None
    count, heads, dim = q.shape
    if dim not in (32, 64, 128):
        return NotImplemented
    number = triton.cdiv(most // 4, 4) * 4  # rows of scores that begin at multiples of 16 bytes
    scores = torch.empty((count, number), dtype=torch.float32, device=q.device)
    keys, where = memory.keys, (tokens.slots, tokens.positions, memory.table)
    # An ordinary launch (early=False), so that attention may read queries and window while entries are chosen.
    together = min(triton.cdiv(number, KEYS), max(8, _PROGRAMS // count))
    packed = keys.packed
    _scores[(together, count)](
        q.contiguous(), weights, keys.data if packed else keys.data.view(torch.float8_e4m3fn), keys.scales, *where,
        scores, weights.stride(0), memory.table.shape[1], number, k, dim**-0.5 * heads**-0.5, heads,
        max(16, power_of_two(heads)), dim, keys.per, KEYS, together * KEYS >= number, packed, PLAIN,
        **options(q, 4, early=False),
    )  # fmt: skip
    return choose(scores, tokens, memory.table, keys.per, k)


def choose(scores: Tensor, tokens: Tokens, table: Tensor, per: int, k: int) -> Tensor:
    """Rows int32 [B, k] of the k best of scores [B, n], of which a token at p sees the first (p + 1) / 4."""
    if index_cuda.has(scores, k):
        return index_cuda.choose(scores, tokens, table, per, k)
    count, number = scores.shape
    chunks = triton.cdiv(number, CHUNK)
    out = torch.empty((count, k), dtype=torch.int32, device=scores.device)
    best = out if chunks == 1 else torch.empty((count, chunks, k), dtype=torch.int32, device=scores.device)
    block = min(CHUNK, max(power_of_two(number), 128))
    where = (tokens.slots, tokens.positions, table)
    _choose[(chunks, count)](
        scores, best, out, *where, table.shape[1], number, chunks, k, power_of_two(k), per, block, CHUNK,
        **options(scores, _warps(block)),
    )  # fmt: skip
    if chunks > 1:
        block = power_of_two(chunks * k)
        _choose_last[(count,)](
            scores, best, out, *where, table.shape[1], number, chunks, k, per, block, CHUNK,
            **options(scores, _warps(block)),
        )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return 1 if PLAIN else min(32, max(4, block // 256))


@triton.jit
def _e2m1(code):
    """FP4 codes as float32: the three bits of magnitude are the ends of exponent and mantissa."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _one_scale(x):
    """Powers of two under which rows of FP4 values fit into e4m3."""
    amax = tl.maximum(tl.max(tl.abs(x), 1), 7.888609052210118e-31)
    bits = tl.div_rn(amax, 448.0 + tl.zeros_like(amax)).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _rows(table, slot, at, seen, PAGES, PER: tl.constexpr):
    """Where keys `at` are stored."""
    page = tl.load(table + slot * PAGES + at // PER, mask=seen, other=0).to(tl.int64)
    return page * PER + at % PER


@triton.jit
def _keys(keys, scales, row, D: tl.constexpr, PACKED: tl.constexpr):
    """Stored keys and their scales."""
    DATA: tl.constexpr = D // 2 if PACKED else D
    k = tl.load(keys + row[:, None] * DATA + tl.arange(0, DATA)[None, :])
    if PACKED:
        scale = tl.load(scales + row[:, None] * (D // 32) + tl.arange(0, D // 32)[None, :])
    else:
        scale = tl.load(scales + row)
    return k, scale


@triton.jit
def _queries(q, weights, t, WSTRIDE, H, HB: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr):
    """Of a token: weights of the heads, and its queries' columns, even and odd ones where keys are FP4."""
    rh = tl.arange(0, HB)
    w = tl.load(weights + t * WSTRIDE + rh, mask=rh < H, other=0.0)
    place = q + (t * H + rh)[:, None] * D
    mask = (rh < H)[:, None]
    if PACKED:
        rd = tl.arange(0, D // 2)
        even = tl.load(place + 2 * rd[None, :], mask=mask, other=0.0)
        odd = tl.load(place + 2 * rd[None, :] + 1, mask=mask, other=0.0)
    else:
        even = tl.load(place + tl.arange(0, D)[None, :], mask=mask, other=0.0)
        odd = even
    return w, even, odd


@triton.jit
def _weighed(w, even, odd, SCALE, PACKED: tl.constexpr, PLAIN: tl.constexpr):
    """The same as a product takes it: columns first; rounded to e4m3 for keys in e4m3, their scales in the weights."""
    w = (w.to(tl.float32) * SCALE).to(tl.bfloat16).to(tl.float32)
    if PACKED:
        first = operand(even, PLAIN)
        second = operand(odd, PLAIN)
    else:
        x = even.to(tl.float32)
        one = _one_scale(x)
        w = w * one
        x = x * inverse_pow2(one)[:, None]
        first = x if PLAIN else x.to(tl.float8e4nv)
        second = first
    return w, tl.trans(first), tl.trans(second)


@triton.jit
def _score(k, scale, w, even, odd, B: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr, PLAIN: tl.constexpr):
    if PACKED:
        code, power = k.to(tl.int32), from_e8m0(scale)
        low = _scaled(_e2m1(code & 15), power, B, D)
        high = _scaled(_e2m1(code >> 4), power, B, D)
        dots = tl.dot(operand(low.to(tl.bfloat16), PLAIN), even, input_precision="ieee")
        dots = tl.dot(operand(high.to(tl.bfloat16), PLAIN), odd, dots, input_precision="ieee")
        score = tl.sum(tl.maximum(dots, 0.0) * w[None, :], 1)
    else:
        dots = tl.dot(k.to(tl.float32), even, input_precision="ieee") if PLAIN else tl.dot(k, even)
        score = tl.sum(tl.maximum(dots, 0.0) * w[None, :], 1) * scale
    return score


@triton.jit
def _scores(
    q, weights, keys, scales, slots, positions, table, scores, WSTRIDE, PAGES, ROOM, TOPK, SCALE, H, HB: tl.constexpr,
    D: tl.constexpr, PER: tl.constexpr, B: tl.constexpr, ONCE: tl.constexpr, PACKED: tl.constexpr, PLAIN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1)
    slot = tl.load(slots + t)
    number = tl.where(slot >= 0, (tl.load(positions + t) + 1) // 4, 0)
    at = tl.program_id(0) * B + tl.arange(0, B)
    if ONCE:  # a program has B keys at most: it looks for them first, then for the queries
        row = _rows(table, slot, at, at < number, PAGES, PER)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if (number > TOPK) & (tl.program_id(0) * B < number):
        out = scores + t.to(tl.int64) * ROOM
        w, even, odd = _queries(q, weights, t, WSTRIDE, H, HB, D, PACKED)
        if ONCE:
            k, scale = _keys(keys, scales, row, D, PACKED)
            w, even, odd = _weighed(w, even, odd, SCALE, PACKED, PLAIN)
            tl.store(out + at, _score(k, scale, w, even, odd, B, D, PACKED, PLAIN), mask=at < number)
        else:
            w, even, odd = _weighed(w, even, odd, SCALE, PACKED, PLAIN)
            for first in range(tl.program_id(0) * B, number, tl.num_programs(0) * B):
                at = first + tl.arange(0, B)
                k, scale = _keys(keys, scales, _rows(table, slot, at, at < number, PAGES, PER), D, PACKED)
                tl.store(out + at, _score(k, scale, w, even, odd, B, D, PACKED, PLAIN), mask=at < number)


@triton.jit
def _scaled(x, scale, B: tl.constexpr, D: tl.constexpr):
    return tl.reshape(tl.reshape(x, (B, D // 32, 16)) * scale[:, :, None], (B, D // 2))


@triton.jit
def _ordered(s, real):
    """Unsigned patterns in the order of the scores; 0 for what is not there. Both zeros are one score."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, ~bits, bits ^ -0x80000000)
    return tl.where(real, order, 0).to(tl.uint32, bitcast=True)


@triton.jit
def _taken(order, K):
    """Which K to take (at least so many are real) and how many are taken before and with each: the largest, and of
    equal ones the first."""
    bar = tl.full((), 0, tl.uint32)
    for i in tl.static_range(16):
        one = bar | (1 << (30 - 2 * i))
        two = bar | (2 << (30 - 2 * i))
        three = bar | (3 << (30 - 2 * i))
        passed = (order >= one).to(tl.int64) + ((order >= two).to(tl.int64) << 20)
        counts = tl.sum(passed + ((order >= three).to(tl.int64) << 40), 0)
        bar = tl.where((counts & 0xFFFFF) >= K, one, bar)
        bar = tl.where(((counts >> 20) & 0xFFFFF) >= K, two, bar)
        bar = tl.where((counts >> 40) >= K, three, bar)
    above = order > bar
    level = order == bar
    room = K - tl.sum(above.to(tl.int32), 0)
    upto = tl.cumsum(above.to(tl.int32) + (level.to(tl.int32) << 16), 0)
    equal = (upto >> 16) & 0xFFFF
    return above | (level & (equal <= room)), (upto & 0xFFFF) + tl.minimum(equal, room)


@triton.jit
def _row(entry, table, slot, PAGES, PER: tl.constexpr, mask):
    page = tl.load(table + slot * PAGES + entry // PER, mask=mask, other=0)
    return page * PER + entry % PER


@triton.jit
def _choose(
    scores, best, out, slots, positions, table, PAGES, ROOM, CHUNKS, K, KB: tl.constexpr, PER: tl.constexpr,
    B: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + t)
    number = tl.where(slot >= 0, (tl.load(positions + t) + 1) // 4, 0)
    if number <= K:
        if chunk == 0:
            rk = tl.arange(0, KB)
            row = _row(rk, table, slot, PAGES, PER, rk < number)
            tl.store(out + t * K + rk, tl.where(rk < number, row, -1), mask=rk < K)
    elif chunk * CHUNK < number:
        at = chunk * CHUNK + tl.arange(0, B)
        s = tl.load(scores + t * ROOM + at, mask=at < number, other=0.0)
        own = tl.minimum(K, number - chunk * CHUNK)
        taken, upto = _taken(_ordered(s, at < number), own)
        if number <= CHUNK:
            tl.store(out + t * K + upto - 1, _row(at, table, slot, PAGES, PER, taken), mask=taken)
        else:
            place = best + (t * CHUNKS + chunk) * K
            tl.store(place + upto - 1, at, mask=taken)
            rk = tl.arange(0, KB)
            tl.store(place + rk, -1, mask=(rk >= own) & (rk < K))


@triton.jit
def _choose_last(
    scores, best, out, slots, positions, table, PAGES, ROOM, CHUNKS, K, PER: tl.constexpr, B: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + t)
    number = tl.where(slot >= 0, (tl.load(positions + t) + 1) // 4, 0)
    if number > tl.maximum(K, CHUNK):
        r = tl.arange(0, B)
        at = tl.load(best + t * CHUNKS * K + r, mask=r < tl.cdiv(number, CHUNK) * K, other=-1)
        s = tl.load(scores + t * ROOM + at, mask=at >= 0, other=0.0)
        taken, upto = _taken(_ordered(s, at >= 0), K)
        tl.store(out + t * K + upto - 1, _row(at, table, slot, PAGES, PER, taken), mask=taken)
