"""What one model call computes: the tokens of several sequences laid end to end, and where each of them stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

TILE = 128
"""Prefill runs in tiles that begin at absolute multiples of this many tokens (lcm of the compression ratios)."""

DECODE_TOKENS = 8
"""A piece of at most this many tokens is computed token by token, so that drafts equal single steps bit for bit."""


@dataclass(frozen=True, slots=True)
class Span:
    """The next `count` tokens of the sequence in cache slot `slot`, the first at absolute position `start`."""

    start: int
    count: int
    slot: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of a span that attention works on at once: `count` rows of the batch from `row` on.

    Without a cache, `docs` documents of equal length that are neighbours in the batch make one tile.
    """

    row: int
    start: int
    count: int
    slot: int
    docs: int = 1

    @property
    def rows(self) -> slice:
        """The tile's rows in the batch."""
        return slice(self.row, self.row + self.docs * self.count)

    @property
    def single(self) -> bool:
        """Whether the tile is one token: a decode step, or the piece of one."""
        return self.count == 1 and self.docs == 1

    def of(self, x: Tensor) -> Tensor:
        """The tile's rows of x [T, ...]: [count, ...], or [docs, count, ...] for more documents than one."""
        rows = x[self.rows]
        return rows if self.docs == 1 else rows.unflatten(0, (self.docs, self.count))

    @property
    def end(self) -> int:
        """The absolute position after the tile's last token."""
        return self.start + self.count


@dataclass(frozen=True)
class Batch:
    """A ragged batch of T tokens of S sequences.

    positions [T] absolute positions; bounds [S+1] row where each sequence begins; slots [S] cache slots;
    wanted [R] rows whose output is wanted (None: all); tiles: the same on the host, cut for the reference kernels.
    For a cache that kernels read (`LayerState.memory`) positions and slots are int32 [T], both of every token: `tokens`
    (no tiles) for the next token of running sequences, `pieces` for prompts.
    """

    positions: Tensor
    bounds: Tensor
    slots: Tensor
    wanted: Tensor | None
    tiles: tuple[Tile, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        wanted = None if self.wanted is None else self.wanted.to(device)
        return Batch(self.positions.to(device), self.bounds.to(device), self.slots.to(device), wanted, self.tiles)

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Whole documents end to end, each from position 0, for training and scoring without a cache."""
        spans = [Span(0, n, i) for i, n in enumerate(lengths)]
        return _build(spans, tuple(_merged(_whole(spans))), None, device)

    @staticmethod
    def tokens(positions: Tensor, slots: Tensor) -> Batch:
        """The next token of each sequence: int32 positions [T] and slots [T], which the host need not know."""
        return Batch(positions, positions, slots, None, ())

    @staticmethod
    def pieces(spans: Sequence[Span], device: torch.device | str = "cpu") -> Batch:
        """Pieces of prompts, a tile each, their last rows wanted; filled up to whole tiles of tokens of nobody's."""
        tiles = tuple(_whole(spans))
        rest = -sum(span.count for span in spans) % TILE
        at = torch.cat(
            [*(torch.arange(s.start, s.start + s.count) for s in spans), torch.zeros(rest, dtype=torch.long)]
        )
        counts = torch.tensor([*(span.count for span in spans), rest])
        slots = torch.tensor([*(span.slot for span in spans), -1]).repeat_interleave(counts)
        wanted = counts[:-1].cumsum(0) - 1
        positions, slots, wanted = (t.to(device) for t in (at.int(), slots.int(), wanted))
        return Batch(positions, positions, slots, wanted, tiles)

    @staticmethod
    def step(
        spans: Sequence[Span], wanted: Literal["all", "last"] = "last", device: torch.device | str = "cpu"
    ) -> Batch:
        """A step of an engine, prefill chunks and decode tokens in any mixture; wanted: each span's last row or all."""
        rows = None
        if wanted == "last":
            rows = torch.tensor([s.count for s in spans], device=device).cumsum(0) - 1
        return _build(spans, tuple(_tiles(spans)), rows, device)


def _build(spans: Sequence[Span], tiles: tuple[Tile, ...], wanted: Tensor | None, device: torch.device | str) -> Batch:
    positions = [torch.arange(s.start, s.start + s.count) for s in spans]
    bounds = torch.tensor([0, *(s.count for s in spans)]).cumsum(0)
    slots = torch.tensor([s.slot for s in spans])
    return Batch(torch.cat(positions).to(device), bounds.to(device), slots.to(device), wanted, tiles)


def _whole(spans: Sequence[Span]) -> Iterator[Tile]:
    row = 0
    for span in spans:
        yield Tile(row, span.start, span.count, span.slot)
        row += span.count


def _merged(tiles: Iterator[Tile]) -> Iterator[Tile]:
    for count, group in groupby(tiles, key=lambda tile: tile.count):
        first, *others = group
        yield Tile(first.row, 0, count, first.slot, 1 + len(others))


def _tiles(spans: Sequence[Span]) -> Iterator[Tile]:
    for whole in _whole(spans):
        for left in [whole.start, *range(whole.start - whole.start % TILE + TILE, whole.end, TILE)]:
            right = min(left - left % TILE + TILE, whole.end)
            piece = 1 if right - left <= DECODE_TOKENS else right - left
            for at in range(left, right, piece):
                yield Tile(whole.row + at - whole.start, at, piece, whole.slot)
