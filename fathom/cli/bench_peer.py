"""Decode beside transformers on the same GPU: the same weights, the same prompt, tokens one after the other.

Both sides are timed by the clock, from a token id to the next one on the host: theirs launches every op, ours replays a
graph. Their weights are ours, dequantised to BF16; ours are computed on as stored, with activations quantised.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any

from fathom.cli.bench_decode import RUNS
from fathom.cli.bench_device import DeviceJob, Measured, inference, model_on
from fathom.cli.bench_prefill import Prompt, random_ids, seconds_of
from fathom.cli.bench_run import ROOT, peer_script
from fathom.config import ModelConfig
from fathom.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fathom.model.transformer import Transformer

_ROOM = 128


def measure_peer(job: DeviceJob, config: ModelConfig, place: torch.device) -> dict[str, Any]:
    """The part of a report that is measured: a row for each context. Fewer experts where all of them do not fit."""
    import torch

    if job.ranks > 1 or not job.synthetic:
        raise ConfigError("--peer on a GPU compares whole models of random weights: use --synthetic, not --rank-of-two")
    peer_script(str(job.peer))
    sys.path.insert(0, str(ROOT))
    side = import_module("benchmarks.peers.transformers_gpu").Theirs
    while True:
        try:
            rows = _rows(job, config, place, side)
            return {"peer_version": _version(), "experts": config.n_routed_experts, "rows": rows}
        except torch.OutOfMemoryError:
            if config.n_routed_experts // 2 < config.num_experts_per_tok:
                raise
            config = replace(config, n_routed_experts=config.n_routed_experts // 2)
        torch.cuda.empty_cache()


def _rows(job: DeviceJob, config: ModelConfig, place: torch.device, side: Any) -> list[dict[str, Any]]:
    with inference():
        ours, _, _ = model_on(job, config, place)
        theirs = side(ours, place)
        return [_row(job, ours, theirs, context, place) for context in job.contexts]


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _row(job: DeviceJob, ours: Transformer, theirs: Any, context: int, place: torch.device) -> dict[str, Any]:
    import torch

    ids = random_ids(ours.config, context)
    other = theirs.prefill(torch.tensor(ids, device=place))
    took = _steps(lambda token, at: theirs.step(torch.tensor([token], device=place)), other, context, job.runs or RUNS)
    logits, step = _ours(job, ours, ids, place)
    mine = _steps(step, logits, context, job.runs or RUNS)
    return {
        "context": context,
        **mine.row(),
        "peer_seconds": median(took.seconds),
        "peer_low": min(took.seconds),
        "peer_high": max(took.seconds),
        "ratio": median(took.seconds) / median(mine.seconds),
        "agreement": float(torch.cosine_similarity(logits.float(), other.float(), dim=0)),
    }


def _ours(
    job: DeviceJob, model: Transformer, ids: list[int], place: torch.device
) -> tuple[Tensor, Callable[[int, int], Tensor]]:
    """Logits [V] after the prompt, and the step that goes on from there."""
    from fathom.engine.graphs import Graphs

    prompt = Prompt(model, place, ids, job.chunk, job.packed, room=_ROOM)
    graphs = Graphs(model, prompt.cache, [1])
    graphs.capture(1)
    return prompt.all()[0], lambda token, at: graphs.run([token], [at], [0])[0]


def _steps(step: Callable[[int, int], Tensor], logits: Tensor, at: int, runs: int) -> Measured:
    """Greedy steps from position `at` on; the first few do not count."""
    token, seconds = int(logits.argmax()), []

    def go() -> None:
        nonlocal token, at
        token, at = int(step(token, at).argmax()), at + 1

    for _ in range(runs + 3):
        seconds.append(seconds_of(go))
    return Measured(seconds[3:])
