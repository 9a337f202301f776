"""Sums over the ranks that hold one model, made where they are read: each rank writes its part into the others' memory.

A word carries two BF16 values and the number of its sum, in one store: whoever waits for it looks at its own memory,
and nothing else is exchanged. The kernel that reads a sum makes it (`streams_cuda.after`), or one of its own does. A
sum's bits are those of `reduce(torch.add, parts)`: they do not depend on what else is summed. Every rank makes the same
sums in the same order. The protocol stands in common.cuh.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fathom.kernels.cuda import compiles, kernel, pointer

WORDS, BLOCKS, MOST_RANKS = 128, 2048, 8
_MOST_PAIRS = WORDS * BLOCKS
_RESIDENT = 4
"""Blocks that a multiprocessor surely holds at once: no block may wait for one that has no place."""


class _Box(ctypes.Structure):
    _fields_ = [
        ("places", ctypes.c_uint64 * MOST_RANKS),
        ("numbers", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
    ]


class Mailbox:
    """One rank's. places: the addresses of every rank's words (`words`), its own among them, as this process sees them;
    all are zero before the first sum. words: what this object keeps alive."""

    def __init__(self, rank: int, places: Sequence[int], words: Tensor) -> None:
        self.rank, self.ranks, self.device = rank, len(places), words.device
        self._words = words
        self._numbers = torch.zeros(BLOCKS, dtype=torch.int32, device=words.device)
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        own = (ctypes.c_uint64 * MOST_RANKS)(*places)
        self.argument = _Box(own, self._numbers.data_ptr(), self._stop.data_ptr(), rank, self.ranks)

    def takes(self, part: Tensor) -> bool:
        """Whether a part can be summed here."""
        pairs, odd = divmod(part.numel(), 2)
        return part.dtype == torch.bfloat16 and not odd and 0 < pairs <= _MOST_PAIRS

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, in one launch."""
        part = part.contiguous()
        out, pairs = torch.empty_like(part), part.numel() // 2
        blocks = -(-pairs // WORDS)
        grid = min(blocks, resident(self.device))
        run = kernel("mailbox.cu", "add_up", self.device, EACH=_power(-(-blocks // grid)))
        run((grid, 1), WORDS, self.device, pointer(part), pointer(out), self.argument, ctypes.c_int(pairs))
        return out

    def give_up(self) -> None:
        """Sums that wait for another rank, and all later ones, end with whatever is there. Any thread."""
        self._stop.fill_(1)


NO_BOX = _Box()
"""What a kernel is given where there is one rank."""


def words(ranks: int) -> int:
    """Words of 8 bytes that a rank's mailbox has."""
    return 2 * ranks * BLOCKS * WORDS


def works(device: torch.device, ranks: int) -> bool:
    """Whether ranks on devices like this one can sum so."""
    return ranks <= MOST_RANKS and compiles(device, "mailbox.cu")


@lru_cache(maxsize=8)
def resident(device: torch.device) -> int:
    """Blocks of a grid that may wait for others."""
    return _RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
