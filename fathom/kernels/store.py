"""What tokens leave behind in a layer, and what they ask it with: between a layer's projections and its attention.

Reference 2.5 to 2.8, 4, 5.1. `prepare` does all of it for a decode step. A piece of a prompt, which may be longer than
what is kept, makes entries and queries (`enter`), reads the recent rows (`recent`), and leaves its own at the end
(`remember`). These are the contracts with their references in torch; the GPU's versions stand in `store_triton`, for
steps on Hopper in `store_cuda`, and that of `recent` in `stored_triton`.

Several tokens of one sequence must be neighbours in the batch and in order; in a decode step (drafts) no more than 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.kernels import quant
from fathom.kernels.decode import Memory, Tokens, page_rows, rotated
from fathom.kernels.dispatch import beside
from fathom.kernels.norm import normalised
from fathom.kernels.pool import pool
from fathom.kernels.stored import Keys, Rows


class Projected(NamedTuple):
    """A layer's projections of B tokens.

    q [B, H, C] and kv [B, C] after wq_b and wkv; entries float32 [B, 2 * width]: values and gates of the compressor,
    without the gates' bias (ratio 4 and 128); index_q [B, h, d] and keys: the same of the indexer (ratio 4).
    """

    q: Tensor
    kv: Tensor
    entries: Tensor | None = None
    index_q: Tensor | None = None
    keys: Tensor | None = None

    def rows(self, first: int, last: int) -> Projected:
        """Of tokens first .. last - 1."""
        rest = (None if x is None else x[first:last] for x in self[2:])
        return Projected(self.q[first:last], self.kv[first:last], *rest)


@dataclass(frozen=True)
class Pooling:
    """Weights of a compressor behind its projections: ape float32 [ratio, width], norm [D]."""

    ape: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Norms:
    """Weights of what stands between a layer's projections and its attention: kv_norm [C] and the compressors'."""

    kv: Tensor
    eps: float
    entries: Pooling | None = None
    keys: Pooling | None = None


@beside("store_cuda")
def prepare(made: Projected, tokens: Tokens, memory: Memory, norms: Norms) -> tuple[Tensor, Tensor | None]:
    """Store what tokens of a decode step leave behind; their queries: BF16 [B, H, C] and, ratio 4, [B, h, d]."""
    queries, index_q, _ = enter(made, tokens, memory, norms)
    for i in range(len(made.q)):  # neighbours of one sequence stand on different rows of the rings
        remember(made, tokens, memory, norms, i, i + 1, None)
    return queries, index_q


@beside("store_triton")
def enter(made: Projected, tokens: Tokens, memory: Memory, norms: Norms) -> tuple[Tensor, Tensor | None, Tensor]:
    """Store the entries that pieces of prompts close; queries as `prepare` makes them, and BF16 [B, C]: the tokens'
    rows as they will be stored. What is recent in `memory` is from before the pieces, and stays."""
    ratio = memory.ratio
    if made.entries is not None:
        assert norms.entries is not None and memory.tail is not None and memory.entries is not None
        entry = _pooled(made.entries, tokens, ratio, norms.entries, norms.eps, memory.tail)
        _store_entry(memory.entries, entry, tokens, memory)
    if made.keys is not None:
        assert norms.keys is not None and memory.key_tail is not None and memory.keys is not None
        key = _pooled(made.keys, tokens, ratio, norms.keys, norms.eps, memory.key_tail)
        _store_entry(memory.keys, quant.hadamard(key), tokens, memory)
    turn = tokens.turn(ratio).unsqueeze(1)
    q = rotated(normalised(made.q.float(), norms.eps).to(made.q.dtype), turn)
    index_q = None if made.index_q is None else quant.fp4_sim(quant.hadamard(rotated(made.index_q, turn)))
    return q, index_q, _as_stored(_row(made.kv, tokens, memory, norms), memory.window)


@beside("store_triton")
def remember(
    made: Projected, tokens: Tokens, memory: Memory, norms: Norms, first: int, last: int, end: int | None
) -> None:
    """Keep what is recent of one sequence's piece: tokens first .. last - 1 of the batch.

    end: the position after its last, so that of rows with one place in a ring the last is kept; None: no two have one.
    """
    row = memory.window.pack(_row(made.kv, tokens, memory, norms))
    _keep(memory.window.planes, row, tokens, first, last, end)
    for tail, projected, weights in (
        (memory.tail, made.entries, norms.entries),
        (memory.key_tail, made.keys, norms.keys),
    ):
        if tail is not None and projected is not None and weights is not None:
            _keep((tail,), (_biased(projected, tokens, weights),), tokens, first, last, end)


@beside("stored_triton")
def recent(window: Rows, slot: int, first: int, count: int) -> Tensor:
    """The slot's rows of positions first .. first + count - 1, which must still be kept: BF16 [count, C]."""
    at = torch.arange(first, first + count, device=window.data.device)
    return window.read(slot * window.per + at % window.per)


def _keep(
    planes: tuple[Tensor, ...], rows: tuple[Tensor, ...], tokens: Tokens, first: int, last: int, end: int | None
) -> None:
    """Rows first .. last - 1 of a batch into rings [slots, ring, ...], by their positions."""
    ring, slots, positions = planes[0].shape[1], tokens.slots[first:last].long(), tokens.positions[first:last].long()
    real = slots >= 0 if end is None else (slots >= 0) & (positions >= end - ring)
    place = slots.clamp_min(0) * ring + positions % ring
    for plane, new in zip(planes, rows, strict=True):
        flat = plane.flatten(0, 1)
        if end is None:
            flat[place] = torch.where(real.unsqueeze(1), new[first:last], flat[place])
        else:
            flat[place[real]] = new[first:last][real]


def _row(kv: Tensor, tokens: Tokens, memory: Memory, norms: Norms) -> Tensor:
    """The tokens' window rows before they are rounded to their stored form: BF16 [B, C]."""
    row = normalised(kv.float(), norms.eps, norms.kv.float()).to(torch.bfloat16)
    return rotated(row, tokens.turn(memory.ratio))


def _as_stored(row: Tensor, like: Rows) -> Tensor:
    data, scales = (plane.unsqueeze(0) for plane in like.pack(row))
    return Rows(data, scales, like.rope).read(torch.arange(row.shape[0], device=row.device))


def _biased(projected: Tensor, tokens: Tokens, weights: Pooling) -> Tensor:
    """Values, then gates with the bias of their place in the block."""
    ratio, width = weights.ape.shape
    gates = projected[:, width:] + weights.ape[tokens.positions.long() % ratio]
    return torch.cat((projected[:, :width], gates), -1)


def _pooled(projected: Tensor, tokens: Tokens, ratio: int, weights: Pooling, eps: float, tail: Tensor) -> Tensor:
    """BF16 [B, D]: the entry of each token's block, of meaning where the token closes it.

    What a block needs is in the batch, as far as its sequence's tokens are neighbours there, and before that in `tail`.
    """
    positions, slots, own = tokens.positions.long(), tokens.slots.long(), _biased(projected, tokens, weights)
    back = torch.arange(1 - (8 if ratio == 4 else ratio), 1, device=positions.device)
    at, source = positions.unsqueeze(1) + back, torch.arange(len(own), device=own.device).unsqueeze(1) + back
    near = source.clamp_min(0)
    here = (source >= 0) & (slots[near] == slots.unsqueeze(1)) & (positions[near] == at)
    kept = tail.flatten(0, 1)[slots.clamp_min(0).unsqueeze(1) * tail.shape[1] + at % tail.shape[1]]
    values, gates = torch.where(here.unsqueeze(-1), own[near], kept).chunk(2, -1)
    if ratio == 4:
        values, gates = _halves(values), _halves(gates).masked_fill((at < 0).unsqueeze(-1), float("-inf"))
        values = values.masked_fill((at < 0).unsqueeze(-1), 0.0)
    entry = normalised(pool(values, gates).to(torch.bfloat16).float(), eps, weights.norm.float()).to(torch.bfloat16)
    return rotated(entry, tokens.turn(ratio, block=True))


def _halves(rows: Tensor) -> Tensor:
    """Of 8 rows [B, 8, 2D] the first four's low halves and the last four's high halves: [B, 8, D]."""
    low, high = rows.chunk(2, -1)
    return torch.cat((low[:, :4], high[:, 4:]), 1)


def _store_entry(store: Rows | Keys, entry: Tensor, tokens: Tokens, memory: Memory) -> None:
    """Where a token closes its block; elsewhere what is there stays."""
    block = (tokens.positions.long() // memory.ratio).unsqueeze(1)
    index = page_rows(memory.table, tokens.slots, block, store.per).squeeze(1)
    closes = (tokens.positions + 1) % memory.ratio == 0
    # A neighbour of the same sequence may close a token's block in this step: all its tokens then write the same.
    closer = (tokens.slots.unsqueeze(1) == tokens.slots) & (block == block.T) & closes
    closed, by = closer.any(1, keepdim=True), closer.int().argmax(1)
    packed = zip(store.planes, store.pack(entry), strict=True)
    new = tuple(torch.where(closed, new[by], plane.flatten(0, 1)[index]) for plane, new in packed)
    _put(store.planes, index, new, tokens.slots)


def _put(planes: tuple[Tensor, ...], index: Tensor, new: tuple[Tensor, ...], slots: Tensor) -> None:
    """Write rows by number. Padding writes once more what the first token writes, so that no shape depends on it."""
    real = slots >= 0
    index = torch.where(real, index, index[:1])
    for plane, rows in zip(planes, new, strict=True):
        plane.flatten(0, 1)[index] = torch.where(real.unsqueeze(1), rows, rows[:1])
