"""What a layer keeps between calls. The math never knows where; it asks a `LayerState`. Reference 5.1.

Two kinds of things are kept for every sequence and layer:
  recent   rows of the last tokens: the attention window and the compressors' unfinished blocks
  entries  rows that only grow: compressed keys/values and index keys, one per closed block

Both are addressed by absolute position, so nothing is destroyed by going on: a caller rewinds a few tokens (a rejected
draft) by starting again from the smaller position.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.errors import ContextError
from fathom.model.batch import TILE, Tile
from fathom.model.layers import Numerics

if TYPE_CHECKING:
    from fathom.kernels.decode import Memory

KEPT_ROWS = 2 * TILE + 8
"""Recent rows that survive: the window before the last block boundary, and a rewind of eight drafts."""

_ROOM = 4 * TILE


class LayerState(Protocol):
    """The memory of one layer."""

    def recent(self, name: str, tile: Tile, new: Tensor, first: int) -> Tensor:
        """Keep `new` [(docs,) count, W], the rows of the tile's tokens, and return positions first .. tile.end - 1."""

    def entries(self, name: str, tile: Tile, start: int, new: Tensor) -> Tensor:
        """Keep `new` [b, W], b >= 0, as entries start .. start + b - 1 and return all entries before start + b."""

    @property
    def memory(self) -> Memory | None:
        """The same as bytes on the device, for kernels that store and read them; None where torch does, as above."""


class Cache(Protocol):
    """The memory of every layer, for the sequences in its slots."""

    def admit(self, tiles: Iterable[Tile]) -> None:
        """Refuse a call that would go past the cache's end, before any layer has stored a row of it."""

    def layer(self, index: int) -> LayerState:
        """The memory of layer `index`; the MTP block is the one after the last."""


class NoState:
    """Documents that begin at position 0 and end in the same call: nothing to remember, everything differentiable."""

    memory = None

    def recent(self, name: str, tile: Tile, new: Tensor, first: int) -> Tensor:
        """The rows themselves."""
        assert tile.start == 0, "a sequence without a cache begins at position 0"
        return new

    def entries(self, name: str, tile: Tile, start: int, new: Tensor) -> Tensor:
        """The entries themselves."""
        return new


class Recent:
    """The last rows of each slot, in position order, in a buffer that slides when it is full."""

    def __init__(self, slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(slots, KEPT_ROWS + _ROOM, width, dtype=dtype, device=device)
        self.base = [0] * slots

    def push(self, tile: Tile, new: Tensor, first: int) -> Tensor:
        """Keep the rows of the tile's tokens; return positions first .. tile.end - 1. ValueError if they are gone."""
        rows = self.rows[tile.slot]
        if tile.start == 0:
            self.base[tile.slot] = 0
        if tile.end - self.base[tile.slot] > rows.shape[0]:
            self.slide(tile.slot, tile.start)
        base = self.base[tile.slot]
        if first < base:
            raise ValueError(f"position {tile.start} is too far back: rows before {base} are no longer kept")
        rows[tile.start - base : tile.end - base] = new
        return rows[first - base : tile.end - base]

    def take(self, slot: int, first: int, end: int) -> Tensor:
        """The rows of positions first .. end - 1, which must still be kept (`base[slot]` is the first that is)."""
        base = self.base[slot]
        assert base <= first, f"rows before {base} are no longer kept"
        return self.rows[slot, first - base : end - base]

    def put(self, slot: int, first: int, rows: Tensor) -> None:
        """Begin the slot anew with rows [n, W] of the positions from `first` on."""
        self.base[slot] = first
        self.rows[slot, : rows.shape[0]] = rows

    def slide(self, slot: int, start: int) -> None:
        """Make room for the rows from position `start` on."""
        rows, base = self.rows[slot], self.base[slot]
        keep = max(base, start - KEPT_ROWS)
        rows[: start - keep] = rows[keep - base : start - base].clone()
        self.base[slot] = keep


class _Layer:
    memory = None

    def __init__(self) -> None:
        self.recents: dict[str, Recent] = {}
        self.stores: dict[str, Tensor] = {}

    def recent(self, name: str, tile: Tile, new: Tensor, first: int) -> Tensor:
        return self.recents[name].push(tile, new, first)

    def entries(self, name: str, tile: Tile, start: int, new: Tensor) -> Tensor:
        store = self.stores[name][tile.slot]
        if new.shape[0]:
            store[start : start + new.shape[0]] = new
        return store[: start + new.shape[0]]


class ContiguousCache:
    """One contiguous run of rows a sequence: the reference cache, without pages or sharing.

    slots: sequences held at once; max_context: the longest position + 1. Entries are reserved, not touched: memory is
    used as sequences grow. Rows are kept in the compute dtype, which holds every stored value exactly; the compressors'
    tails are float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        slots: int = 1,
        max_context: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots = slots
        self.max_context = max_context or config.max_position_embeddings
        self._numerics, self._device = numerics, torch.device(device)
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self._layers = [self._make(config, config.ratio(i)) for i in range(layers)]

    def admit(self, tiles: Iterable[Tile]) -> None:
        """Refuse a call that would go past the cache's end, before any layer has stored a row of it."""
        for tile in tiles:
            if tile.end > self.max_context:
                limit = f"{tile.end} tokens are more than the cache's {self.max_context}"
                raise ContextError(f"{limit}: make it with a larger max_context")

    def layer(self, index: int) -> LayerState:
        """The memory of layer `index`; the MTP block is the one after the last."""
        return self._layers[index]

    def _make(self, config: ModelConfig, ratio: int) -> _Layer:
        layer = _Layer()
        layer.recents["window"] = self._recent(config.head_dim, self._numerics.dtype)
        if ratio:
            self._compressed(layer, "compressor", ratio, config.head_dim)
        if ratio == 4:
            self._compressed(layer, "indexer", ratio, config.index_head_dim)
        return layer

    def _compressed(self, layer: _Layer, name: str, ratio: int, dim: int) -> None:
        halves = 2 if ratio == 4 else 1
        layer.recents[name] = self._recent(2 * halves * dim, torch.float32)
        shape = (self.slots, self.max_context // ratio, dim)
        layer.stores[name] = torch.empty(shape, dtype=self._numerics.dtype, device=self._device)

    def _recent(self, width: int, dtype: torch.dtype) -> Recent:
        return Recent(self.slots, width, dtype, self._device)
