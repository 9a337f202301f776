"""What one model call computes: the tokens of several sequences laid end to end, and where each of them stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TILE = 128
"""Prefill runs in tiles that begin at absolute multiples of this many tokens (lcm of the compression ratios)."""

DECODE_TOKENS = 8
"""A piece of at most this many tokens is computed token by token, so that drafts equal single steps bit for bit."""


class Span(NamedTuple):
    """The next `count` tokens of the sequence in cache slot `slot`, the first at absolute position `start`."""

    start: int
    count: int
    slot: int = 0


class Tile(NamedTuple):
    """A piece of a span that attention works on at once: `count` rows of the batch from `row` on."""

    row: int
    start: int
    count: int
    slot: int

    @property
    def rows(self) -> slice:
        """The tile's rows in the batch."""
        return slice(self.row, self.row + self.count)

    @property
    def end(self) -> int:
        """The absolute position after the tile's last token."""
        return self.start + self.count


@dataclass(frozen=True)
class Batch:
    """A ragged batch of T tokens of S sequences.

    positions [T] absolute positions; bounds [S+1] row where each sequence begins; slots [S] cache slots;
    wanted [R] rows whose output is wanted (None: all); tiles: the same on the host, cut for the reference kernels.
    """

    positions: Tensor
    bounds: Tensor
    slots: Tensor
    wanted: Tensor | None
    tiles: tuple[Tile, ...]

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Whole documents end to end, each from position 0, for training and scoring without a cache."""
        spans = [Span(0, n, i) for i, n in enumerate(lengths)]
        return _build(spans, tuple(_whole(spans)), None, device)

    @staticmethod
    def step(
        spans: Sequence[Span], wanted: Literal["all", "last"] = "last", device: torch.device | str = "cpu"
    ) -> Batch:
        """A step of an engine: prefill chunks and decode tokens in any mixture; output of each span's last row, or all."""
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
        yield Tile(row, *span)
        row += span.count


def _tiles(spans: Sequence[Span]) -> Iterator[Tile]:
    for row, start, count, slot in _whole(spans):
        end = start + count
        for left in [start, *range(start - start % TILE + TILE, end, TILE)]:
            right = min(left - left % TILE + TILE, end)
            piece = 1 if right - left <= DECODE_TOKENS else right - left
            for at in range(left, right, piece):
                yield Tile(row + at - start, at, piece, slot)
