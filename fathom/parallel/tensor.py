"""One process a GPU: the sums over ranks that the plan leaves open, as torchrun's processes make them.

Small sums go through symmetric memory: every rank reads the others' parts itself, in one launch, which a CUDA graph can
hold. Large ones, and those on a CPU, go through the process group.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 1 << 18
"""Bytes up to which one launch is faster than the process group."""


class Ranks:
    """The process group that torchrun's environment describes, joined; this process computes on `device`."""

    def __init__(self, kind: str = "cuda") -> None:
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        assert dist.group.WORLD is not None
        self._group = dist.group.WORLD.group_name
        self._shared = self._meet() if kind == "cuda" else None

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts; the part may be overwritten."""
        if self._shared is not None and part.nbytes <= SMALL and part.dtype == torch.bfloat16:
            room = self._shared[: part.numel()].view(part.shape)
            return torch.ops.symm_mem.one_shot_all_reduce_copy(room, part.contiguous(), "sum", self._group)
        part = part.contiguous()
        dist.all_reduce(part)
        return part

    def gathered(self, part: Tensor) -> Tensor:
        """All ranks' parts end to end along the last axis: logits."""
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, -1)

    def _meet(self) -> Tensor:
        """Memory that all ranks of a host see."""
        import torch.distributed._symmetric_memory as symmetric

        shared = symmetric.empty(SMALL // 2, dtype=torch.bfloat16, device=self.device)
        symmetric.rendezvous(shared, self._group)
        return shared

    def leave(self) -> None:
        """Part from the group."""
        dist.destroy_process_group()
