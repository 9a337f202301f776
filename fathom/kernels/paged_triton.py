"""Attention of one new token a sequence over paged memory, all sequences of a step at once. Reference 2.5 to 2.9, 5.1.

The reference is `model.attention` tile by tile; here positions, slots and page tables are device tensors, so that a
step can be captured in a CUDA graph. Names: B sequences, S slots, H heads, C head dim, P = rope dims / 2. Every token
is computed as if it were alone: fixed blocks of rows, sums in one order, whatever the batch and wherever the pages are.

Rows are stored as the model computes with them (BF16 values on the FP8 or FP4 grid); scores and sums are float32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, fp8_scale, inverse_pow2, operand, options, power_of_two, round_e4m3

ROWS = 32
"""Rows that a program of `attend` looks at: what a token's sums are cut into, at any context."""
KEYS = 128
"""Index keys that a program scores."""
MOST_KEYS = 32768
"""Keys that one program can choose among; above, torch does."""
_HEADS = 16


@dataclass(frozen=True)
class Where:
    """Whose tokens these are: slots and positions int32 [B]; table int32 [S, M], the pages of each slot's sequence."""

    slots: Tensor
    positions: Tensor
    table: Tensor


@dataclass(frozen=True)
class Ring:
    """Recent rows of the slots: rows [S, R, W], the first of slot s at position base[s] (int32 [S])."""

    rows: Tensor
    base: Tensor


def keep(kv: Tensor, weight: Tensor, turn: Tensor, ring: Ring, where: Where, eps: float, quantize: bool) -> None:
    """Norm, rotate and round kv [B, C] BF16 and keep it as the row of its position. turn float32 [B, P, 2]."""
    tokens, width = kv.shape
    _keep[(tokens,)](
        kv, weight, turn, ring.rows, ring.base, where.slots, where.positions, ring.rows.stride(0), width, width // 2,
        turn.shape[1], eps, quantize, **options(kv, 4),
    )  # fmt: skip


def compress(
    projected: Tensor, ape: Tensor, weight: Tensor, turn: Tensor, tail: Ring, store: Tensor, where: Where, ratio: int,
    eps: float, quantize: bool, mixer: Tensor | None = None,
) -> None:  # fmt: skip
    """Keep a token's values and gates; where it closes its block, pool the block and store the entry.

    projected float32 [B, 2W], values then gates; ape float32 [ratio, W]; weight [D] of the norm; turn [B, P, 2] of the
    block's first position; store [pages, entries a page, D]; mixer: the Hadamard matrix [D, D], which makes it a key.
    """
    tokens, dim = projected.shape[0], store.shape[2]
    _compress[(tokens,)](
        projected, ape, weight, turn, tail.rows, tail.base, store, where.slots, where.positions, where.table,
        weight if mixer is None else mixer, tail.rows.stride(0), where.table.shape[1], projected.shape[1] // 2, dim,
        dim // 2, turn.shape[1], ratio, store.shape[1], 8 if ratio == 4 else 16, eps, quantize, mixer is not None,
        **options(projected, 4),
    )  # fmt: skip


def queries(q: Tensor, turn: Tensor, eps: float) -> Tensor:
    """Queries [B, H, C] BF16 normalised a head and rotated."""
    out = torch.empty_like(q)
    heads, width = q.shape[1:]
    _queries[(q.shape[0] * heads,)](
        q, q, turn, out, heads, width, width // 2, turn.shape[1], eps, True, False, **options(q, 4)
    )
    return out


def index_queries(q: Tensor, turn: Tensor, mixer: Tensor | None) -> Tensor:
    """Index queries [B, h, d] BF16 rotated, mixed by the Hadamard matrix and rounded to FP4."""
    out = torch.empty_like(q)
    heads, width = q.shape[1:]
    _queries[(q.shape[0] * heads,)](
        q, q if mixer is None else mixer, turn, out, heads, width, width // 2, turn.shape[1], 0.0, False,
        mixer is not None, **options(q, 4),
    )  # fmt: skip
    return out


def select(q: Tensor, weights: Tensor, keys: Tensor, where: Where, k: int, most: int) -> Tensor:
    """The k best entries of each token, int32 [B, k] in order, -1 behind the last; all while there are no more than k.

    q BF16 [B, h, d], weights float32 [B, h], keys [pages, 32, d]; most: entries that a sequence can have. Equal scores
    go to the lower entry.
    """
    tokens, heads, dim = q.shape
    room = max(KEYS, power_of_two(most))
    scores = torch.empty((tokens, room), dtype=torch.float32, device=q.device)
    _scores[(triton.cdiv(room, KEYS), tokens)](
        q, weights, keys, where.slots, where.positions, where.table, scores, where.table.shape[1], room, k, heads,
        max(16, power_of_two(heads)), dim,
        keys.shape[1], KEYS, PLAIN, **options(q, 4),
    )  # fmt: skip
    if room > MOST_KEYS:
        best = scores.topk(k, -1)
        return torch.where(best.values > float("-inf"), best.indices, -1).int()
    chosen = torch.empty((tokens, k), dtype=torch.int32, device=q.device)
    warps = 4 if room <= 2048 else 8 if room <= 8192 else 16
    _choose[(tokens,)](scores, chosen, room, k, power_of_two(k), **options(q, warps))
    return chosen


def attend(
    q: Tensor, ring: Ring, entries: Tensor | None, chosen: Tensor | None, sink: Tensor, turn: Tensor, where: Where,
    ratio: int, window: int, most: int,
) -> Tensor:  # fmt: skip
    """Attention of q [B, H, C] over the window, the entries (those `chosen` [B, k], or all that are closed) and a sink,
    rotated back: BF16 [B, H, C]. most: entries that a sequence can have."""
    tokens, heads, width = q.shape
    number = 0 if entries is None else most if chosen is None else chosen.shape[1]
    splits = triton.cdiv(window, ROWS) + triton.cdiv(number, ROWS)
    parts = torch.empty((tokens, splits, heads, width), dtype=torch.float32, device=q.device)
    sums = torch.empty((tokens, splits, heads, 2), dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    held = ring.rows if entries is None else entries
    _attend[(splits, triton.cdiv(heads, _HEADS), tokens)](
        q, ring.rows, ring.base, held, q if chosen is None else chosen, where.slots, where.positions, where.table,
        parts, sums, ring.rows.stride(0), where.table.shape[1], heads, splits, number, width**-0.5, width, window,
        ratio, held.shape[1], ROWS, _HEADS, chosen is not None, PLAIN, **options(q, 4),
    )  # fmt: skip
    _combine[(heads, tokens)](
        parts, sums, sink, turn, where.positions, out, heads, splits, number, width, width // 2, turn.shape[1], window,
        ratio, ROWS, chosen is not None, **options(q, 4),
    )  # fmt: skip
    return out


@triton.jit
def _bf16(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _rotated(even, odd, turn, pairs, HALF: tl.constexpr, P: tl.constexpr, BACK: tl.constexpr):
    """The last P pairs of a vector turned, rounded to BF16."""
    at = pairs - (HALF - P)
    c = tl.load(turn + 2 * at, mask=at >= 0, other=1.0)
    s = tl.load(turn + 2 * at + 1, mask=at >= 0, other=0.0)
    if BACK:
        s = -s
    return _bf16(even * c - odd * s), _bf16(even * s + odd * c)


@triton.jit
def _on_grid(even, odd, HALF: tl.constexpr, P: tl.constexpr):
    """All but the last P pairs on the e4m3 grid of their 64 values' scale."""
    e = tl.reshape(even, (HALF // 32, 32))
    o = tl.reshape(odd, (HALF // 32, 32))
    scale = fp8_scale(tl.maximum(tl.max(tl.abs(e), 1), tl.max(tl.abs(o), 1)))[:, None]
    front = (tl.arange(0, HALF // 32) < (HALF - P) // 32)[:, None]
    e = tl.where(front, round_e4m3(e * inverse_pow2(scale)) * scale, e)
    o = tl.where(front, round_e4m3(o * inverse_pow2(scale)) * scale, o)
    return tl.reshape(e, (HALF,)), tl.reshape(o, (HALF,))


@triton.jit
def _round_e2m1(y):
    size = tl.abs(y)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    whole = (y / step + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(whole * step, -6.0), 6.0)


@triton.jit
def _mixed(even, odd, mixer, pairs, HALF: tl.constexpr):
    """The vector times the Hadamard matrix, then on the e2m1 grid of each 32 values' scale."""
    D: tl.constexpr = 2 * HALF
    top = mixer + (2 * pairs)[:, None] * D + (2 * pairs)[None, :]
    e = tl.sum(even[:, None] * tl.load(top).to(tl.float32) + odd[:, None] * tl.load(top + D).to(tl.float32), 0)
    o = tl.sum(even[:, None] * tl.load(top + 1).to(tl.float32) + odd[:, None] * tl.load(top + D + 1).to(tl.float32), 0)
    e = tl.reshape(_bf16(e), (HALF // 16, 16))
    o = tl.reshape(_bf16(o), (HALF // 16, 16))
    amax = tl.maximum(tl.max(tl.abs(e), 1), tl.max(tl.abs(o), 1))
    ratio = tl.div_rn(tl.maximum(amax, 7.052966104933725e-38), 6.0 + tl.zeros_like(amax))
    scale = ((ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)[:, None]
    e = _round_e2m1(e * inverse_pow2(scale)) * scale
    o = _round_e2m1(o * inverse_pow2(scale)) * scale
    return tl.reshape(e, (HALF,)), tl.reshape(o, (HALF,))


@triton.jit
def _normed(even, odd, D: tl.constexpr, EPS):
    factor = 1.0 / tl.sqrt_rn(tl.sum(even * even + odd * odd, 0) / D + EPS)
    return even * factor, odd * factor


@triton.jit
def _keep(
    kv, weight, turn, rows, base, slots, positions, SLOT, D: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, EPS,
    QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    pairs = tl.arange(0, HALF)
    we = tl.load(weight + 2 * pairs).to(tl.float32)
    wo = tl.load(weight + 2 * pairs + 1).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    even = tl.load(kv + b * D + 2 * pairs).to(tl.float32)
    odd = tl.load(kv + b * D + 2 * pairs + 1).to(tl.float32)
    even, odd = _normed(even, odd, D, EPS)
    even, odd = _rotated(_bf16(even * we), _bf16(odd * wo), turn + b * 2 * P, pairs, HALF, P, False)
    if QUANTIZE:
        even, odd = _on_grid(even, odd, HALF, P)
    slot = tl.load(slots + b)
    row = rows + slot.to(tl.int64) * SLOT + (tl.load(positions + b) - tl.load(base + slot)) * D
    tl.store(row + 2 * pairs, even.to(rows.dtype.element_ty))
    tl.store(row + 2 * pairs + 1, odd.to(rows.dtype.element_ty))


@triton.jit
def _pooled(tail, item, first, last, column, W, value, gate, STEP: tl.constexpr):
    """The online softmax of one new item (value, gate) with the rows first .. last - 1 of `tail` at `column`."""
    top = gate
    total = tl.exp(gate - top)
    acc = value * total
    r = tl.arange(0, STEP)
    at = first
    while at < last:
        place = tail + (at + r)[:, None] * item + column[None, :]
        inside = (at + r < last)[:, None]
        g = tl.load(place + W, mask=inside, other=float("-inf"))
        v = tl.load(place, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(g, 0))
        shrink = tl.exp(top - new)
        share = tl.exp(g - new[None, :])
        total = total * shrink + tl.sum(share, 0)
        acc = acc * shrink + tl.sum(share * v, 0)
        top = new
        at += STEP
    return acc, total, top


@triton.jit
def _entry(
    tail, own, bias, turn_at, slot_at, W, D: tl.constexpr, HALF: tl.constexpr, RATIO: tl.constexpr, STEP: tl.constexpr,
    block, pairs, PARITY: tl.constexpr,
):  # fmt: skip
    """The pooled value of every second channel (from PARITY on) of the block that this token closes."""
    column = 2 * pairs + PARITY
    high = column + (D if RATIO == 4 else 0)
    value = tl.load(own + high)
    gate = tl.load(own + W + high) + tl.load(bias + high)
    first = block * RATIO - slot_at
    acc, total, top = _pooled(tail, 2 * W, first, first + RATIO - 1, high, W, value, gate, STEP)
    if RATIO == 4:
        at = tl.arange(0, 4)
        place = tail + (first - 4 + at)[:, None] * (2 * W) + column[None, :]
        inside = (at >= 0)[:, None] & (block > 0)
        g = tl.load(place + W, mask=inside, other=float("-inf"))
        v = tl.load(place, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(g, 0))
        shrink = tl.exp(top - new)
        share = tl.exp(g - new[None, :])
        total = total * shrink + tl.sum(share, 0)
        acc = acc * shrink + tl.sum(share * v, 0)
    return acc / total


@triton.jit
def _compress(
    projected, ape, weight, turn, tails, base, store, slots, positions, table, mixer, SLOT, PAGES, W, D: tl.constexpr,
    HALF: tl.constexpr, P: tl.constexpr, RATIO: tl.constexpr, PER: tl.constexpr, STEP: tl.constexpr, EPS,
    QUANTIZE: tl.constexpr, KEY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    pairs = tl.arange(0, HALF)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + b)
    position = tl.load(positions + b)
    start = tl.load(base + slot)
    own = projected + b * 2 * W
    bias = ape + (position % RATIO) * W
    tail = tails + slot.to(tl.int64) * SLOT
    row = tail + (position - start) * (2 * W)
    COUNT: tl.constexpr = 2 if RATIO == 4 else 1
    for half in tl.static_range(COUNT):
        r = half * D + tl.arange(0, D)
        tl.store(row + r, tl.load(own + r))
        tl.store(row + W + r, tl.load(own + W + r) + tl.load(bias + r))
    if (position + 1) % RATIO == 0:
        block = position // RATIO
        even = _entry(tail, own, bias, turn, start, W, D, HALF, RATIO, STEP, block, pairs, 0)
        odd = _entry(tail, own, bias, turn, start, W, D, HALF, RATIO, STEP, block, pairs, 1)
        even, odd = _normed(_bf16(even), _bf16(odd), D, EPS)
        even = _bf16(even * tl.load(weight + 2 * pairs).to(tl.float32))
        odd = _bf16(odd * tl.load(weight + 2 * pairs + 1).to(tl.float32))
        even, odd = _rotated(even, odd, turn + b * 2 * P, pairs, HALF, P, False)
        if KEY:
            even, odd = _mixed(even, odd, mixer, pairs, HALF)
        elif QUANTIZE:
            even, odd = _on_grid(even, odd, HALF, P)
        page = tl.load(table + slot * PAGES + block // PER).to(tl.int64)
        entry = store + (page * PER + block % PER) * D
        tl.store(entry + 2 * pairs, even.to(store.dtype.element_ty))
        tl.store(entry + 2 * pairs + 1, odd.to(store.dtype.element_ty))


@triton.jit
def _queries(
    q, mixer, turn, out, H, D: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, EPS, NORM: tl.constexpr,
    KEY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    pairs = tl.arange(0, HALF)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    even = tl.load(q + row * D + 2 * pairs).to(tl.float32)
    odd = tl.load(q + row * D + 2 * pairs + 1).to(tl.float32)
    if NORM:
        even, odd = _normed(even, odd, D, EPS)
        even = _bf16(even)
        odd = _bf16(odd)
    even, odd = _rotated(even, odd, turn + (row // H) * 2 * P, pairs, HALF, P, False)
    if KEY:
        even, odd = _mixed(even, odd, mixer, pairs, HALF)
    tl.store(out + row * D + 2 * pairs, even.to(out.dtype.element_ty))
    tl.store(out + row * D + 2 * pairs + 1, odd.to(out.dtype.element_ty))


@triton.jit
def _scores(
    q, weights, keys, slots, positions, table, scores, PAGES, ROOM, TOPK, H, HB: tl.constexpr, D: tl.constexpr,
    PER: tl.constexpr, B: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1)
    at = tl.program_id(0) * B + tl.arange(0, B)
    rh = tl.arange(0, HB)
    rd = tl.arange(0, D)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + t)
    number = (tl.load(positions + t) + 1) // 4
    out = scores + t.to(tl.int64) * ROOM + at
    if (number > TOPK) & (tl.program_id(0) * B < number):
        seen = at < number
        page = tl.load(table + slot * PAGES + at // PER, mask=seen, other=0).to(tl.int64)
        k = tl.load(keys + (page * PER + at % PER)[:, None] * D + rd[None, :], mask=seen[:, None], other=0.0)
        x = tl.load(q + (t * H + rh)[:, None] * D + rd[None, :], mask=(rh < H)[:, None], other=0.0)
        dots = tl.dot(operand(k, PLAIN), tl.trans(operand(x, PLAIN)), input_precision="ieee")
        w = tl.load(weights + t * H + rh, mask=rh < H, other=0.0)
        score = tl.sum(tl.maximum(dots, 0.0) * w[None, :], 1)
        tl.store(out, tl.where(seen, score, float("-inf")))
    else:
        tl.store(out, tl.where(at < number, 0.0, float("-inf")))


@triton.jit
def _choose(scores, chosen, ROOM: tl.constexpr, TOPK, KB: tl.constexpr, PDL: tl.constexpr):
    """The k-th largest score by halving its bit pattern's range, then those above it and the first of its equals."""
    t = tl.program_id(0)
    r = tl.arange(0, ROOM)
    rk = tl.arange(0, KB)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    s = tl.load(scores + t.to(tl.int64) * ROOM + r)
    bits = s.to(tl.int32, bitcast=True)
    bits = tl.where(s == 0.0, 0, bits)  # both zeros are one score
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    real = s > float("-inf")
    low = tl.min(tl.where(real, order, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(real, order, -0x7FFFFFFF), 0).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum((real & (order >= middle.to(tl.int32))).to(tl.int32), 0) >= TOPK
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    bar = low.to(tl.int32)
    above = real & (order > bar)
    level = real & (order == bar)
    room = TOPK - tl.sum(above.to(tl.int32), 0)
    taken = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen + t * TOPK + place, r, mask=taken)
    tl.store(chosen + t * TOPK + rk, -1, mask=(rk >= tl.sum(taken.to(tl.int32), 0)) & (rk < TOPK))


@triton.jit
def _attend(
    q, rows, base, entries, chosen, slots, positions, table, parts, sums, SLOT, PAGES, H, SPLITS, NUMBER, SCALE,
    C: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr, PER: tl.constexpr, B: tl.constexpr, HB: tl.constexpr,
    CHOSEN: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    t = tl.program_id(2)
    heads = tl.program_id(1) * HB + tl.arange(0, HB)
    rc = tl.arange(0, C)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slots + t)
    position = tl.load(positions + t)
    WINDOWS: tl.constexpr = (WINDOW + B - 1) // B
    j = split * B + tl.arange(0, B)
    if split < WINDOWS:
        at = position - WINDOW + 1 + j
        seen = (at >= 0) & (j < WINDOW)
        pointer = rows + slot.to(tl.int64) * SLOT + (at - tl.load(base + slot)) * C
    else:
        j = j - WINDOWS * B
        seen = (j < NUMBER) & (j < (position + 1) // RATIO)
        e = j
        if CHOSEN:
            e = tl.load(chosen + t * NUMBER + j, mask=j < NUMBER, other=-1)
            seen = e >= 0
        page = tl.load(table + slot * PAGES + e // PER, mask=seen, other=0).to(tl.int64)
        pointer = entries + (page * PER + e % PER) * C
    place = (t.to(tl.int64) * SPLITS + split) * H + heads
    inside = heads < H
    if tl.max(seen.to(tl.int32), 0) > 0:
        x = tl.load(q + (t * H + heads)[:, None] * C + rc[None, :], mask=inside[:, None], other=0.0)
        k = tl.load(pointer[:, None] + rc[None, :], mask=seen[:, None], other=0.0)
        logits = tl.dot(operand(x, PLAIN), tl.trans(operand(k, PLAIN)), input_precision="ieee") * SCALE
        logits = tl.where(seen[None, :], logits, float("-inf"))
        top = tl.max(logits, 1)
        p = tl.exp(logits - top[:, None])
        total = tl.sum(p, 1)
        p = operand(p.to(tl.bfloat16), PLAIN)
        acc = tl.dot(p, operand(k, PLAIN), input_precision="ieee")
        tl.store(sums + 2 * place, top, mask=inside)
        tl.store(sums + 2 * place + 1, total, mask=inside)
        tl.store(parts + place[:, None] * C + rc[None, :], acc, mask=inside[:, None])


@triton.jit
def _combine(
    parts, sums, sink, turn, positions, out, H, SPLITS, NUMBER, C: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
    WINDOW: tl.constexpr, RATIO: tl.constexpr, B: tl.constexpr, CHOSEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The splits that had rows, in order, four at a time; then the sink."""
    h = tl.program_id(0)
    t = tl.program_id(1)
    pairs = tl.arange(0, HALF)
    bar = tl.load(sink + h)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions + t)
    WINDOWS: tl.constexpr = (WINDOW + B - 1) // B
    # Of the window the last blocks have rows; of the entries the first ones.
    first = tl.maximum(WINDOW - 1 - position, 0) // B
    number = 0
    if RATIO > 0:
        number = tl.minimum((position + 1) // RATIO, NUMBER)
    last = WINDOWS + (number + B - 1) // B
    top = bar
    total = 1.0
    even = tl.zeros((HALF,), tl.float32)
    odd = tl.zeros((HALF,), tl.float32)
    rs = tl.arange(0, 4)
    s = first
    while s < last:
        place = (t.to(tl.int64) * SPLITS + s + rs) * H + h
        inside = s + rs < last
        m = tl.load(sums + 2 * place, mask=inside, other=float("-inf"))
        n = tl.load(sums + 2 * place + 1, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        shrink = tl.exp(top - new)
        share = tl.exp(m - new)
        total = total * shrink + tl.sum(share * n, 0)
        row = parts + place[:, None] * C + 2 * pairs[None, :]
        even = even * shrink + tl.sum(share[:, None] * tl.load(row, mask=inside[:, None], other=0.0), 0)
        odd = odd * shrink + tl.sum(share[:, None] * tl.load(row + 1, mask=inside[:, None], other=0.0), 0)
        top = new
        s += 4
    even, odd = _rotated(_bf16(even / total), _bf16(odd / total), turn + t * 2 * P, pairs, HALF, P, True)
    to = out + (t * H + h) * C + 2 * pairs
    tl.store(to, even.to(out.dtype.element_ty))
    tl.store(to + 1, odd.to(out.dtype.element_ty))
