"""Ranks that are threads of one process: `plan.Ranks` by a barrier."""

from __future__ import annotations

from threading import Barrier

import torch
from torch import Tensor


class Together:
    """Where `count` threads hand in their parts and get everyone's, in the order of the ranks."""

    def __init__(self, count: int) -> None:
        self.parts: list[Tensor] = [torch.empty(0)] * count
        self.barrier = Barrier(count)

    def all(self, rank: int, part: Tensor) -> list[Tensor]:
        self.parts[rank] = part.clone()
        self.barrier.wait(60)
        parts = list(self.parts)
        self.barrier.wait(60)
        return parts


class OfThreads:
    """One of them."""

    def __init__(self, rank: int, together: Together) -> None:
        self.rank, self.count, self._together = rank, len(together.parts), together

    def sum(self, part: Tensor) -> Tensor:
        return torch.stack(self._together.all(self.rank, part)).float().sum(0).to(part.dtype)

    def sum_later(self, part: Tensor) -> Tensor:
        return self.sum(part)

    def gathered(self, part: Tensor, axis: int = -1) -> Tensor:
        return torch.cat(self._together.all(self.rank, part), axis)
