"""How `fathom bench` measures: a child process for every side and dtype, all loaded, timed in turns.

Turns (ours, theirs, ours, theirs ...) let a machine's moods fall on both sides alike. Whatever the caller left open,
dtype and number of threads, is tried, each side for itself; what is half as fast as the side's best in the warm-up is
not tried again.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import IO, Any

from fathom.config import ModelConfig
from fathom.errors import CheckpointError, ConfigError, ContextError

ROOT = Path(__file__).parent.parent.parent
"""The clone, where there is one: `benchmarks/peers/` is no part of the package."""

DTYPES = ("fp32", "bf16")
_WARM_TOKENS = 8
_TOO_SLOW = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to measure: `mode` is decode (after `context` tokens) or prefill (of `context` tokens).

    threads, dtype: None tries one thread and all cores, float32 and BF16.
    """

    mode: str
    context: int = 512
    batch: int = 1
    tokens: int = 64
    runs: int = 5
    threads: int | None = None
    dtype: str | None = None
    peer: str | None = None

    @property
    def variants(self) -> list[tuple[str, int]]:
        """The dtypes and thread counts to try."""
        threads = [self.threads] if self.threads else sorted({1, cores()})
        return [(dtype, t) for dtype in ([self.dtype] if self.dtype else DTYPES) for t in threads]

    def seconds(self, answer: dict[str, Any]) -> float:
        """Of a prefill, or of one decode step on average."""
        steps = answer["steps"]
        return float(answer["prefill"] if self.mode == "prefill" else sum(steps) / len(steps))


def measure(folder: Path, job: Job) -> dict[str, Any]:
    """Run `job` on the checkpoint in `folder`; the report is ready for JSON, times in seconds, memory in bytes.

    With a peer both sides get one BF16 export of the weights, so that activations are not quantised on either side.
    Raises ConfigError, CheckpointError, ContextError.
    """
    config = ModelConfig.load(folder)
    prompts = _prompts(config, job)
    script = peer_script(job.peer) if job.peer else None
    load, where = os.getloadavg(), machine()
    with ExitStack() as stack:
        weights = stack.enter_context(_export(folder)) if script else folder
        contenders = _start(stack, weights, job, script)
        agreement = _warm_up(contenders, job, prompts)
        running = _fast_enough(contenders, job)
        for _ in range(job.runs):
            for contender in running:
                contender.run(prompts, job.tokens if job.mode == "decode" else 0)
        rows = [contender.row(config, job) for contender in running]
    best = {side: min((r for r in rows if r["side"] == side), key=lambda r: r["seconds"]) for side in _sides(rows)}
    ratio = best[job.peer]["seconds"] / best["fathom"]["seconds"] if job.peer else None
    asked = {name: getattr(job, name) for name in ("mode", "context", "batch", "tokens", "runs", "peer")}
    return {**asked, **where, "load": load, "rows": rows, "best": best, "ratio": ratio, "agreement": agreement}


def machine() -> dict[str, Any]:
    """Where and of what the figures are."""
    import torch

    return {"cpu": _cpu(), "cores": cores(), "torch": torch.__version__, "commit": _commit()}


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Child:
    """A side in a process of its own; see `bench_side`."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
        environment = {**os.environ, "PYTHONPATH": path}
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def hear(self) -> dict[str, Any]:
        """The next answer. Raises CheckpointError where there is none."""
        line = _open(self._process.stdout).readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended without a word"}
        if "error" in answer:
            raise CheckpointError(f"{self.name} cannot go on: {answer['error']}")
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """A request and its answer."""
        try:
            print(json.dumps(request), file=_open(self._process.stdin), flush=True)
        except BrokenPipeError:
            raise CheckpointError(f"{self.name} cannot go on: it ended without a word") from None
        return self.hear()

    def end(self) -> None:
        """Stop it, whatever it does."""
        self._process.kill()
        self._process.communicate()


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@dataclass
class _Contender:
    """A side with a dtype and a number of threads, and what its runs took."""

    side: str
    dtype: str
    threads: int
    child: _Child
    weights: dict[str, int]
    answers: list[dict[str, Any]] = field(default_factory=list)
    warm: float = 0.0

    def run(self, prompts: list[list[int]], tokens: int, logits: bool = False) -> dict[str, Any]:
        answer = self.child.ask(prompts=prompts, tokens=tokens, threads=self.threads, logits=logits)
        self.answers.append(answer)
        return answer

    def row(self, config: ModelConfig, job: Job) -> dict[str, Any]:
        """The line of a table."""
        seconds = [job.seconds(answer) for answer in self.answers]
        middle, tokens = median(seconds), job.batch * (job.context if job.mode == "prefill" else 1)
        chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** job.batch
        read = int(self.weights["always"] + chosen * self.weights["routed"]) if job.mode == "decode" else None
        return {
            "side": self.side,
            "dtype": self.dtype,
            "threads": self.threads,
            "seconds": middle,
            "low": min(seconds),
            "high": max(seconds),
            "tokens_per_second": tokens / middle,
            "read_bytes": read,
            "bytes_per_second": read / middle if read else None,
            "peak_bytes": max(answer["peak"] for answer in self.answers),
        }


def _start(stack: ExitStack, folder: Path, job: Job, script: Path | None) -> list[_Contender]:
    """Every side in every variant, sides in turns. Children load side by side."""
    commands = {"fathom": ["-m", "fathom.cli.bench_side"]} | ({job.peer: [str(script)]} if job.peer else {})
    children: dict[tuple[str, str], _Child] = {}
    for dtype in dict.fromkeys(dtype for dtype, _ in job.variants):
        for side, command in commands.items():
            child = _Child(side, [sys.executable, *command, str(folder), dtype])
            stack.callback(child.end)
            children[side, dtype] = child
    weights = {key: child.hear() for key, child in children.items()}
    return [
        _Contender(side, dtype, threads, children[side, dtype], weights[side, dtype])
        for dtype, threads in job.variants
        for side in commands
    ]


def _warm_up(contenders: Sequence[_Contender], job: Job, prompts: list[list[int]]) -> float | None:
    """A first run of everyone, which does not count; how far the sides' logits after the prompt are apart at most.

    That is the largest difference over the largest logit, each side in the first dtype that is tried.
    """
    first: dict[str, list[list[float]]] = {}
    for contender in contenders:
        tokens = min(job.tokens, _WARM_TOKENS) if job.mode == "decode" else 0
        answer = contender.run(prompts, tokens, logits=contender.side not in first)
        first.setdefault(contender.side, answer["logits"])
        contender.warm = job.seconds(answer)
        contender.answers.clear()
    if len(first) < 2:
        return None
    pairs = [pair for a, b in zip(*first.values(), strict=True) for pair in zip(a, b, strict=True)]
    return max(abs(a - b) for a, b in pairs) / max(abs(a) for a, _ in pairs)


def _fast_enough(contenders: Sequence[_Contender], job: Job) -> list[_Contender]:
    best = {c.side: min(o.warm for o in contenders if o.side == c.side) for c in contenders}
    return [c for c in contenders if c.warm <= _TOO_SLOW * best[c.side]]


def _sides(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["side"] for row in rows))


def _prompts(config: ModelConfig, job: Job) -> list[list[int]]:
    """Random ids, the same in every run. Raises ContextError."""
    longest, needed = config.max_position_embeddings, job.context + (job.tokens if job.mode == "decode" else 0)
    if needed > longest:
        raise ContextError(f"{needed} tokens do not fit the model's context of {longest}: use a smaller --context")
    rng = random.Random(0)
    return [[rng.randrange(config.vocab_size) for _ in range(job.context)] for _ in range(job.batch)]


@contextmanager
def _export(folder: Path) -> Iterator[Path]:
    """The checkpoint with all weights in BF16: itself, if it is so already."""
    from fathom.checkpoint.convert import convert
    from fathom.checkpoint.folder import Checkpoint

    if not Checkpoint(folder).quantised:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        convert(folder, Path(temporary) / "bf16", experts="bf16", linears="bf16")
        yield Path(temporary) / "bf16"


def peer_script(peer: str) -> Path:
    """The program that is the peer's side. Raises ConfigError."""
    from importlib.util import find_spec

    script = ROOT / "benchmarks" / "peers" / f"{peer}_peer.py"
    if not script.exists():
        raise ConfigError(f"--peer {peer} needs {script}: run from a clone of the repository")
    if find_spec(peer) is None:
        raise ConfigError(f"--peer {peer} is not installed: pip install 'fathom-v4[peers]'")
    return script


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _commit() -> str:
    """What the clone stood at when it was first asked."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
