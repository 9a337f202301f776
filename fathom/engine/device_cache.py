"""The cache as decode on a GPU reads it: bytes in planes, addressed on the device. Reference 5.1, 5.2.

As in `cache`, entries lie in pages of 128 tokens, recent rows in the slots of running sequences. Here every kind is
stored in its quantised form, recent rows are rings addressed by position, so that nothing is ever moved, and the page
tables are a device tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.engine.request import PAGE, pages_for
from fathom.errors import ContextError
from fathom.kernels.decode import Memory
from fathom.kernels.stored import Keys, Rows

REWIND = 8
"""Tokens that a sequence may step back (rejected drafts) without losing a row."""
_OVERLAP = 4


def window_ring(span: int) -> int:
    """Rows of the window's ring: the window at the last page border, the tokens since then, and a rewind."""
    return span + PAGE + REWIND


def tail_ring() -> int:
    """Rows of a tail: an open block of 128, or the block before the last page border, and a rewind."""
    return -(-(PAGE + REWIND + _OVERLAP) // 16) * 16


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

    def bind(self, slot: int, pages: Sequence[int]) -> None:
        """The slot's sequence has these pages, in order. To be called before a step whenever they changed.

        Raises ContextError for more pages than `max_context` takes.
        """
        if len(pages) > self.table.shape[1]:
            text = (
                f"{len(pages)} pages of {PAGE} tokens are more than this cache's {self.max_context} tokens of context"
            )
            raise ContextError(f"{text}: give it more context, or shorten the request")
        host = torch.tensor(pages, dtype=torch.int32)
        self.table[slot, : len(pages)].copy_(host.pin_memory() if self.table.is_cuda else host, non_blocking=True)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all layers together."""
        return sum(_bytes(t) // self.pages for m in self.layers for s in (m.entries, m.keys) if s for t in s.planes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot: windows and tails of all layers, and its page table."""
        recent = [t for m in self.layers for t in (*m.window.planes, m.tail, m.key_tail) if t is not None]
        return sum(_bytes(t) // self.slots for t in (*recent, self.table))

    @property
    def bytes(self) -> int:
        """Bytes of everything."""
        return self.pages * self.page_bytes + self.slots * self.slot_bytes

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
