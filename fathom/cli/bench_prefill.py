"""Prefill on a GPU: a prompt through the engine's runner, chunk by chunk, from first token to the last one's logits.

A very long prompt may be sampled: chunks at evenly spaced depths are computed over a cache filled to there, and the
time of the prompt is the mean of theirs times their number. A report says which of the two it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fathom.cli.bench_decode import PAGE
from fathom.cli.bench_device import DeviceJob, Measured, inference, model_on
from fathom.cli.bench_fill import filled
from fathom.cli.bench_floor import all_reduce_seconds, prompt_seconds
from fathom.config import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fathom.model.transformer import Transformer


def measure_prefill(job: DeviceJob, config: ModelConfig, place: torch.device) -> dict[str, Any]:
    """The part of a report that is measured: a row for each prompt."""
    bench = PrefillBench(job, config, place)
    with inference():
        return {**bench.about, "rows": [bench.row(tokens, job.runs or _runs(tokens)) for tokens in job.contexts]}


def _runs(tokens: int) -> int:
    return 3 if tokens <= _LONG else 1


_WARM = 4
_LONG = 1 << 17
"""A prompt of more tokens is computed once, others several times."""


class PrefillBench:
    """One model in place, to be measured with prompts of several lengths."""

    def __init__(self, job: DeviceJob, config: ModelConfig, place: torch.device) -> None:
        self.job, self.place = job, place
        self.model, self.config, loading = model_on(job, config, place)
        weights = sum(p.nbytes for p in self.model.parameters())
        self.about: dict[str, Any] = {"weights_bytes": weights, "weights_seconds": loading}
        self.index_share = 1 / job.ranks

    def row(self, tokens: int, runs: int, samples: int = 0) -> dict[str, Any]:
        """One line of the table. samples: so many chunks alone, spread over the prompt; 0: the prompt, `runs` times."""
        prompt = Prompt(self.model, self.place, random_ids(self.config, tokens), self.job.chunk, self.job.packed)
        prompt.warm()
        if samples:
            filled(prompt.cache)
            chosen = [round((i + 0.5) * len(prompt.starts) / samples - 0.5) for i in range(samples)]
            chunks = [seconds_of(partial(prompt.chunk, at)) for at in chosen]
            took = Measured([sum(chunks) / samples * len(prompt.starts)])
        else:
            chunks = []
            took = Measured([seconds_of(prompt.all) for _ in range(runs)])
        return {
            "context": tokens,
            "chunk": self.job.chunk,
            **took.row(),
            **self._beside(tokens, took),
            "chunks": chunks,
        }

    def _beside(self, tokens: int, took: Measured) -> dict[str, Any]:
        """What a measured time is held against."""
        seconds, sizes = took.row()["seconds"], chunk_sizes(tokens, self.job.chunk)
        sums = sum(all_reduce_seconds(self.config, size) for size in sizes) if self.job.sums_apart else 0.0
        return {
            "all_reduce_seconds": sums,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_with_sums": tokens / (seconds + sums),
            "floor_seconds": prompt_seconds(self.config, tokens, index_share=self.index_share),
            "index_share": self.index_share,
        }


def chunk_sizes(tokens: int, chunk: int) -> list[int]:
    """Tokens of each chunk of a prompt."""
    return [min(chunk, tokens - start) for start in range(0, tokens, chunk)]


def random_ids(config: ModelConfig, tokens: int) -> list[int]:
    """A prompt, the same in every run."""
    from random import Random

    return Random(0).choices(range(config.vocab_size), k=tokens)


class Prompt:
    """One sequence in slot 0 of a cache of its own, and the engine's runner over it. room: for tokens after it."""

    def __init__(
        self, model: Transformer, place: torch.device, ids: Sequence[int], chunk: int, packed: bool, room: int = 0
    ) -> None:
        from fathom.engine.device_cache import DeviceCache
        from fathom.engine.graphs import Steps
        from fathom.engine.runner import DeviceRunner

        pages = -(-(len(ids) + room) // PAGE)
        self.cache = DeviceCache(model.config, 1, pages, pages * PAGE, place, packed)
        self.starts = list(range(0, len(ids), chunk))
        self._size = chunk
        self._runner = DeviceRunner(model, self.cache, Steps(model, self.cache))
        self._ids, self._pages = ids, list(range(pages))

    def chunk(self, number: int) -> Tensor:
        """Compute one chunk; the last gives logits [1, V], the others none."""
        from fathom.engine.runner import Work

        start, whole = self.starts[number], len(self._ids)
        end = min(start + self._size, whole)
        return self._runner.run([Work(0, self._pages, whole, start, self._ids[start:end], end == whole)])

    def all(self) -> Tensor:
        """Compute the prompt; logits [1, V] of its last token."""
        for number in range(len(self.starts)):
            logits = self.chunk(number)
        return logits

    def warm(self) -> None:
        """Compute chunks of every kind, so that kernels are compiled."""
        for number in sorted({0, *range(min(_WARM, len(self.starts))), len(self.starts) - 1}):
            self.chunk(number)


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock time of a call and of all that it started on the GPU."""
    import time

    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
