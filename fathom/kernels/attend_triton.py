"""Attention of a decode step over stored rows, split over blocks of them. Reference 2.6, 2.9.

The torch reference is `decode.attend`. How a token's rows are split depends on its position alone, and the parts are
summed in one order, so its bits depend neither on the batch nor on the longest sequence that is allowed: the window in
blocks of 32 rows, what the indexer chose likewise, all closed entries in at most 32 splits of a multiple of 32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels import attend_cuda
from fathom.kernels.common_triton import PLAIN, from_e8m0, operand, options, power_of_two
from fathom.kernels.decode import Memory, Tokens
from fathom.kernels.stored import BLOCK
from fathom.kernels.stored_triton import turn_of, turned

ROWS = 16 if PLAIN else 32
"""Rows that a program looks at together."""
SPLITS = 4 if PLAIN else 32
"""Splits of all closed entries, at most."""
_HEADS = 16
_COLUMNS = 128
"""Columns that a program of the second launch sums up."""


def attend(q: Tensor, sink: Tensor, tokens: Tokens, memory: Memory, most: int, chosen: Tensor | None = None) -> Any:
    """`decode.attend`; NotImplemented for other types than BF16 and for fronts that are no multiple of 64."""
    if attend_cuda.has(q, memory):
        return attend_cuda.attend(q, sink, tokens, memory, most, chosen)
    count, heads, width = q.shape
    rope = memory.window.rope
    if q.dtype != torch.bfloat16 or (width - rope) % BLOCK or _COLUMNS % rope or width % rope:
        return NotImplemented
    windows, number, splits = _splits(memory, most, chosen)
    parts = torch.empty((count, windows + splits, heads, width), dtype=torch.float32, device=q.device)
    sums = torch.empty((count, windows + splits, heads, 2), dtype=torch.float32, device=q.device)
    out = torch.empty((count, heads, width), dtype=q.dtype, device=q.device)
    held = memory.window if memory.entries is None else memory.entries
    ratio = memory.ratio
    _attend[(windows + splits, triton.cdiv(heads, _HEADS), count)](
        q.contiguous(), *_planes(memory.window), *_planes(held), tokens.slots if chosen is None else chosen,
        tokens.slots, tokens.positions, memory.table, parts, sums, memory.table.shape[1], heads, windows + splits,
        number, width**-0.5, width, power_of_two(width), rope, memory.span, memory.window.per, ratio, held.per, ROWS,
        SPLITS, _HEADS, chosen is not None, PLAIN, not PLAIN and torch.cuda.get_device_capability(q.device)[0] >= 9,
        **options(q, 4),
    )  # fmt: skip
    _combine[(triton.cdiv(width, _COLUMNS), heads, count)](
        parts, sums, sink, tokens.turn(ratio), tokens.slots, tokens.positions, out, heads, windows + splits, number,
        width, rope, memory.span, ratio, ROWS, SPLITS, _padded(windows, chosen), chosen is not None, _COLUMNS,
        **options(q, 4, early=False),
    )  # fmt: skip
    return out


def _splits(memory: Memory, most: int, chosen: Tensor | None) -> tuple[int, int, int]:
    """Splits of the window, entries at most, their splits."""
    windows = triton.cdiv(memory.span, ROWS)
    if chosen is not None:
        return windows, chosen.shape[1], triton.cdiv(chosen.shape[1], ROWS)
    number = most // memory.ratio if memory.ratio else 0
    return windows, number, min(SPLITS, triton.cdiv(number, ROWS))


def _padded(windows: int, chosen: Tensor | None) -> int:
    """Room for all splits that there can be: the order of a sum must not depend on how many there are."""
    return power_of_two(windows + (SPLITS if chosen is None else triton.cdiv(chosen.shape[1], ROWS)))


def _planes(rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    return rows.data.view(torch.float8_e4m3fn), rows.data.view(torch.bfloat16), rows.scales


@triton.jit
def _entries(position, slot, NUMBER, RATIO: tl.constexpr, CHOSEN: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr):
    """How many entries the token sees, and how many blocks of them make a split."""
    number = 0
    if RATIO > 0:
        number = tl.where(slot >= 0, tl.minimum((position + 1) // RATIO, NUMBER), 0)
    if CHOSEN:
        return number, 1
    else:
        return number, tl.maximum(tl.cdiv(number, B * SPLITS), 1)


@triton.jit
def _rows(
    row, seen, codes, rope, scales, C: tl.constexpr, CB: tl.constexpr, ROPE: tl.constexpr, B: tl.constexpr,
    PLAIN: tl.constexpr, HOPPER: tl.constexpr,
):  # fmt: skip
    """Stored rows as they are multiplied: [B, CB]. Before Hopper there is no way from e4m3 to BF16 but float32."""
    FRONT: tl.constexpr = C - ROPE
    PADDED: tl.constexpr = (FRONT + 511) // 512 * 8
    rc = tl.arange(0, CB)
    rs = tl.arange(0, CB // 64)
    front = seen[:, None] & (rc < FRONT)[None, :]
    code = tl.load(codes + row[:, None] * (FRONT + 2 * ROPE) + rc[None, :], mask=front, other=0.0)
    scale = tl.load(
        scales + row[:, None] * PADDED + rs[None, :], mask=seen[:, None] & (rs * 64 < FRONT)[None, :], other=0
    )
    back = seen[:, None] & ((rc >= FRONT) & (rc < C))[None, :]
    place = rope + row[:, None] * (FRONT // 2 + ROPE) + (FRONT // 2 - FRONT) + rc[None, :]
    end = operand(tl.load(place, mask=back, other=0.0), PLAIN)
    if PLAIN:
        values = tl.reshape(code.to(tl.float32), (B, CB // 64, 64)) * from_e8m0(scale)[:, :, None]
    else:
        power = (scale.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True)
        exact = code if HOPPER else code.to(tl.float32)
        values = tl.reshape(exact.to(tl.bfloat16), (B, CB // 64, 64)) * power[:, :, None]
    return tl.where((rc < FRONT)[None, :], tl.reshape(values, (B, CB)), end)


@triton.jit
def _look(x, k, seen, top, total, acc, SCALE, PLAIN: tl.constexpr):
    """Online softmax over rows: B more."""
    logits = tl.dot(x, tl.trans(k), input_precision="ieee") * SCALE
    logits = tl.where(seen[None, :], logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, 1))
    shrink = tl.exp(top - new)
    p = tl.exp(logits - new[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(operand(p.to(tl.bfloat16), PLAIN), k, acc * shrink[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit
def _attend(
    q, wcodes, wrope, wscales, ecodes, erope, escales, chosen, slots, positions, table, parts, sums, PAGES, H, PARTS,
    NUMBER, SCALE, C: tl.constexpr, CB: tl.constexpr, ROPE: tl.constexpr, SPAN: tl.constexpr, RING: tl.constexpr,
    RATIO: tl.constexpr, PER: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr, HB: tl.constexpr,
    CHOSEN: tl.constexpr, PLAIN: tl.constexpr, HOPPER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    t = tl.program_id(2).to(tl.int64)
    heads = tl.program_id(1) * HB + tl.arange(0, HB)
    rc = tl.arange(0, CB)
    r = tl.arange(0, B)
    WINDOWS: tl.constexpr = (SPAN + B - 1) // B
    slot = tl.load(slots + t)
    position = tl.load(positions + t)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number, blocks = _entries(position, slot, NUMBER, RATIO, CHOSEN, B, SPLITS)
    first = (split - WINDOWS) * blocks * B
    last = tl.minimum(first + blocks * B, number)
    if split < WINDOWS:
        # The window's rows are counted from its far end; a short sequence lacks the first of them.
        first = position - SPAN + 1 + split * B
        last = tl.where(slot >= 0, tl.minimum(first + B, position + 1), first)
    inside = (heads < H)[:, None] & (rc < C)[None, :]
    if (first < last) & (last > 0):
        x = operand(tl.load(q + (t * H + heads)[:, None] * C + rc[None, :], mask=inside, other=0.0), PLAIN)
        top = tl.full((HB,), -1e38, tl.float32)
        total = tl.zeros((HB,), tl.float32)
        acc = tl.zeros((HB, CB), tl.float32)
        if split < WINDOWS:
            at = first + r
            seen = (at >= 0) & (at < last)
            row = slot.to(tl.int64) * RING + tl.where(seen, at, 0) % RING
            k = _rows(row, seen, wcodes, wrope, wscales, C, CB, ROPE, B, PLAIN, HOPPER)
            top, total, acc = _look(x, k, seen, top, total, acc, SCALE, PLAIN)
        else:
            for begin in range(first, last, B):
                at = begin + r
                seen = at < last
                if CHOSEN:
                    row = tl.load(chosen + t * NUMBER + at, mask=seen, other=0).to(tl.int64)
                else:
                    page = tl.load(table + slot * PAGES + at // PER, mask=seen, other=0).to(tl.int64)
                    row = page * PER + at % PER
                k = _rows(row, seen, ecodes, erope, escales, C, CB, ROPE, B, PLAIN, HOPPER)
                top, total, acc = _look(x, k, seen, top, total, acc, SCALE, PLAIN)
        place = (t * PARTS + split) * H + heads
        tl.store(sums + 2 * place, top, mask=heads < H)
        tl.store(sums + 2 * place + 1, total, mask=heads < H)
        tl.store(parts + place[:, None] * C + rc[None, :], acc, mask=inside)


@triton.jit
def _combine(
    parts, sums, sink, turn, slots, positions, out, H, PARTS, NUMBER, C: tl.constexpr, ROPE: tl.constexpr,
    SPAN: tl.constexpr, RATIO: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr,
    CHOSEN: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    t = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rs = tl.arange(0, S)
    bar = tl.load(sink + h)
    cos, sin = turn_of(turn + t * ROPE, COLUMNS, C, ROPE, tl.program_id(0) * COLUMNS)
    position = tl.load(positions + t)
    slot = tl.load(slots + t)
    WINDOWS: tl.constexpr = (SPAN + B - 1) // B
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    number, blocks = _entries(position, slot, NUMBER, RATIO, CHOSEN, B, SPLITS)
    near = (rs < WINDOWS) & (position - SPAN + 1 + rs * B + B > 0) & (slot >= 0)
    used = near | ((rs >= WINDOWS) & ((rs - WINDOWS) * blocks * B < number))
    place = (t * PARTS + rs) * H + h
    m = tl.load(sums + 2 * place, mask=used, other=float("-inf"))
    n = tl.load(sums + 2 * place + 1, mask=used, other=0.0)
    part = tl.load(parts + place[:, None] * C + column[None, :], mask=used[:, None] & (column < C)[None, :], other=0.0)
    top = tl.maximum(bar, tl.max(m, 0))
    share = tl.exp(m - top)
    y = tl.sum(part * share[:, None], 0) / (tl.sum(n * share, 0) + tl.exp(bar - top))
    y = tl.reshape(y.to(tl.bfloat16).to(tl.float32), (1, COLUMNS))
    y = turned(y, cos, -sin, 1, COLUMNS)
    tl.store(out + (t * H + h) * C + column[None, :], y.to(tl.bfloat16), mask=(column < C)[None, :])
