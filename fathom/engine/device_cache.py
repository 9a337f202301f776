"""The engine's cache as a GPU's kernels read it: bytes in planes, addressed on the device. Reference 5.1, 5.2.

As in `cache`, entries lie in pages of 128 tokens, recent rows in the slots of running sequences. Here every kind is
stored in its quantised form, recent rows are rings addressed by position, so that nothing is ever moved, and the page
tables are a device tensor. Blocks and states, the stored forms of lower tiers, are the planes' own bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.engine.request import PAGE, pages_for
from fathom.errors import ContextError
from fathom.kernels import dispatch
from fathom.kernels.decode import Memory
from fathom.kernels.stored import BLOCK, Keys, Rows
from fathom.model.batch import Tile
from fathom.model.transformer import Transformer

REWIND = 8
"""Tokens that a sequence may step back (rejected drafts) without losing a row."""
_OVERLAP = 4


def window_ring(span: int) -> int:
    """Rows of the window's ring: the window at the last page border, the tokens since then, and a rewind."""
    return span + PAGE + REWIND


def tail_ring() -> int:
    """Rows of a tail: an open block of 128, or the block before the last page border, and a rewind."""
    return -(-(PAGE + REWIND + _OVERLAP) // 16) * 16


def unfit(model: Transformer) -> str:
    """Why the kernels cannot serve this model where it is; nothing: empty."""
    config, device = model.config, model.embed.weight.device
    front = config.head_dim - config.qk_rope_head_dim
    if device.type != "cuda" or not dispatch.on(device):
        return f"there are no kernels on {device}"
    if not model.numerics.quantize or model.numerics.dtype != torch.bfloat16:
        return "rows are stored as FP8, which this model's are not"
    if front % BLOCK or any(n & (n - 1) for n in (config.head_dim, config.index_head_dim)):
        return "the sizes of this model's heads have no kernels"
    return ""


@dataclass(frozen=True)
class _State:
    """The memory of one layer; only kernels read it."""

    memory: Memory

    def recent(self, name: str, tile: Tile, new: Tensor, first: int) -> Tensor:
        raise NotImplementedError

    def entries(self, name: str, tile: Tile, start: int, new: Tensor) -> Tensor:
        raise NotImplementedError


class DeviceCache:
    """`slots` running sequences of at most `max_context` tokens over `pages` pages.

    packed_keys: index keys as FP4, two values a byte, instead of e4m3. drafts: the MTP block's window as well.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        pages: int,
        max_context: int,
        device: torch.device | str,
        packed_keys: bool = False,
        drafts: bool = False,
    ) -> None:
        self.slots, self.pages, self.device = slots, pages, torch.device(device)
        self.max_context = min(max_context, pages * PAGE)
        self.table = torch.zeros(slots, pages_for(self.max_context), dtype=torch.int32, device=self.device)
        count = config.num_hidden_layers + (config.num_nextn_predict_layers if drafts else 0)
        self.layers = [self._layer(config, config.ratio(i), packed_keys) for i in range(count)]
        self.form = f"planes, {'FP4' if packed_keys else 'FP8'} keys"
        self._bound: list[list[int]] = [[] for _ in range(slots)]
        self._reached = [0] * slots

    def within(self, most: int) -> DeviceCache:
        """The same cache for steps whose sequences have at most so many tokens: launches are made for no more."""
        near = copy(self)
        near.layers = [replace(memory, longest=most) for memory in self.layers]
        return near

    def layer(self, index: int) -> _State:
        """The memory of layer `index`; the MTP block is the one after the last."""
        return _State(self.layers[index])

    def bind(self, slot: int, pages: Sequence[int]) -> None:
        """The slot's sequence has these pages, in order. To be called before a step whenever they changed.

        Raises ContextError for more pages than `max_context` takes.
        """
        if len(pages) > self.table.shape[1]:
            text = (
                f"{len(pages)} pages of {PAGE} tokens are more than this cache's {self.max_context} tokens of context"
            )
            raise ContextError(f"{text}: give it more context, or shorten the request")
        if self._bound[slot] == pages:
            return
        host = torch.tensor(pages, dtype=torch.int32)
        self.table[slot, : len(pages)].copy_(host.pin_memory() if self.table.is_cuda else host, non_blocking=True)
        self._bound[slot] = list(pages)

    def admit(self, tiles: Iterable[Tile]) -> None:
        """Refuse a call that would go past a slot's pages, before any layer has stored a row of it."""
        for tile in tiles:
            self.reach(tile.slot, tile.end)

    def reach(self, slot: int, end: int) -> None:
        """The slot's sequence is about to be stored up to position `end`. Raises ContextError without pages for it."""
        if end > len(self._bound[slot]) * PAGE:
            text = f"slot {slot} has {len(self._bound[slot])} pages of {PAGE} tokens, too few for {end}"
            raise ContextError(f"{text}: bind more pages to it")
        self._reached[slot] = end

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers together."""
        return sum(_bytes(t) // self.pages for m in self.layers for s in (m.entries, m.keys) if s for t in s.planes)

    block_bytes = page_bytes
    """Bytes of a block."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: windows and tails of all layers, and its page table."""
        recent = [t for m in self.layers for t in (*m.window.planes, m.tail, m.key_tail) if t is not None]
        return sum(_bytes(t) // self.slots for t in (*recent, self.table))

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return self.pages * self.page_bytes + self.slots * self.slot_bytes

    def state_bytes(self, at: int) -> int:
        """Bytes of a state at position `at`: the same from the window's size on."""
        return sum(rows * size for _, rows, size, _ in self._recents(at))

    @torch.inference_mode()
    def blocks(self, pages: Sequence[int]) -> list[bytes]:
        """The stored form of full pages, `block_bytes` each."""
        if not pages:
            return []
        index = self._index(pages)
        parts = [plane[index] for plane in self._pages()]
        empty = torch.empty(len(pages), 0, dtype=torch.uint8, device=self.device)
        return [row.tobytes() for row in torch.cat((*parts, empty), 1).cpu().numpy()]

    @torch.inference_mode()
    def load_blocks(self, pages: Sequence[int], blocks: Sequence[bytes]) -> None:
        """Fill pages with what `blocks` gave."""
        index, planes = self._index(pages), list(self._pages())
        stored = self._uploaded(b"".join(blocks)).view(len(pages), -1)
        for plane, part in zip(planes, stored.split([p.shape[1] for p in planes], 1), strict=True):
            plane[index] = part

    def holds(self, slot: int, at: int) -> bool:
        """Whether the slot still has the rows of a state at `at`, a position that its sequence has reached."""
        return self._reached[slot] - at <= PAGE + REWIND

    @torch.inference_mode()
    def state(self, slot: int, at: int) -> bytes:
        """What the slot's sequence needs to go on at `at`, a multiple of 128, `state_bytes(at)`. Where it `holds`."""
        assert at > 0 and at % PAGE == 0, f"{at} is no resume point"
        parts = []
        for ring, rows, _, halves in self._recents(at):
            kept = ring[slot, self._index([p % ring.shape[1] for p in range(at - rows, at)])]
            parts.append((kept.unflatten(1, (4, -1))[:, ::2] if halves else kept).flatten())
        return torch.cat(parts).cpu().numpy().tobytes()

    @torch.inference_mode()
    def load_state(self, slot: int, at: int, state: bytes) -> None:
        """Put what `state` gave into a slot, whose sequence then goes on at `at`."""
        recents = list(self._recents(at))
        parts = self._uploaded(state).split([rows * size for _, rows, size, _ in recents])
        for (ring, rows, _, halves), part in zip(recents, parts, strict=True):
            index = self._index([p % ring.shape[1] for p in range(at - rows, at)])
            kept = part.view(rows, -1)
            if halves:
                low = kept.unflatten(1, (2, 1, -1))
                kept = torch.cat((low, torch.zeros_like(low)), 2).flatten(1)
            ring[slot, index] = kept
        self._reached[slot] = at

    def _pages(self) -> Iterator[Tensor]:
        """The planes of all pages as uint8 [pages, bytes]."""
        for memory in self.layers:
            for store in (memory.entries, memory.keys):
                yield from (plane.view(torch.uint8).flatten(1) for plane in (store.planes if store else ()))

    def _recents(self, at: int) -> Iterator[tuple[Tensor, int, int, bool]]:
        """What a state at `at` has of each ring: the ring as uint8 [slots, rows, bytes], its last rows, bytes of one.

        Of a tail, which is (values, gates) x (low, high half), the next entry reads the low halves only: True.
        """
        for memory in self.layers:
            yield from ((p, min(memory.span, at), p.shape[2], False) for p in memory.window.planes)
            for tail in (memory.tail, memory.key_tail) if memory.ratio == 4 else ():
                if tail is not None:
                    ring = tail.view(torch.uint8)
                    yield ring, _OVERLAP, ring.shape[2] // 2, True

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def _uploaded(self, data: bytes) -> Tensor:
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(self.device)

    def _layer(self, config: ModelConfig, ratio: int, packed: bool) -> Memory:
        width, rope, span = config.head_dim, config.qk_rope_head_dim, config.sliding_window
        window = Rows.empty(self.slots, window_ring(span), width, rope, self.device)
        if not ratio:
            return Memory(0, span, window, self.table)
        entries, tail = Rows.empty(self.pages, PAGE // ratio, width, rope, self.device), self._tail(ratio, width)
        if ratio != 4:
            return Memory(ratio, span, window, self.table, tail, entries)
        keys = Keys.empty(self.pages, PAGE // ratio, config.index_head_dim, packed, self.device)
        return Memory(4, span, window, self.table, tail, entries, self._tail(4, config.index_head_dim), keys)

    def _tail(self, ratio: int, width: int) -> Tensor:
        size = 2 * width * (2 if ratio == 4 else 1)
        return torch.zeros(self.slots, tail_ring(), size, dtype=torch.float32, device=self.device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
