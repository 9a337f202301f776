"""The engine's cache: entries in pages that sequences share, recent rows in the slots of those that run.

A page is 128 tokens of one sequence: in every layer that compresses 4 to 1 its 32 entries and index keys, in every one
that compresses 128 to 1 its one entry. A page id means the same page in all layers. A slot holds what a sequence needs
besides: the window rows and the compressors' unfinished blocks.

Both have a stored form, exact to the last bit: a block is a full page, a state is what a sequence needs to go on at a
multiple of 128. There the window is needed and, of the overlapping compressors, the last closed block: nothing is
unfinished. Reference 5.1, 5.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.engine.request import PAGE
from fathom.engine.rows import Packing, Raw, index_keys, key_value_rows
from fathom.errors import ContextError
from fathom.model.batch import Tile
from fathom.model.cache import LayerState, Recent
from fathom.model.layers import Numerics

_OVERLAP = 4
"""Tokens of the closed block that the next one's entry overlaps with."""


class _Table:
    """The pages of a slot's sequence, and how many of the first are neighbours."""

    def __init__(self, pages: Sequence[int], device: torch.device) -> None:
        self.pages, self.index = list(pages), torch.tensor(pages, dtype=torch.long, device=device)
        self.run = next((i for i, (a, b) in enumerate(pairwise(pages), 1) if b != a + 1), len(pages))


class _Store:
    """The entries of one kind and layer: [pages, per_page, W]."""

    def __init__(self, pages: int, ratio: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.per_page = PAGE // ratio
        self.rows = torch.empty(pages, self.per_page, width, dtype=dtype, device=device)

    def write(self, table: _Table, start: int, new: Tensor) -> None:
        """A tile's new entries, which all lie in one page."""
        at = start % self.per_page
        self.rows[table.pages[start // self.per_page], at : at + new.shape[0]] = new

    def read(self, table: _Table, end: int) -> Tensor:
        """Entries 0 .. end - 1 in order: a view where the pages are neighbours, else a copy."""
        count = -(-end // self.per_page)
        if count <= table.run:
            first = table.pages[0] if table.pages else 0
            return self.rows[first : first + count].flatten(0, 1)[:end]
        return self.rows[table.index[:count]].flatten(0, 1)[:end]


class _Layer:
    """The memory of one layer."""

    memory = None

    def __init__(self, tables: list[_Table]) -> None:
        self.tables = tables
        self.recents: dict[str, Recent] = {}
        self.stores: dict[str, _Store] = {}

    def recent(self, name: str, tile: Tile, new: Tensor, first: int) -> Tensor:
        return self.recents[name].push(tile, new, first)

    def entries(self, name: str, tile: Tile, start: int, new: Tensor) -> Tensor:
        store, table = self.stores[name], self.tables[tile.slot]
        if new.shape[0]:
            store.write(table, start, new)
        return store.read(table, start + new.shape[0])


class _Kept:
    """What a state holds of one kind of recent rows: the last `rows` of them, of every layer that has the kind."""

    def __init__(self, packing: Packing, rows: int, recents: Sequence[Recent]) -> None:
        self.packing, self.rows, self.recents = packing, rows, recents

    def count(self, at: int) -> int:
        """Rows of a layer in a state at `at`."""
        return min(self.rows, at)

    def size(self, at: int) -> int:
        """Bytes in a state at `at`."""
        return self.packing.size * self.count(at) * len(self.recents)

    def take(self, slot: int, at: int) -> Tensor:
        """Stored form of the rows before `at`, one run of bytes."""
        rows = [recent.take(slot, at - self.count(at), at) for recent in self.recents]
        return self.packing.pack(self.cut(torch.cat(rows))).flatten()

    def put(self, slot: int, at: int, stored: Tensor) -> None:
        """Begin the slot with them."""
        rows = self.whole(self.packing.unpack(stored.view(-1, self.packing.size)))
        for recent, part in zip(self.recents, rows.split(self.count(at)), strict=True):
            recent.put(slot, at - self.count(at), part)

    def cut(self, rows: Tensor) -> Tensor:
        """Of every row what is read again."""
        return rows

    def whole(self, rows: Tensor) -> Tensor:
        """The inverse of `cut`, zeros where nothing is read."""
        return rows


class _Overlap(_Kept):
    """A tail is (values, gates) x (low, high half); a closed block's low half is all that the next entry reads."""

    def cut(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, (4, -1))[:, ::2].flatten(1)

    def whole(self, rows: Tensor) -> Tensor:
        low = rows.unflatten(1, (2, 1, -1))
        return torch.cat((low, torch.zeros_like(low)), 2).flatten(1)


class PagedCache:
    """`slots` running sequences over `pages` pages.

    drafts: keep the MTP block's window as well. Results are those of `ContiguousCache`, bit for bit.
    On a GPU: `DeviceCache`, where a model suits it.
    """

    def __init__(
        self,
        config: ModelConfig,
        numerics: Numerics,
        slots: int,
        pages: int,
        device: torch.device | str = "cpu",
        drafts: bool = False,
    ) -> None:
        self.slots, self.pages, self.device = slots, pages, torch.device(device)
        self._tables = [_Table([], self.device) for _ in range(slots)]
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if drafts else 0)
        ratios = [config.ratio(i) for i in range(layers)]
        self._layers = [self._make(config, numerics, ratio) for ratio in ratios]
        self._planes = [(form, stores) for form, stores in self._stores(config, numerics) if stores]
        self._kept = [kept for kept in self._states(config, numerics, ratios) if kept.recents]

    form = "rows"
    """Says how blocks and states are stored."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(self._plane_sizes())

    @property
    def page_bytes(self) -> int:
        """Bytes that a page takes on the device."""
        rows = [store.rows for _, stores in self._planes for store in stores]
        return sum(r.shape[1] * r.shape[2] * r.element_size() for r in rows)

    def state_bytes(self, at: int) -> int:
        """Bytes of a state at position `at`: the same from the window's size on."""
        return sum(kept.size(at) for kept in self._kept)

    def bind(self, slot: int, pages: Sequence[int]) -> None:
        """The slot's sequence has these pages, in order. To be called before a model call whenever they changed."""
        if self._tables[slot].pages != pages:
            self._tables[slot] = _Table(pages, self.device)

    def admit(self, tiles: Iterable[Tile]) -> None:
        """Refuse a call that would go past a slot's pages, before any layer has stored a row of it."""
        for tile in tiles:
            count = len(self._tables[tile.slot].pages)
            if tile.end > count * PAGE:
                text = f"slot {tile.slot} has {count} pages of {PAGE} tokens, too few for {tile.end}"
                raise ContextError(f"{text}: bind more pages to it")

    def layer(self, index: int) -> LayerState:
        """The memory of layer `index`; the MTP block is the one after the last."""
        return self._layers[index]

    @torch.inference_mode()
    def blocks(self, pages: Sequence[int]) -> list[bytes]:
        """The stored form of full pages, `block_bytes` each."""
        if not pages:
            return []
        index = self._index(pages)
        rows = [(form, torch.cat([s.rows[index] for s in stores], 1)) for form, stores in self._planes]
        planes = [form.pack(r.flatten(0, 1)).view(len(pages), -1) for form, r in rows]
        empty = torch.empty(len(pages), 0, dtype=torch.uint8)
        return [row.tobytes() for row in torch.cat((*planes, empty.to(self.device)), 1).cpu().numpy()]

    @torch.inference_mode()
    def load_blocks(self, pages: Sequence[int], blocks: Sequence[bytes]) -> None:
        """Fill pages with what `blocks` gave."""
        index = self._index(pages)
        stored = self._bytes(b"".join(blocks)).view(len(pages), -1)
        for (form, stores), plane in zip(self._planes, stored.split(self._plane_sizes(), 1), strict=True):
            rows = form.unpack(plane.reshape(-1, form.size)).unflatten(0, (len(pages), -1))
            for store, part in zip(stores, rows.split([s.per_page for s in stores], 1), strict=True):
                store.rows[index] = part

    def holds(self, slot: int, at: int) -> bool:
        """Whether the slot still has the rows of a state at `at`, a position that its sequence has reached."""
        return all(r.base[slot] <= at - kept.count(at) for kept in self._kept for r in kept.recents)

    @torch.inference_mode()
    def state(self, slot: int, at: int) -> bytes:
        """What the slot's sequence needs to go on at `at`, a multiple of 128, `state_bytes(at)`. Where it `holds`."""
        assert at > 0 and at % PAGE == 0, f"{at} is no resume point"
        return torch.cat([kept.take(slot, at) for kept in self._kept]).cpu().numpy().tobytes()

    @torch.inference_mode()
    def load_state(self, slot: int, at: int, state: bytes) -> None:
        """Put what `state` gave into a slot, whose sequence then goes on at `at`."""
        for recent in (r for layer in self._layers for r in layer.recents.values()):
            recent.put(slot, at, recent.rows[slot, :0])
        parts = self._bytes(state).split([kept.size(at) for kept in self._kept])
        for kept, part in zip(self._kept, parts, strict=True):
            kept.put(slot, at, part)

    def _make(self, config: ModelConfig, numerics: Numerics, ratio: int) -> _Layer:
        dims = {"compressor": config.head_dim} if ratio else {}
        dims |= {"indexer": config.index_head_dim} if ratio == 4 else {}
        layer = _Layer(self._tables)
        layer.recents["window"] = Recent(self.slots, config.head_dim, numerics.dtype, self.device)
        for name, dim in dims.items():
            width = (4 if ratio == 4 else 2) * dim
            layer.recents[name] = Recent(self.slots, width, torch.float32, self.device)
            layer.stores[name] = _Store(self.pages, ratio, dim, numerics.dtype, self.device)
        return layer

    def _stores(self, config: ModelConfig, numerics: Numerics) -> Iterator[tuple[Packing, list[_Store]]]:
        """The stores of every layer, by how their rows are stored."""
        for name, form in (("compressor", key_value_rows(config, numerics)), ("indexer", index_keys(config, numerics))):
            yield form, [layer.stores[name] for layer in self._layers if name in layer.stores]

    def _states(self, config: ModelConfig, numerics: Numerics, ratios: Sequence[int]) -> Iterator[_Kept]:
        """What a state has: every layer's window, and the tails of those whose compressors overlap."""
        windows = [layer.recents["window"] for layer in self._layers]
        yield _Kept(key_value_rows(config, numerics), config.sliding_window, windows)
        for name, dim in (("compressor", config.head_dim), ("indexer", config.index_head_dim)):
            tails = [layer.recents[name] for layer, ratio in zip(self._layers, ratios, strict=True) if ratio == 4]
            yield _Overlap(Raw(2 * dim, torch.float32), _OVERLAP, tails)

    def _plane_sizes(self) -> list[int]:
        return [form.size * sum(store.per_page for store in stores) for form, stores in self._planes]

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.long, device=self.device)

    def _bytes(self, data: bytes) -> Tensor:
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(self.device)
