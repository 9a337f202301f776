"""Decode steps as CUDA graphs: one token of every running sequence, no launch from the host but the graph's own.

A graph is captured for each of a few batch sizes, where contexts may be long once more for sequences that are not. A
step takes the smallest that holds it and fills the rest with tokens of nobody's. Whatever depends on the step (tokens,
positions, slots, pages) is in device tensors that are written before the graph is launched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.engine.device_cache import DeviceCache
from fathom.model.batch import DECODE_TOKENS, Batch
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer

_log = logging.getLogger("fathom.engine")
SIZES = (1, 2, 4, 8, 16, 32)
MOST = SIZES[-1]
"""Sequences of a step at most: up to so many, one has the same bits."""
NEAR = 1 << 15
"""Tokens up to which a sequence is near: a choice takes one block, attention one cluster. No bit depends on it."""
_WARM_UP = 2
_NOBODY = -1


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    where: Tensor
    logits: Tensor


class Steps:
    """Decode steps of one model over one cache, launch by launch: what graphs do where there are none."""

    def __init__(self, model: Transformer, cache: DeviceCache) -> None:
        self.model, self.cache = model, cache
        self.views = [cache.within(NEAR), cache] if cache.max_context > NEAR else [cache]

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> Tensor:
        """float32 logits [B, V] on the device of B sequences' tokens; of one sequence at most 8, in order.

        No more than MOST. With graphs, the next run overwrites them.
        """
        for slot, position in zip(slots, positions, strict=True):
            self.cache.reach(slot, position + 1)
        return self._run(tokens, [list(positions), list(slots)])

    def view(self, end: int) -> int:
        """Which of the views a step takes whose longest sequence has so many tokens."""
        return int(len(self.views) > 1 and end > NEAR)

    def _run(self, tokens: Sequence[int], where: list[list[int]]) -> Tensor:
        device = self.cache.device
        there = torch.tensor(where, dtype=torch.int32, device=device)
        return self._step(torch.tensor(tokens, device=device), there, self.view(max(where[0]) + 1))

    def _step(self, tokens: Tensor, where: Tensor, view: int) -> Tensor:
        return self.model.logits(self.model(tokens, Batch.tokens(where[0], where[1]), self.views[view]))


class Graphs(Steps):
    """The same as graphs."""

    def __init__(self, model: Transformer, cache: DeviceCache, sizes: Sequence[int] = SIZES) -> None:
        super().__init__(model, cache)
        self._captured: dict[tuple[int, int], _Captured] = {}
        self.sizes = tuple(sizes)

    @staticmethod
    def of(model: Transformer, cache: DeviceCache, alone: bool = True) -> Steps:
        """Captured for all sizes; where that fails, the reason is said and steps go without.

        alone: no other rank takes the same steps; with others, the failure is raised.
        """
        if cache.device.type != "cuda":
            return Steps(model, cache)
        if _without_kernels(model):
            _log.warning("no kernel for experts that are not FP4: torch computes them, slowly, and no step is a graph")
            return Steps(model, cache)
        graphs = Graphs(model, cache, [size for size in SIZES if size < 2 * max(cache.slots, DECODE_TOKENS)])
        try:
            for size in graphs.sizes:
                graphs.capture(size)
                _log.info("decode graph of %d captured", size)
        except RuntimeError as error:
            if not alone:
                raise
            torch.cuda.synchronize(cache.device)
            cause = error.__context__ or error  # the end of a broken capture fails as well
            _log.warning("decode without CUDA graphs: %s", str(cause).splitlines()[0])
            return Steps(model, cache)
        return graphs

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Record the step of `size` sequences."""
        for view in range(len(self.views)):
            self._captured[size, view] = self._recorded(size, view)

    def at(self, size: int, end: int) -> _Captured:
        """What was recorded for `size` sequences of at most so many tokens."""
        return self._captured[size, self.view(end)]

    def _recorded(self, size: int, view: int) -> _Captured:
        device = self.cache.device
        tokens = torch.zeros(size, dtype=torch.int64, device=device)
        where = torch.zeros(2, size, dtype=torch.int32, device=device)
        where[1] = _NOBODY
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step(tokens, where, view)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        # Left to itself it captures on a stream of the first model's device, and breaks with what other threads do.
        record = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(device), torch.cuda.stream(here), record:  # after a failure it does not go back there
            logits = self._step(tokens, where, view)
        return _Captured(graph, tokens, where, logits)

    def _run(self, tokens: Sequence[int], where: list[list[int]]) -> Tensor:
        count = len(tokens)
        size = next(s for s in self.sizes if s >= count)
        captured, rest = self.at(size, max(where[0]) + 1), size - count
        captured.tokens.copy_(torch.tensor([*tokens, *[0] * rest]), non_blocking=True)
        padded = [[*where[0], *[0] * rest], [*where[1], *[_NOBODY] * rest]]
        captured.where.copy_(torch.tensor(padded, dtype=torch.int32), non_blocking=True)
        captured.graph.replay()
        return captured.logits[:count]


def _without_kernels(model: Transformer) -> bool:
    return any(isinstance(module, Experts) and module.w13.dtype != torch.int32 for module in model.modules())
