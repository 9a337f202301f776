"""`fathom bench` on a GPU: which model is put there, and how its work is timed.

Everything happens in this process. A model of random weights has every size of the real one and is made where it runs;
one rank of two (`parallel.plan`) computes what it would beside another one, without the sums over both, which are
counted and reported apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

from fathom.config import ModelConfig, preset
from fathom.errors import CheckpointError, ConfigError, ContextError

if TYPE_CHECKING:
    import torch

    from fathom.model.transformer import Transformer
    from fathom.parallel.tensor import Ranks

PRESETS = ("flash", "pro")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceJob:
    """What to measure on a GPU; see the flags of `fathom bench`.

    contexts: a row for each. ratios: the layers' compression ratios, layers: only the first so many; neither: all.
    ranks: of how many the model is one, alone or, among torchrun's processes, together with the others. chunk: tokens
    of a prompt that are computed together. runs: None for the mode's own number. max_context: what the
    cache is made for, as a server's is, where that is more than is measured: launches are cut for it.
    """

    mode: str
    model: str = "small"
    synthetic: bool = False
    layers: int | None = None
    ratios: tuple[int, ...] | None = None
    contexts: tuple[int, ...]
    batch: int = 1
    runs: int | None = None
    ranks: int = 1
    keys: str = "fp8"
    chunk: int = 8192
    peer: str | None = None
    device: str = "cuda"
    together: bool = False
    max_context: int | None = None

    @property
    def sums_apart(self) -> bool:
        """Whether the sums over ranks are left out of what is run."""
        return self.ranks > 1 and not self.together

    @property
    def packed(self) -> bool:
        """Whether two values of an index key share a byte."""
        return self.keys == "fp4"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of several runs."""

    seconds: list[float]

    def row(self) -> dict[str, Any]:
        """For a report."""
        some = self.seconds
        return {"seconds": median(some), "low": min(some), "high": max(some), "runs": len(some)}


def measure(job: DeviceJob) -> dict[str, Any]:
    """The report of a job, ready for JSON: times in seconds. Raises ConfigError, CheckpointError, ContextError."""
    config = whole_config(job)
    if job.mode == "prefill":
        from fathom.cli.bench_prefill import measure_prefill as measured
    elif job.peer:
        from fathom.cli.bench_peer import measure_peer as measured
    else:
        from fathom.cli.bench_decode import measure_decode as measured
    fits(job, config)
    place = ranks().device if job.together else gpu(job.device)
    return {**asked(job, config), **where(place), **measured(job, config, place)}


def whole_config(job: DeviceJob) -> ModelConfig:
    """The configuration of the whole model, of the layers that were asked for, without an MTP block."""
    if job.model in PRESETS and not job.synthetic:
        raise CheckpointError(f"'{job.model}' is a configuration without weights: add --synthetic, or give a folder")
    named = job.model in (*PRESETS, "small")
    config = preset(job.model) if named else ModelConfig.load(job.model)
    if job.synthetic:
        return _of_layers(config, _ratios(job, config))
    for flag, given in (("layers", job.layers), ("ratios", job.ratios)):
        if given:
            raise ConfigError(f"--{flag} changes the model: add --synthetic, for random weights of its sizes")
    return config


def fits(job: DeviceJob, config: ModelConfig) -> None:
    """Raises ContextError for a context that the model was not made for."""
    longest, asked = config.max_position_embeddings, max((*job.contexts, job.max_context or 0))
    if asked > longest:
        text = f"{asked} tokens do not fit the model's context of {longest}"
        raise ContextError(f"{text}: use a smaller --context")


def _ratios(job: DeviceJob, config: ModelConfig) -> tuple[int, ...]:
    whole = config.compress_ratios[: config.num_hidden_layers]
    if job.layers is not None and job.layers > len(whole):
        raise ConfigError(f"--layers {job.layers} is out of range: this model has {len(whole)}")
    return job.ratios or whole[: job.layers]


def _of_layers(config: ModelConfig, ratios: tuple[int, ...]) -> ModelConfig:
    hashed = min(config.num_hash_layers, len(ratios))
    changed = {"num_hidden_layers": len(ratios), "compress_ratios": ratios, "num_hash_layers": hashed}
    return replace(config, **changed, num_nextn_predict_layers=0, dspark=None)  # type: ignore[arg-type]


@cache
def ranks() -> Ranks:
    """All of torchrun's processes, met once."""
    from fathom.parallel.tensor import Ranks

    return Ranks()


def gpu(name: str) -> torch.device:
    """A GPU that is there, from now on the current one: events and profiles are of that. Raises ConfigError."""
    import torch

    from fathom.engine.llm import checked_device

    if not torch.cuda.is_available():
        raise ConfigError(
            "this benchmark needs a GPU and torch sees none: leave out --synthetic and --device for a CPU"
        )
    place = torch.device(checked_device(name))
    torch.cuda.set_device(place.index or 0)
    return place


def model_on(job: DeviceJob, config: ModelConfig, place: torch.device) -> tuple[Transformer, ModelConfig, float]:
    """The model with its weights in place, its own (the rank's) configuration, and the seconds that took."""
    import torch

    from fathom.checkpoint.synthetic import synthetic_model
    from fathom.model.layers import Numerics
    from fathom.parallel.plan import meet

    begin = time.perf_counter()
    if job.synthetic:
        model = synthetic_model(config, Numerics(torch.bfloat16, quantize=True), place, tp=job.ranks)
    else:
        model = _loaded(job, place)
    if job.together:
        meet(model, ranks())
    elif job.ranks > 1:
        model.share_index(0, job.ranks)
    torch.cuda.synchronize(place)
    return model, model.config, time.perf_counter() - begin


def _loaded(job: DeviceJob, place: torch.device) -> Transformer:
    from fathom.engine.llm import load_part, model_folder
    from fathom.engine.team import Part

    rank = ranks().rank if job.together else 0
    return load_part(Part(folder=model_folder(job.model), device=str(place), rank=rank, tp=job.ranks))


def asked(job: DeviceJob, config: ModelConfig) -> dict[str, Any]:
    """What a report says of its job."""
    names = ("mode", "model", "synthetic", "batch", "ranks", "together", "keys", "peer", "max_context")
    said = {name: getattr(job, name) for name in names}
    return {**said, "layers": config.num_hidden_layers, "ratios": config.compress_ratios[: config.num_hidden_layers]}


def where(place: torch.device) -> dict[str, Any]:
    """On what, and of what commit, figures are."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from fathom.cli.bench_run import machine

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name(place)
    return {"device": name, "cuda": torch.version.cuda, "triton": triton, **machine()}


def timed(call: Callable[[], object], runs: int, warm: int = 3) -> Measured:
    """Device time of each of several calls, by events."""
    import torch

    for _ in range(warm):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return Measured([begin.elapsed_time(end) / 1e3 for begin, end in events])


@contextmanager
def complete_launches() -> Iterator[None]:
    """Launches that wait for the one before to end: only so is a launch's duration its own."""
    from fathom.kernels import common_triton, cuda

    dependent, allowed = common_triton._dependent_launch, cuda.DEPENDENT
    common_triton._dependent_launch, cuda.DEPENDENT = (lambda device: False), False  # type: ignore[assignment]
    try:
        yield
    finally:
        common_triton._dependent_launch, cuda.DEPENDENT = dependent, allowed


def launches(call: Callable[[], object]) -> list[dict[str, Any]]:
    """What a call launches on the GPU: for each kernel how often, for how many seconds, and by how many in all its ends
    came after the latest end before them (the call's time is the sum of these). Most seconds first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        call()
        torch.cuda.synchronize()
    on_gpu = (e for e in profiled.events() or () if e.device_type.name == "CUDA")
    return by_kernel(sorted((e.time_range.start, e.time_range.end, e.name) for e in on_gpu))


def by_kernel(spans: Sequence[tuple[float, float, str]]) -> list[dict[str, Any]]:
    """The rows of `launches` from begins and ends in microseconds, in the order of the begins."""
    rows: dict[str, dict[str, Any]] = {}
    latest = spans[0][0] if spans else 0.0
    for begin, end, name in spans:
        row = rows.setdefault(name, {"kernel": name, "count": 0, "seconds": 0.0, "added": 0.0})
        row["count"] += 1
        row["seconds"] += (end - begin) / 1e6
        row["added"] += max(0.0, end - latest) / 1e6
        latest = max(latest, end)
    return sorted(rows.values(), key=lambda row: -float(row["seconds"]))


@contextmanager
def inference() -> Iterator[None]:
    """torch's inference mode, for files that do not import torch."""
    import torch

    with torch.inference_mode():
        yield
