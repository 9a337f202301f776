"""One process a GPU: the sums over ranks that the plan leaves open, as torchrun's processes make them.

Small sums go through symmetric memory, within kernels that a CUDA graph can hold: from Hopper on ours, where the kernel
that reads a sum makes it (`kernels.mailbox`), else torch's. Large ones, and those on a CPU, go through the process
group, whose work no graph holds: it could not end then. Either way a sum does not depend on what else is summed with
it: of two parts there is only one, and more are added in the order of the ranks.
"""

from __future__ import annotations

import os
import socket
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.errors import ConfigError
from fathom.kernels import mailbox
from fathom.kernels.mailbox import Mailbox, Unsummed

_HOST = "127.0.0.1"
SMALL = 1 << 19
"""Bytes of a sum by torch's launch: a decode step's is below, of every published model, and a prompt's above."""


def meeting_place(count: int, port: int = 0) -> Any:
    """A store for `count` processes of this machine. The first opens it at a free port; the others come there."""
    if port:
        return dist.TCPStore(_HOST, port, count, False)  # type: ignore[attr-defined]
    with socket.create_server((_HOST, 0)) as listening:  # the store's own would listen beyond this machine
        port, own = listening.getsockname()[1], os.dup(listening.fileno())
    return dist.TCPStore(  # type: ignore[attr-defined]
        _HOST, port, count, True, wait_for_workers=False, master_listen_fd=own
    )


class Ranks:
    """This process among `count` that hold one model, joined; it computes on `device`. On a GPU each has its own.

    store: where the processes of one host meet; without it, torchrun's environment describes them.
    Raises ConfigError in a process that is a rank already, and without that GPU.
    """

    def __init__(self, kind: str = "cuda", rank: int = 0, count: int = 1, store: Any = None) -> None:
        if dist.is_initialized():
            raise ConfigError("this process is a rank of a model already: load the second one in another process")
        local = rank
        if store is None:
            rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        else:  # whoever brings the store sees to it that nobody waits for who is gone: NCCL would abort the process
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
        if kind == "cuda" and local >= torch.cuda.device_count():
            raise ConfigError(f"rank {rank} of {count} needs GPU {local}, and torch sees {torch.cuda.device_count()}")
        self.rank, self.count = rank, count
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=count)
        assert dist.group.WORLD is not None
        self._group = dist.group.WORLD.group_name
        self._box: Mailbox | None = None
        self._shared: Tensor | None = None
        if kind == "cuda":
            self._open()

    def sum_later(self, part: Tensor) -> Tensor | Unsummed:
        """`sum`, which may be left to its reader."""
        later = self._box and self._box.by_readers and self._box.takes(part)
        return Unsummed(part, self._box) if self._box and later else self.sum(part)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts; the part may be overwritten."""
        if self._box and self._box.takes(part):
            return self._box.sum(part)
        if self._shared is not None and part.nbytes <= SMALL and part.dtype == torch.bfloat16:
            room = self._shared[: part.numel()].view(part.shape)
            return torch.ops.symm_mem.one_shot_all_reduce_copy(room, part.contiguous(), "sum", self._group)
        part = part.contiguous()
        if self.count > 2:
            return reduce(torch.add, self._all(part))
        dist.all_reduce(part)
        return part

    def gathered(self, part: Tensor, axis: int = -1) -> Tensor:
        """All ranks' parts end to end along an axis."""
        return torch.cat(self._all(part.contiguous()), axis)

    def _all(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.count)]
        if part.numel():
            dist.all_gather(parts, part)
        return parts

    def _open(self) -> None:
        """The memory in which small sums are made. Raises ConfigError where the ranks cannot see each other's."""
        try:
            if mailbox.works(self.device, self.count):
                self._box = self._posted()
            else:
                self._shared, _ = self._meet(SMALL // 2, torch.bfloat16)
        except RuntimeError as error:
            dist.destroy_process_group()
            why = str(error).splitlines()[0]
            raise ConfigError(f"the {self.count} GPUs of a model must see each other's memory ({why})") from error

    def _posted(self) -> Mailbox:
        from fathom.kernels import streams_cuda

        words, seen = self._meet(mailbox.words(self.count), torch.int64)
        places = [seen.get_buffer(rank, words.shape, words.dtype).data_ptr() for rank in range(self.count)]
        assert places[self.rank] == words.data_ptr(), "symmetric memory that does not begin where its tensor does"
        words.zero_()
        own = [mailbox.resident(self.device), int(streams_cuda.sums(self.device, self.count))]
        least = torch.tensor(own, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN)  # before that nobody may write
        blocks, by_readers = least.tolist()
        made = Mailbox(self.rank, places, words, blocks, bool(by_readers))
        torch.cuda.synchronize(self.device)
        return made

    def _meet(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Memory that all ranks of a host see, and how."""
        import torch.distributed._symmetric_memory as symmetric

        shared = symmetric.empty(count, dtype=dtype, device=self.device)
        return shared, symmetric.rendezvous(shared, self._group)

    def give_up(self) -> None:
        """Exchanges that wait for a rank which is gone end, with no result (not torch's small sums). Any thread."""
        if self._box:
            self._box.give_up()
        if self.device.type == "cuda":
            assert dist.group.WORLD is not None
            dist.group.WORLD.abort()

    def leave(self) -> None:
        """Part from the group."""
        dist.destroy_process_group()
