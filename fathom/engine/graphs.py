"""Decode steps as CUDA graphs: one token of every running sequence, no launch from the host but the graph's own.

A graph is captured for each of a few batch sizes; a step takes the smallest that holds it and fills the rest with an
idle slot of its own. Whatever depends on the step (tokens, positions, slots, pages) is in device tensors that are
written before the graph is launched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.engine.cache import PagedCache
from fathom.kernels import dispatch
from fathom.model.batch import Batch
from fathom.model.transformer import Transformer

_log = logging.getLogger("fathom.engine")
SIZES = (1, 2, 4, 8, 16, 32)
_WARM_UP = 2


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    where: Tensor
    logits: Tensor


class Graphs:
    """The decode steps of one model over one cache, whose last slot is nobody's: it fills up batches."""

    def __init__(self, model: Transformer, cache: PagedCache, sizes: Sequence[int] = SIZES) -> None:
        self.model, self.cache, self._idle = model, cache, cache.slots - 1
        self._captured: dict[int, _Captured] = {}
        self.sizes = tuple(size for size in sizes if size < cache.slots) or (1,)

    @staticmethod
    def of(model: Transformer, cache: PagedCache, say: Callable[[str], None] = _log.info) -> Graphs | None:
        """Captured for all sizes; None, with the reason said, where there are no kernels for it."""
        if cache.device.type != "cuda" or not dispatch.on(cache.device):
            return None
        if not _fits(model):
            say("decode without CUDA graphs: the sizes of this model's heads have no kernels")
            return None
        graphs = Graphs(model, cache)
        try:
            for size in graphs.sizes:
                graphs.capture(size)
                say(f"decode graph of {size} captured")
        except RuntimeError as error:
            torch.cuda.synchronize(cache.device)
            say(f"decode without CUDA graphs: {str(error).splitlines()[0]}")
            return None
        return graphs

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Record the step of `size` sequences."""
        device = self.cache.device
        tokens = torch.zeros(size, dtype=torch.int64, device=device)
        where = torch.zeros(2, size, dtype=torch.int32, device=device)
        where[1] = self._idle
        self.cache.steps.room([self._idle], [0])
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step(tokens, where)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(tokens, where)
        self._captured[size] = _Captured(graph, tokens, where, logits)

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> Tensor:
        """float32 logits [B, V] on the device of the B sequences' next tokens. The next run overwrites them."""
        count = len(tokens)
        size = next(s for s in self.sizes if s >= count)
        captured, rest = self._captured[size], size - count
        self.cache.steps.room(slots, positions)
        captured.tokens.copy_(torch.tensor([*tokens, *[0] * rest]), non_blocking=True)
        where = [[*positions, *[0] * rest], [*slots, *[self._idle] * rest]]
        captured.where.copy_(torch.tensor(where, dtype=torch.int32), non_blocking=True)
        captured.graph.replay()
        return captured.logits[:count]

    def _step(self, tokens: Tensor, where: Tensor) -> Tensor:
        return self.model.logits(self.model(tokens, Batch.tokens(where[0], where[1]), self.cache))


def _fits(model: Transformer) -> bool:
    """Whether the kernels have this model's sizes: halves and fronts of rows in whole blocks."""
    config = model.config
    front = config.head_dim - config.qk_rope_head_dim
    powers = all(size & (size - 1) == 0 for size in (config.head_dim, config.index_head_dim))
    return powers and front % 64 == 0 and model.numerics.dtype == torch.bfloat16
