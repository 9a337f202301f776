"""What a prompt reads of the cache, laid end to end, and its indexer: scores on FP8 tensor cores, then an exact choice.

The torch references are in `prefill` (reference 2.8, 4). Scores are made for as many queries at a time as fit into
SCRATCH. Index queries are the columns of a product and keys its rows; a query's score of a key does not know of others.
The choice is a search by halves for the pattern of the k-th largest score in each chunk of CHUNK keys, then among the
best of some chunks, and so on. It is exact for any scores.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, from_e8m0, inverse_pow2, options, power_of_two
from fathom.kernels.stored import BLOCK, Keys, Rows

SCRATCH = 1 << 12 if PLAIN else 1 << 28
"""Scores that are held at a time."""
KEYS = 32 if PLAIN else 128
"""Keys that are scored at a time."""
COLUMNS = 32 if PLAIN else 128
"""Queries times heads of a program."""
TILES = 2 if PLAIN else 16
"""Tiles of keys that a program goes through."""
CHUNK = 64 if PLAIN else 2048
"""Scores that a program chooses among."""
SPARSE = 5 if PLAIN else 12
"""From so many chunks on some are searched first, for a bar that the best of all must reach."""
_WARPS = 8
_EACH = 512
_ALONE, _SETS_BARS, _HAS_BARS = range(3)
_READ = 16
"""Rows or keys that a program reads."""


def read_rows(table: Tensor, rows: Rows, slot: int, first: int, count: int) -> Any:
    """`prefill.read_rows`; NotImplemented for fronts that are no multiple of 64."""
    front = rows.width - rows.rope
    if front % BLOCK:
        return NotImplemented
    out = torch.empty((count, rows.width), dtype=torch.bfloat16, device=table.device)
    if count:
        _read_rows[(triton.cdiv(count, _READ),)](
            rows.data.view(torch.float8_e4m3fn), rows.data.view(torch.bfloat16), rows.scales, table[slot], out, first,
            count, front, power_of_two(front), rows.rope, power_of_two(rows.rope), rows.scales.shape[2], rows.per,
            _READ, PLAIN, **options(out, 4),
        )  # fmt: skip
    return out


def read_keys(table: Tensor, store: Keys, slot: int, count: int) -> Any:
    """`prefill.read_keys`; NotImplemented for key widths that are no power of two."""
    width = store.width
    if width != power_of_two(width):
        return NotImplemented
    data = torch.empty((count, width), dtype=torch.float8_e4m3fn, device=table.device)
    scales = torch.empty(count, dtype=torch.float32, device=table.device)
    if count:
        _read_keys[(triton.cdiv(count, 4 * _READ),)](
            *store.planes, table[slot], data if store.packed else data.view(torch.uint8), scales, count, width,
            store.per, 4 * _READ, store.packed, **options(data, 4),
        )  # fmt: skip
    return data, scales


def select(q: Tensor, weights: Tensor, keys: Tensor, scales: Tensor, start: int, k: int) -> Any:
    """`prefill.select`; NotImplemented for index dims that are no power of two, and for more than 128 heads."""
    count, heads, dim = q.shape
    column = max(power_of_two(heads), 8)
    if dim not in (32, 64, 128) or column > COLUMNS:
        return NotImplemented
    out = torch.empty((count, k), dtype=torch.int32, device=q.device)
    number = min(len(keys), (start + count) // 4)
    room = triton.cdiv(max(number, 1), KEYS) * KEYS
    queries = COLUMNS // column
    together = max(queries, SCRATCH // room // queries * queries)
    scores = torch.empty((min(count, together), room), dtype=torch.float32, device=q.device)
    q, weights = q.contiguous(), weights.float().contiguous()
    for first in range(0, count, together):
        some = slice(first, min(count, first + together))
        if number > k:
            score(q[some], weights[some], keys, scales, start + first, k, scores)
        choose(scores, out[some], start + first, number)
    return out


def score(q: Tensor, weights: Tensor, keys: Tensor, scales: Tensor, start: int, k: int, scores: Tensor) -> None:
    """Scores [T, n] of queries that see more than k keys; what a query does not see may be left out."""
    count, heads, dim = q.shape
    column = max(power_of_two(heads), 8)
    queries, room = COLUMNS // column, scores.shape[1]
    tiles = triton.cdiv(min(room, triton.cdiv(start + count, 4)), KEYS)
    _scores[(triton.cdiv(tiles, TILES), triton.cdiv(count, queries))](
        q, weights, keys, scales, scores, start, count, min(len(keys), room), room // KEYS, k, heads, column, dim,
        queries, KEYS, TILES, PLAIN, **options(q, _WARPS, 3),
    )  # fmt: skip


def choose(scores: Tensor, out: Tensor, start: int, number: int) -> None:
    """Into int32 [T, k]: the k best of scores [T, room], of which a query sees as many as its position says."""
    chunks = triton.cdiv(number, _chunk(out))
    bars = torch.empty(len(out), dtype=torch.int32, device=out.device)
    if chunks < SPARSE:
        _rounds(scores, out, bars, start, number, 1, _ALONE)
        return
    # The k-th best score of some chunks: few reach it, so that most chunks need not be searched.
    _rounds(scores, out, bars, start, number, chunks // 4, _SETS_BARS)
    _rounds(scores, out, bars, start, number, 1, _HAS_BARS)


def _rounds(scores: Tensor, out: Tensor, bars: Tensor, start: int, number: int, every: int, mode: int) -> None:
    """The best of every so many chunks, of the best of some chunks, and so on."""
    count, k = out.shape
    block = _chunk(out)
    merged = block // k
    before, lists, span, given = 0, triton.cdiv(max(number, 1), block * every), 0, out
    while True:
        best = out if lists == 1 else torch.empty((count, lists, k), dtype=torch.int32, device=out.device)
        size = block if span or every > 1 else min(block, max(power_of_two(number), 128))
        _choose[(lists, count)](
            scores, given, best, out, bars, start, number, scores.shape[1] // KEYS, before, lists, span, every, k,
            power_of_two(k), KEYS, size, merged, span == 0, mode, **options(scores, _warps(size)),
        )  # fmt: skip
        if lists == 1:
            return
        span, given = span * merged if span else block * every, best
        before, lists = lists, triton.cdiv(lists, merged)


def _chunk(out: Tensor) -> int:
    return max(CHUNK, 2 * power_of_two(out.shape[1]))


def _warps(block: int) -> int:
    return 1 if PLAIN else min(16, max(2, block // _EACH))


@triton.jit(do_not_specialize=["FIRST", "COUNT"])
def _read_rows(
    codes, rope, scales, table, out, FIRST, COUNT, FRONT: tl.constexpr, FB: tl.constexpr, ROPE: tl.constexpr,
    RB: tl.constexpr, S: tl.constexpr, PER: tl.constexpr, B: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * B + tl.arange(0, B)
    real = n < COUNT
    rc, rr, rs = tl.arange(0, FB), tl.arange(0, RB), tl.arange(0, FB // 64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    page = tl.load(table + (FIRST + n) // PER, mask=real, other=0).to(tl.int64)
    row = page * PER + (FIRST + n) % PER
    front = real[:, None] & (rc < FRONT)[None, :]
    code = tl.load(codes + row[:, None] * (FRONT + 2 * ROPE) + rc[None, :], mask=front, other=0.0).to(tl.float32)
    power = tl.load(scales + row[:, None] * S + rs[None, :], mask=real[:, None] & (rs * 64 < FRONT)[None, :], other=0)
    values = tl.reshape(tl.reshape(code, (B, FB // 64, 64)) * from_e8m0(power)[:, :, None], (B, FB))
    place = out + n.to(tl.int64)[:, None] * (FRONT + ROPE)
    tl.store(place + rc[None, :], values.to(tl.bfloat16), mask=front)
    back = real[:, None] & (rr < ROPE)[None, :]
    end = tl.load(rope + row[:, None] * (FRONT // 2 + ROPE) + FRONT // 2 + rr[None, :], mask=back, other=0.0)
    tl.store(place + FRONT + rr[None, :], end, mask=back)


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


@triton.jit(do_not_specialize=["COUNT"])
def _read_keys(
    data, scales, table, out, out_scales, COUNT, D: tl.constexpr, PER: tl.constexpr, B: tl.constexpr,
    PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * B + tl.arange(0, B)
    real = n < COUNT
    rd = tl.arange(0, D)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    page = tl.load(table + n // PER, mask=real, other=0).to(tl.int64)
    row = page * PER + n % PER
    place = out + n.to(tl.int64)[:, None] * D + rd[None, :]
    if PACKED:
        rh, rs = tl.arange(0, D // 2), tl.arange(0, D // 32)
        code = tl.load(data + row[:, None] * (D // 2) + rh[None, :], mask=real[:, None], other=0).to(tl.int32)
        scale = from_e8m0(tl.load(scales + row[:, None] * (D // 32) + rs[None, :], mask=real[:, None], other=127))
        x = tl.reshape(tl.join(_e2m1(code & 15), _e2m1(code >> 4)), (B, D // 32, 32))
        x = tl.reshape(x * scale[:, :, None], (B, D))
        one = _one_scale(x)
        tl.store(place, (x * inverse_pow2(one)[:, None]).to(tl.float8e4nv), mask=real[:, None])
    else:
        tl.store(place, tl.load(data + row[:, None] * D + rd[None, :], mask=real[:, None], other=0), mask=real[:, None])
        one = tl.load(scales + row, mask=real, other=1.0)
    tl.store(out_scales + n, one, mask=real)


@triton.jit(do_not_specialize=["START", "T", "NUMBER", "ROOM", "TOPK"])
def _scores(
    q, weights, keys, scales, scores, START, T, NUMBER, ROOM, TOPK, H, HB: tl.constexpr, D: tl.constexpr,
    Q: tl.constexpr, B: tl.constexpr, TILES: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * Q
    column = tl.arange(0, Q * HB)
    t, head = first + column // HB, column % HB
    real = (t < T) & (head < H)
    rd, rq, r = tl.arange(0, D), tl.arange(0, Q), tl.arange(0, B)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # The last query of the program sees most.
    number = tl.minimum((START + tl.minimum(first + Q, T)) // 4, NUMBER)
    begin = tl.program_id(0) * TILES * B
    if (number > TOPK) & (begin < number):
        row = t * H + head
        x = tl.load(q + row.to(tl.int64)[:, None] * D + rd[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        one = _one_scale(x)
        w = tl.load(weights + row, mask=real, other=0.0) * one
        x = x * inverse_pow2(one)[:, None]
        if not PLAIN:
            x = x.to(tl.float8e4nv)
        x = tl.trans(x)
        place = scores + (first + rq).to(tl.int64)[:, None] * (ROOM * B)
        for tile in range(begin, tl.minimum(begin + TILES * B, number), B):
            at = tile + r
            seen = at < number
            k = tl.load(keys + at[:, None] * D + rd[None, :], mask=seen[:, None], other=0.0)
            if PLAIN:
                k = k.to(tl.float32)
            dots = tl.maximum(tl.dot(k, x, input_precision="ieee"), 0.0) * w[None, :]
            score = tl.sum(tl.reshape(dots, (B, Q, HB)), 2) * tl.load(scales + at, mask=seen, other=0.0)[:, None]
            tl.store(place + at[None, :], tl.trans(score), mask=(first + rq < T)[:, None])


@triton.jit
def _ordered(s, real):
    """Patterns in the order of the scores, the least where there is none. Both zeros are one score."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return tl.where(real, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -0x80000000)


@triton.jit
def _taken(order, real, K):
    """Which K to take (at least so many are real), how many are taken before and with each, and the least pattern that
    is taken: the largest, and of equal ones the first."""
    low = tl.min(tl.where(real, order, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(order, 0).to(tl.int64) + 1
    count = tl.sum(real.to(tl.int32), 0)
    # At least K are not below `low`, fewer not below `high`; done when that is exact, or nothing lies between.
    while (count != K) & (high - low > 1):
        middle = (low + high) >> 1
        passed = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), 0)
        enough = passed >= K
        count = tl.where(enough, passed, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    taken = real & (order >= low.to(tl.int32))
    if count > K:
        level = real & (order == low.to(tl.int32))
        room = K - count + tl.sum(level.to(tl.int32), 0)
        taken = taken & ((order > low.to(tl.int32)) | (tl.cumsum(level.to(tl.int32), 0) <= room))
    return taken, tl.cumsum(taken.to(tl.int32), 0), low.to(tl.int32)


@triton.jit(do_not_specialize=["START", "NUMBER", "ROOM", "BEFORE", "LISTS", "SPAN", "EVERY"])
def _choose(
    scores, given, best, out, bars, START, NUMBER, ROOM, BEFORE, LISTS, SPAN, EVERY, K, KB: tl.constexpr,
    KEYS: tl.constexpr, B: tl.constexpr, MERGED: tl.constexpr, FIRST: tl.constexpr, MODE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The best of B scores of EVERY times as many, or (not FIRST) of MERGED lists of the best of SPAN entries each."""
    part = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    r, rk = tl.arange(0, B), tl.arange(0, KB)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.minimum((START + tl.program_id(1) + 1) // 4, NUMBER)
    if FIRST:
        most = B * EVERY
        some = (number > K) & (part * most < number)
        if (number <= K) & (part == 0):
            tl.store(out + t * K + rk, tl.where(rk < number, rk, -1), mask=rk < K)
    else:
        most = MERGED * SPAN
        some = (number > tl.maximum(SPAN, K)) & (part * most < number)
    if some:
        if FIRST:
            at = part * most + r
            real = at < number
        else:
            place = part * MERGED * K + r
            there = (r < MERGED * K) & (place < tl.cdiv(number, SPAN) * K)
            at = tl.load(given + t * BEFORE * K + place, mask=there, other=-1)
            real = at >= 0
        order = _ordered(tl.load(scores + t * (ROOM * KEYS) + at, mask=real, other=0.0), real)
        if FIRST and MODE == 2:
            real = real & (order >= tl.load(bars + t))
        own = tl.minimum(K, tl.sum(real.to(tl.int32), 0))
        to = best + (t * LISTS + part) * K
        if number <= most:
            to = out + t * K
        if own > 0:
            taken, upto, bar = _taken(order, real, own)
            tl.store(to + upto - 1, at, mask=taken)
            if MODE == 1:
                if number <= most:
                    tl.store(bars + t, bar)
        tl.store(to + rk, -1, mask=(rk >= own) & (rk < K))
