"""Decode on a GPU: the step that an engine replays as a graph, over a cache filled to a context.

A step's time is that of the graph alone, head included, sampling and the host left out. A token that closes a block of
4, or of 128, also pools and stores its entry: each kind is timed at one position, and a row's time is the mean over 128
neighbouring tokens, of which each kind has its number. The experts that its tokens chose are counted, since fewer of
them would be less to read: `floor_seconds` is for tokens that choose independently, `own_floor_seconds` for what this
step's did.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Semaphore
from typing import TYPE_CHECKING, Any

from fathom.api import Event, FinishReason, GenerateRequest, SamplingParams
from fathom.cli.bench_device import DeviceJob, complete_launches, inference, launches, model_on, timed
from fathom.cli.bench_fill import filled
from fathom.cli.bench_floor import all_reduce_seconds, kept_bytes, step_bytes
from fathom.config import ModelConfig
from fathom.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fathom.engine.device_cache import DeviceCache
    from fathom.engine.graphs import Graphs
    from fathom.engine.stream import Blocking
    from fathom.model.transformer import Transformer

PAGE = 128
RUNS = 30


def measure_decode(job: DeviceJob, config: ModelConfig, place: torch.device) -> dict[str, Any]:
    """The part of a report that is measured: a row for each context, and the launches of the last one's step."""
    bench = DecodeBench(job, config, place)
    rows = [bench.row(context, job.batch) for context in job.contexts]
    return {**bench.about, "rows": rows, "launches": bench.launches}


class DecodeBench:
    """One model in place, to be measured at several contexts and batch sizes."""

    def __init__(self, job: DeviceJob, config: ModelConfig, place: torch.device) -> None:
        self.job, self.place = job, place
        self.model, self.config, loading = model_on(job, config, place)
        weights = sum(p.nbytes for p in self.model.parameters())
        self.about: dict[str, Any] = {"weights_bytes": weights, "weights_seconds": loading}
        self.launches: list[dict[str, Any]] = []

    def row(self, context: int, batch: int, breakdown: bool = True) -> dict[str, Any]:
        """One line of the table: the tokens that are the last of `context`, one of each of `batch` sequences."""
        begin = time.perf_counter()
        cache = self._cache(context, batch)
        with inference(), chosen_experts(self.model) as chosen:
            graphs = self._captured(cache, [batch])
            self._first(graphs, context, batch)
            ready = time.perf_counter() - begin
            filled(cache)
            kinds = [self._kind(graphs, position, often, batch) for position, often in closing(context)]
            experts = _distinct(_of_view(chosen, graphs, context))
            if breakdown:
                self.launches = self._breakdown(graphs, context, batch)
        seconds = sum(kind["seconds"] * kind["often"] for kind in kinds) / sum(kind["often"] for kind in kinds)
        return {
            "context": context,
            "batch": batch,
            "seconds": seconds,
            "low": min(kind["low"] for kind in kinds),
            "high": max(kind["high"] for kind in kinds),
            "runs": kinds[0]["runs"],
            "kinds": kinds,
            "ready_seconds": ready,
            **self._beside(cache, context, batch, seconds, experts),
        }

    def _kind(self, graphs: Graphs, position: int, often: int, batch: int) -> dict[str, Any]:
        """The step at one position, which stands for so many."""
        self._first(graphs, position + 1, batch)
        took = timed(graphs.at(batch, position + 1).graph.replay, self.job.runs or RUNS)
        return {"position": position, "often": often, **took.row()}

    def first_token(self, sizes: Sequence[int], context: int = 8192) -> dict[str, Any]:
        """Seconds from weights in place to a first token: a cache, the graphs of all sizes, a short prompt, a step."""
        from fathom.engine.runner import DeviceRunner

        begin = time.perf_counter()
        cache = self._cache(context, max(sizes))
        with inference():
            graphs = self._captured(cache, sizes)
            DeviceRunner(self.model, cache, graphs).warm_up(min(context, 4096))
            self._first(graphs, 2 * PAGE + 2, 1)
        captured = len(sizes) * len(graphs.views)
        return {"seconds": time.perf_counter() - begin, "sizes": list(sizes), "graphs": captured}

    def _cache(self, context: int, batch: int) -> DeviceCache:
        """Room for the sequences, each with pages of its own."""
        from fathom.engine.device_cache import DeviceCache

        each, most = -(-context // PAGE), max(context, self.job.max_context or 0)
        pages = max(batch * each, -(-most // PAGE))
        cache = DeviceCache(self.config, batch, pages, -(-most // PAGE) * PAGE, self.place, self.job.packed)
        for slot in range(batch):
            cache.bind(slot, list(range(slot * each, (slot + 1) * each)))
        return cache

    def _captured(self, cache: DeviceCache, sizes: Sequence[int]) -> Graphs:
        from fathom.engine.graphs import Graphs

        graphs = Graphs(self.model, cache, sizes)
        for size in sizes:
            graphs.capture(size)
        return graphs

    def _first(self, graphs: Graphs, context: int, batch: int) -> None:
        """A step whose tokens come back to the host."""
        vocabulary = self.config.vocab_size
        tokens = [(7919 * (slot + 1)) % vocabulary for slot in range(batch)]
        logits = graphs.run(tokens, [context - 1] * batch, list(range(batch)))
        logits.argmax(-1).cpu()
        if not bool(logits.isfinite().all()):
            raise ConfigError("the step gave logits that are not finite: its time would mean nothing")

    def _breakdown(self, graphs: Graphs, context: int, batch: int) -> list[dict[str, Any]]:
        """The launches of a step of the most frequent kind: what each adds as they overlap, and each alone."""
        end = max(closing(context), key=lambda kind: kind[1])[0] + 1
        self._first(graphs, end, batch)
        added = {row["kernel"]: row["added"] for row in launches(graphs.at(batch, end).graph.replay)}
        with complete_launches():
            graphs.capture(batch)
            self._first(graphs, end, batch)
            alone = launches(graphs.at(batch, end).graph.replay)
        return [{**row, "added": added.get(row["kernel"])} for row in alone]

    def _beside(
        self, cache: DeviceCache, context: int, batch: int, seconds: float, experts: float | None
    ) -> dict[str, Any]:
        """What a measured time is held against."""
        ranks, fp8 = self.job.ranks, not self.job.packed
        floor = step_bytes(self.config, context, batch, tp=ranks, fp8_keys=fp8)
        own = step_bytes(self.config, context, batch, tp=ranks, fp8_keys=fp8, experts=experts)
        sums = all_reduce_seconds(self.config, batch) if self.job.sums_apart else 0.0
        kept, other = kept_bytes(self.config, context, fp8)
        return {
            "all_reduce_seconds": sums,
            "tokens_per_second": batch / seconds,
            "tokens_per_second_with_sums": batch / (seconds + sums),
            "floor_seconds": floor.seconds,
            "own_floor_seconds": own.seconds,
            "experts": experts,
            "bytes_per_second": own.total / seconds,
            "kv_bytes": -(-context // PAGE) * cache.page_bytes + cache.slot_bytes,
            "kv_counted": kept,
            "kv_of_v32": other,
        }


def through_engine(engine: Blocking, vocabulary: int, context: int, batch: int, tokens: int = 128) -> dict[str, Any]:
    """A step of `batch` answers after `context` tokens as an engine makes it: planned, computed, sampled and told.

    Its time is the median gap between one answer's tokens while all of them come.

    engine: what has `submit`, with room for them and no other work. Raises ConfigError with what an answer failed of.
    """
    told, errors = [list[float]() for _ in range(batch)], list[str]()
    rng = random.Random(batch)
    done, params = Semaphore(0), SamplingParams(max_tokens=tokens + 8 * batch, temperature=0.0)
    for times in told:
        request = GenerateRequest(prompt_ids=rng.choices(range(3, vocabulary), k=context), params=params)
        engine.submit(request, partial(_timed, times, errors, done))
    for _ in told:
        done.acquire()
    if errors:
        raise ConfigError(errors[0])
    begin, end = max(times[0] for times in told), min(times[-1] for times in told)
    inside = [at for at in told[0] if begin <= at <= end]
    gaps = [after - before for before, after in itertools.pairwise(inside)]
    if len(gaps) < tokens // 2:
        raise ConfigError(f"only {len(gaps)} steps had all {batch} answers: their time would mean little")
    return {"context": context, "batch": batch, "seconds": statistics.median(gaps), "steps": len(gaps)}


def _timed(times: list[float], errors: list[str], done: Semaphore, event: Event) -> None:
    if event.token is not None:
        times.append(time.perf_counter())
    if event.finish not in (None, FinishReason.LENGTH, FinishReason.STOP):
        errors.append(event.error or f"an answer ended: {event.finish}")
    if event.finish is not None:
        done.release()


def closing(context: int) -> list[tuple[int, int]]:
    """Of the last 128 positions of a context: one of each kind (it closes no block, one of 4, one of 128 too), and how
    many are of that kind."""
    places: dict[int, list[int]] = {}
    for position in range(max(0, context - PAGE), context):
        places.setdefault(sum((position + 1) % n == 0 for n in (4, PAGE)), []).append(position)
    return [(places[kind][-1], len(places[kind])) for kind in sorted(places)]


@contextmanager
def chosen_experts(model: Transformer) -> Iterator[list[Tensor]]:
    """Collects the expert ids [T, k] that routers choose while a graph is captured: a replay writes them anew."""
    import torch

    from fathom.model.moe import Gate

    kept: list[Tensor] = []

    def keep(module: Gate, given: object, out: tuple[Tensor, Tensor]) -> None:
        if torch.cuda.is_current_stream_capturing():
            kept.append(out[0])

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, Gate)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _of_view(chosen: Sequence[Tensor], graphs: Graphs, context: int) -> Sequence[Tensor]:
    """Those of the graph that a step after `context` tokens replays: one has been captured for each view."""
    each = len(chosen) // len(graphs.views)
    return chosen[each * graphs.view(context) :][:each]


def _distinct(chosen: Sequence[Tensor]) -> float | None:
    """Experts of a layer that a step reads, on average; None where routers were not asked as modules."""
    return sum(ids.unique().numel() for ids in chosen) / len(chosen) if chosen else None
