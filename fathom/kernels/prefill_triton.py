"""Attention of a prompt's queries on tensor cores. Reference 2.6, 2.9.

The torch reference is `prefill.attend`. A program has one query, or the few whose positions divide by their number to
the same quotient, with all their heads: the columns of its products. It goes through one list of rows: the window of
all its queries, from its far end, then the entries. So a query's rows, their order and their blocks follow from its
position alone; a row that a query does not see adds exactly nothing to it.

Rows are the first operand of both products (logits: rows by columns; results: C by columns), since few heads would
leave tensor cores, which want 64 rows, half empty.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels import dispatch
from fathom.kernels.common_triton import PLAIN, operand, options, power_of_two

ROWS = 16 if PLAIN else 64
"""Rows that a program looks at together."""
COLUMNS = 16 if PLAIN else 64
"""Queries times heads of a program, if the queries share their rows."""
_LOG2_E = 1.4426950408889634


def attend(
    q: Tensor, near: Tensor, entries: Tensor | None, chosen: Tensor | None, sink: Tensor, turn: Tensor, start: int,
    ratio: int, span: int,
) -> Any:  # fmt: skip
    """`prefill.attend`; NotImplemented for other types than BF16, a C that is no power of two, or too many heads."""
    count, heads, width = q.shape
    column = max(power_of_two(heads), 16)
    if q.dtype != torch.bfloat16 or width != power_of_two(width) or width < 64 or column > 64:
        return NotImplemented
    number = 0 if entries is None else len(entries)
    entries = near if entries is None or not number else entries
    out = torch.empty((count, heads, width), dtype=q.dtype, device=q.device)
    together = max(1, COLUMNS // column) if ratio and chosen is None else 1
    grid = ((start + count - 1) // together - start // together + 1,)
    inputs = (
        q.contiguous(), near.contiguous(), entries.contiguous(), near if chosen is None else chosen.contiguous(), sink,
        turn.contiguous(), out, start, count, len(near) - count, number, heads, width**-0.5 * _LOG2_E,
        0 if chosen is None else chosen.shape[1], column, width, 2 * turn.shape[1], span, ratio, together, ROWS,
        chosen is not None,
    )  # fmt: skip
    hopper = _hopper(q.device)
    if hopper is not None and width >= 128 and turn.shape[1] == hopper.PAIRS:
        small = column <= 32 and together == 1
        rest, named = 1 if small else 2, hopper.TWICE if small else hopper.ONCE
        name = "prefill_hopper_triton"  # in a language that is still being made: Triton's stands in for it
        if dispatch.tried(name, "attend", lambda kernel: kernel[grid](*inputs, rest, **named)) is not NotImplemented:
            return out
    _attend[grid](*inputs, PLAIN, **options(q, 8, 2))
    return out


@lru_cache(maxsize=8)
def _hopper(device: torch.device) -> Any:
    """The module with Hopper's kernel, on Hopper and where this Triton has Gluon."""
    if PLAIN or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return import_module("fathom.kernels.prefill_hopper_triton")
    except ImportError:
        return None


@triton.jit
def _entry(chosen, t, at, K: tl.constexpr, CHOSEN: tl.constexpr):
    """Entries by their place behind the window; -1 where there is none."""
    if CHOSEN:
        return tl.load(chosen + t * K + at, mask=(at >= 0) & (at < K), other=-1)
    else:
        return at


@triton.jit
def _rotated_back(y, turn, t, real, N: tl.constexpr, C: tl.constexpr, ROPE: tl.constexpr):
    """The last ROPE columns of y [N, C], BF16, turned back by their queries' rotations [T, ROPE / 2, 2]."""
    even, odd = tl.split(tl.reshape(y.to(tl.float32), (N, C // 2, 2)))
    pair = tl.arange(0, C // 2) - (C - ROPE) // 2
    inside = real[:, None] & (pair >= 0)[None, :]
    place = turn + t[:, None] * ROPE + 2 * pair[None, :]
    cos = tl.load(place, mask=inside, other=1.0)
    sin = tl.load(place + 1, mask=inside, other=0.0)
    return tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (N, C))


@triton.jit(do_not_specialize=["START", "T", "BEFORE", "ENTRIES"])
def _attend(
    q, near, entries, chosen, sink, turn, out, START, T, BEFORE, ENTRIES, H, SCALE, K: tl.constexpr, HB: tl.constexpr,
    C: tl.constexpr, ROPE: tl.constexpr, SPAN: tl.constexpr, RATIO: tl.constexpr, Q: tl.constexpr, B: tl.constexpr,
    CHOSEN: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = Q * HB
    WINDOW: tl.constexpr = SPAN + Q - 1
    first = (START // Q + tl.program_id(0)) * Q
    column = tl.arange(0, N)
    position = first + column // HB
    head = column % HB
    t = (position - START).to(tl.int64)
    real = (t >= 0) & (t < T) & (head < H)
    rc = tl.arange(0, C)
    r = tl.arange(0, B)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = (t * H + head)[:, None] * C + rc[None, :]
    x = tl.trans(operand(tl.load(q + place, mask=real[:, None], other=0.0), PLAIN))
    top = tl.full((N,), -1e38, tl.float32)
    sums = tl.zeros((B, N), tl.float32)
    acc = tl.zeros((C, N), tl.float32)
    number = 0
    if RATIO > 0:
        number = tl.minimum((first + Q) // RATIO, ENTRIES)
    if CHOSEN:
        number = tl.minimum(number, K)
    # The list begins with the window of the first query; of the window's rows, those of SKIP .. LAST - 1 are in `near`.
    skip = tl.maximum(START - BEFORE - first + SPAN - 1, 0)
    last = tl.minimum(START + T - first + SPAN - 1, WINDOW)
    rows = near + (first - SPAN + 1 - START + BEFORE).to(tl.int64) * C
    own = first.to(tl.int64) - START
    begin = tl.maximum(SPAN - 1 - first, 0) // B * B
    e = _entry(chosen, own, begin + r - WINDOW, K, CHOSEN)
    for v in range(begin, WINDOW + number, B):
        at = v + r
        source = rows + at * C
        there = (at >= skip) & (at < last)
        if RATIO > 0:
            behind = at >= WINDOW
            source = tl.where(behind, entries + e.to(tl.int64) * C, source)
            there = there | (behind & (e >= 0) & (e < number if not CHOSEN else e < ENTRIES))
        k = operand(tl.load(source[:, None] + rc[None, :], mask=there[:, None], other=0.0), PLAIN)
        e = _entry(chosen, own, at + B - WINDOW, K, CHOSEN)
        logits = tl.dot(k, x, input_precision="ieee") * SCALE
        if Q == 1:
            seen = there[:, None]
        else:
            ahead = at[:, None] - (position - first)[None, :]
            closed = (at - WINDOW)[:, None] < ((position + 1) // RATIO)[None, :]
            seen = there[:, None] & tl.where(behind[:, None], closed, (ahead >= 0) & (ahead < SPAN))
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 0))
        shrink = tl.exp2(top - new)
        p = tl.exp2(logits - new[None, :])
        sums = sums * shrink[None, :] + p
        weights = operand(p.to(tl.bfloat16), PLAIN)
        acc = tl.dot(tl.trans(k), weights, acc * shrink[None, :], input_precision="ieee")
        top = new
    bar = tl.load(sink + head, mask=head < H, other=0.0) * 1.4426950408889634
    new = tl.maximum(top, bar)
    shrink = tl.exp2(top - new)
    total = tl.sum(sums, 0) * shrink + tl.exp2(bar - new)
    y = tl.trans((acc * (shrink / total)[None, :]).to(tl.bfloat16))
    tl.store(out + place, _rotated_back(y, turn, t, real, N, C, ROPE).to(tl.bfloat16), mask=real[:, None])
