"""Sums over the ranks that hold one model, made where they are read: each rank writes its part into the others' memory.

A word carries two BF16 values and the number of its sum, in one store: whoever waits for it looks at its own memory,
and nothing else is exchanged. The kernel that reads a sum makes it (`streams_cuda.after`), or one of its own does. A
sum's bits are those of `reduce(torch.add, parts)`: they do not depend on what else is summed. Every rank makes the same
sums in the same order. The protocol stands in common.cuh.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.kernels.cuda import KernelError, compiles, kernel, pointer

_log = logging.getLogger("fathom.kernels")
_FILE = "mailbox.cu"
WORDS, BLOCKS, MOST_RANKS = 128, 2048, 8
"""As common.cuh has them."""
_MOST_PAIRS = WORDS * BLOCKS
_RESIDENT = 4
"""Blocks of a multiprocessor, by the kernels' launch bounds."""


class _Box(ctypes.Structure):
    _fields_ = [
        ("places", ctypes.c_uint64 * MOST_RANKS),
        ("numbers", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
    ]


class Mailbox:
    """One rank's.

    places: the addresses of every rank's words (`words`), its own among them, as this process sees them; all are zero
    before the first sum. words: its own, to be kept. most_blocks: of a grid that waits; by_readers: whether who reads a
    sum may make it. Both are the same on all ranks: they decide which kernel makes a sum, and each lays the words out
    in its way.
    """

    def __init__(
        self, rank: int, places: Sequence[int], words: Tensor, most_blocks: int, by_readers: bool = True
    ) -> None:
        self.rank, self.ranks, self.device, self.most_blocks = rank, len(places), words.device, min(most_blocks, BLOCKS)
        self.by_readers = by_readers
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
        grid = min(blocks, self.most_blocks)
        run = kernel(_FILE, "add_up", self.device, EACH=_power(-(-blocks // grid)))
        run((grid, 1), WORDS, self.device, pointer(part), pointer(out), self.argument, ctypes.c_int(pairs))
        return out

    def give_up(self) -> None:
        """Sums that wait for another rank, and all later ones, end with whatever is there. Any thread."""
        self._stop.fill_(1)


NO_BOX = _Box()
"""What a kernel is given where there is one rank."""


class Unsummed(NamedTuple):
    """A sum over ranks that its reader makes: what this rank has of it, and how it gets the rest."""

    own: Tensor
    box: Mailbox


def whole(y: Tensor | Unsummed) -> Tensor:
    """The sum, in a launch of its own. The same bits."""
    return y.box.sum(y.own) if isinstance(y, Unsummed) else y


def words(ranks: int) -> int:
    """Words of 8 bytes that a rank's mailbox has."""
    return 2 * ranks * BLOCKS * WORDS


def works(device: torch.device, ranks: int) -> bool:
    """Whether ranks on devices like this one can sum so."""
    if ranks > MOST_RANKS or not compiles(device, _FILE):
        return False
    try:
        return bool(kernel(_FILE, "add_up", device, EACH=1))
    except KernelError as error:
        _log.warning("sums over ranks: torch's, which are slower (%s)", error)
        return False


def resident(device: torch.device) -> int:
    """Blocks that a device surely holds at once: none of a grid may wait for one that has no place."""
    return _RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
