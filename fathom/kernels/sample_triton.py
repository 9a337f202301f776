"""Sampling on a GPU: the vocabulary is read a few times, never sorted. The torch reference is `sample.draw`.

The token that holds a point of a row's weight is found digit by digit. The weight of every token goes into the bin of
the upper digit of its steps, by integer atomics: whatever their order, the sums are the same. The bins are in order of
likeliness, so running sums over them tell the point's bin; its tokens are counted by their lower digit, which tells the
number of steps; of the tokens with just so many the point names one, in the order of ids. The border of the k likeliest
and that of the nucleus are points like this; after them comes the draw. Every pass over the vocabulary takes many
programs a row, every look at the bins one. The number of rows changes from step to step: nothing is compiled for it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels import sample
from fathom.kernels.common_triton import options, power_of_two

_DIGIT = tl.constexpr(12)
_BINS = tl.constexpr(1 << 12)
_CHUNK = 2048
"""Tokens that a program reads."""
_LAST, _UNIT, _PER_STEP = tl.constexpr(sample.LAST), tl.constexpr(sample.UNIT), tl.constexpr(-1 / sample.STEPS)

# Planes of bins [S, 2^12]: the first and the last have weights and counts by the upper digit; the others counts by the
# lower one, of the upper bin that holds the border of the nucleus, the drawn token, the border of the k likeliest.
_WEIGHTS, _BORDER, _DRAWN, _KTH, _COUNTS = (tl.constexpr(plane) for plane in range(5))


def draw(logits: Tensor, wishes: Tensor, cut: bool, counted: bool) -> Any:
    """`sample.draw`; NotImplemented for other dtypes."""
    if logits.dtype != torch.float32 or wishes.dtype != torch.float64:
        return NotImplemented
    logits, wishes, (rows, v) = logits.contiguous(), wishes.contiguous(), logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return ids
    chunks, few, many = triton.cdiv(v, _CHUNK), options(logits, 8), options(logits, 4)
    given = logits, logits.amax(-1), wishes
    found = logits.new_empty((rows, 3), dtype=torch.int64)
    if cut:
        bins = logits.new_zeros((5 if counted else 3, rows, _BINS.value), dtype=torch.int64)
        _spread[(chunks, rows)](*given, found, bins, 0, v, rows, _CHUNK, counted, **many)
        for plane in (_KTH.value, _BORDER.value, _DRAWN.value)[not counted :]:
            _aim[(rows,)](wishes, found, bins, plane, rows, counted and plane == _BORDER.value, **few)
            _spread[(chunks, rows)](*given, found, bins, plane, v, rows, _CHUNK, counted, **many)
        _settle[(rows,)](found, bins, rows, **few)
    weights = logits.new_empty((rows, chunks), dtype=torch.int64)
    _weigh[(chunks, rows)](*given, found, weights, v, rows, _CHUNK, cut, **many)
    _find[(rows,)](*given, found, weights, ids, v, rows, chunks, _CHUNK, power_of_two(chunks), cut, **few)
    return ids


@triton.jit
def _weight(below):
    """`sample.weight`."""
    return (tl.exp(below.to(tl.float64) * _PER_STEP) * _UNIT).to(tl.int64)


@triton.jit
def _steps(logits, peaks, wishes, row, ids, V):
    """`sample.steps` of some tokens of a row; behind its end the largest number."""
    x = tl.load(logits + row.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
    below = (tl.load(peaks + row) - x) * tl.load(wishes + row).to(tl.float32)
    return tl.where(below < _LAST, below, _LAST * 1.0).to(tl.int32)


@triton.jit
def _locate(weights, r, point, SIZE: tl.constexpr):
    """The first place whose running sum exceeds the point, and what comes before it."""
    place = tl.minimum(tl.sum((tl.cumsum(weights, 0) <= point).to(tl.int32), 0), SIZE - 1)
    return place, tl.sum(tl.where(r < place, weights, 0), 0)


@triton.jit
def _is_whole(wishes, row, ROWS):
    """Whether nothing is cut off: then the order is that of the ids."""
    return (tl.load(wishes + ROWS + row) == 0.0) & (tl.load(wishes + 2 * ROWS + row) >= 1.0)


@triton.jit
def _point(wishes, row, kept, ROWS):
    """The uniform number as a point in the weight that is kept."""
    return tl.minimum((tl.load(wishes + 3 * ROWS + row) * kept.to(tl.float64)).to(tl.int64), kept - 1)


@triton.jit(do_not_specialize=["ROWS", "PLANE"])
def _spread(
    logits, peaks, wishes, found, bins, PLANE, V, ROWS, CHUNK: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A chunk of a row into the bins of a plane; with the weights go the counts, where they are wanted."""
    row = tl.program_id(1)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    below = _steps(logits, peaks, wishes, row, ids, V)
    upper = below >> _DIGIT
    one = tl.full((CHUNK,), 1, tl.int64)
    if PLANE == _WEIGHTS:
        weights = _weight(below)
        tl.atomic_add(bins + row * _BINS + upper, weights, mask=weights > 0, sem="relaxed")
        if COUNTED:
            tl.atomic_add(bins + (_COUNTS * ROWS + row) * _BINS + upper, one, mask=weights > 0, sem="relaxed")
    else:
        lower = bins + (PLANE * ROWS + row) * _BINS + (below & (_BINS - 1))
        tl.atomic_add(lower, one, mask=upper == tl.load(found + row * 3), sem="relaxed")


@triton.jit
def _lower(found, bins, PLANE, row, ROWS):
    """Of the upper bin that was found last: counts and weights of a token, by the lower digit."""
    r = tl.arange(0, _BINS)
    counts = tl.load(bins + (PLANE * ROWS + row) * _BINS + r)
    return counts, _weight(tl.load(found + row * 3) * _BINS + r)


@triton.jit
def _up_to(found, bins, PLANE, row, ROWS, BY_COUNT: tl.constexpr):
    """What the tokens weigh up to the border that was found last, the one that holds it included."""
    r = tl.arange(0, _BINS)
    counts, each = _lower(found, bins, PLANE, row, ROWS)
    left = tl.load(found + row * 3 + 1)
    place, before = _locate(counts if BY_COUNT else counts * each, r, left, _BINS)
    own = tl.sum(tl.where(r == place, each, 0), 0)
    equals = (left - before) // (1 if BY_COUNT else tl.maximum(own, 1)) + 1
    smaller = tl.sum(tl.where(r < place, counts * each, 0), 0)
    return tl.load(found + row * 3 + 2) + smaller + equals * own


@triton.jit(do_not_specialize=["ROWS"])
def _aim(wishes, found, bins, PLANE: tl.constexpr, ROWS, COUNTED: tl.constexpr, PDL: tl.constexpr):
    """The upper bin that the next point lies in. found: this bin, how far in it that is, the weight before the bin."""
    row = tl.program_id(0)
    r = tl.arange(0, _BINS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    weights = tl.load(bins + row * _BINS + r)
    if PLANE == _KTH:
        counts = tl.load(bins + (_COUNTS * ROWS + row) * _BINS + r)
        k, number = tl.load(wishes + ROWS + row).to(tl.int64), tl.sum(counts, 0)
        point = tl.maximum(tl.where(k == 0, number, tl.minimum(k, number)), 1) - 1
        place, before = _locate(counts, r, point, _BINS)
    else:
        if PLANE == _BORDER:
            if COUNTED:
                total = _up_to(found, bins, _KTH, row, ROWS, True)
            else:
                total = tl.sum(weights, 0)
            limit = tl.ceil(tl.load(wishes + 2 * ROWS + row) * total.to(tl.float64)).to(tl.int64)
            point = tl.maximum(tl.minimum(limit, total), 1) - 1
        else:
            point = _point(wishes, row, _up_to(found, bins, _BORDER, row, ROWS, False), ROWS)
        place, before = _locate(weights, r, point, _BINS)
    tl.debug_barrier()  # what was found before is read by all before it is overwritten
    tl.store(found + row * 3, place.to(tl.int64))
    tl.store(found + row * 3 + 1, point - before)
    tl.store(found + row * 3 + 2, tl.sum(tl.where(r < place, weights, 0), 0))


@triton.jit(do_not_specialize=["ROWS"])
def _settle(found, bins, ROWS, PDL: tl.constexpr):
    """The drawn token's number of steps instead of its upper digit; how far in its equals' weight the point lies."""
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    counts, each = _lower(found, bins, _DRAWN, row, ROWS)
    upper, left = tl.load(found + row * 3), tl.load(found + row * 3 + 1)
    place, before = _locate(counts * each, tl.arange(0, _BINS), left, _BINS)
    tl.debug_barrier()
    tl.store(found + row * 3, upper * _BINS + place)
    tl.store(found + row * 3 + 1, left - before)


@triton.jit
def _candidates(logits, peaks, wishes, found, row, ids, V, ROWS, CUT: tl.constexpr):
    """The weights of some tokens, where the row is cut only of those with the drawn number of steps."""
    below = _steps(logits, peaks, wishes, row, ids, V)
    weights = _weight(below)
    if CUT:
        drawn = tl.where(below == tl.load(found + row * 3), weights, 0)
        weights = tl.where(_is_whole(wishes, row, ROWS), weights, drawn)
    return weights


@triton.jit(do_not_specialize=["ROWS"])
def _weigh(
    logits, peaks, wishes, found, sums, V, ROWS, CHUNK: tl.constexpr, CUT: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """What the candidates of each chunk weigh, sums [S, chunks]."""
    row = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    weights = _candidates(logits, peaks, wishes, found, row, ids, V, ROWS, CUT)
    tl.store(sums + row * tl.num_programs(0) + tl.program_id(0), tl.sum(weights, 0))


@triton.jit(do_not_specialize=["ROWS"])
def _find(
    logits, peaks, wishes, found, sums, out, V, ROWS, CHUNKS, CHUNK: tl.constexpr, B: tl.constexpr, CUT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The candidate that holds the point: its chunk by their sums, then its place in the chunk."""
    row = tl.program_id(0)
    r = tl.arange(0, B)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunks = tl.load(sums + row * CHUNKS + r, mask=r < CHUNKS, other=0)
    point = _point(wishes, row, tl.sum(chunks, 0), ROWS)
    if CUT:
        point = tl.where(_is_whole(wishes, row, ROWS), point, tl.load(found + row * 3 + 1))
    chunk, before = _locate(chunks, r, point, B)
    start = tl.minimum(chunk, CHUNKS - 1) * CHUNK
    rc = tl.arange(0, CHUNK)
    weights = _candidates(logits, peaks, wishes, found, row, start + rc, V, ROWS, CUT)
    place, _ = _locate(weights, rc, point - before, CHUNK)
    tl.store(out + row, tl.minimum(start + place, V - 1).to(tl.int64))
