"""The loop: draw a batch, forward and backward, step, say how it goes, and never lose more than a few minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.errors import TrainError
from fathom.model.init import init_weights
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from fathom.skills.base import EFFORTS
from fathom.train.config import TrainConfig
from fathom.train.data import Feed, Packed, Renderer
from fathom.train.loss import balance, losses
from fathom.train.optim import Optimizer, learning_rate
from fathom.train.quantised import set_numerics, stored_weights

CHECKPOINT = "checkpoint.pt"
BAD_STEPS = 20
"""So many steps in a row without a finite gradient end the run: skipping does not help any more."""


@dataclass
class Report:
    """What happened since the last line of progress."""

    tokens: int = 0
    seconds: float = 0.0
    main: float = 0.0
    mtp: float = 0.0
    mtp_steps: int = 0
    steps: int = 0
    load: float = 0.0
    norm: float = 0.0
    by_effort: Tensor = field(default_factory=lambda: torch.zeros(2, len(EFFORTS)))

    def line(self, step: int, progress: float, lr: float) -> str:
        """One line: a person watches it, a script may split it at spaces."""
        n = max(self.steps, 1)
        means = (self.by_effort[0] / self.by_effort[1].clamp_min(1)).tolist()
        efforts = " ".join(f"{e} {v:.3f}" for e, v in zip(EFFORTS, means, strict=True))
        mtp, speed = self.mtp / max(self.mtp_steps, 1), self.tokens / max(self.seconds, 1e-9)
        return (
            f"step {step} {progress:.1%} loss {self.main / n:.4f} ({efforts}) mtp {mtp:.3f} lr {lr:.1e} "
            f"norm {self.norm / n:.2f} load {self.load / n:.2f} {speed:.0f} tok/s"
        )


class Trainer:
    """One run in one folder. `train` steps until the schedule ends; `save` and `resume` carry it between processes."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        open_renderer: Callable[[], Renderer],
        device: str = "cpu",
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.folder, self.device, self._say = config, folder, device, say
        self._open_renderer = open_renderer
        self.model = Transformer(config.model, Numerics(getattr(torch, config.compute)))
        init_weights(self.model, config.seed)
        self.model.to(device).train()
        self.optimizer = Optimizer(self.model.named_parameters(), config.optim)
        self.step, self.seconds, self._bad = 0, 0.0, 0

    @property
    def progress(self) -> float:
        """How much of the schedule is done, 0 to 1."""
        s = self.config.schedule
        done = self.step / s.steps if s.steps else self.seconds / (60 * (s.minutes or 1.0))
        return min(done, 1.0)

    def train(self) -> None:
        """Step until the schedule ends, with a line of progress and a checkpoint now and then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        feed = Feed(self.config.data, self._open_renderer, self.step)
        try:
            self._loop(feed)
        finally:
            feed.close()
        self.save()

    def _loop(self, feed: Feed) -> None:
        report, saved = Report(), time.monotonic()
        while self.progress < 1.0:
            begun = time.monotonic()
            pack = next(feed).to(self.device)
            lr = self._one(pack, report)
            now = time.monotonic()
            self.seconds += now - begun
            report.seconds += now - begun
            if report.seconds >= self.config.log_seconds or self.progress >= 1.0:
                self._say(report.line(self.step, self.progress, lr))
                report = Report()
            if now - saved > 60 * self.config.checkpoint_minutes:
                self.save()
                saved = now

    def _one(self, pack: Packed, report: Report) -> float:
        """Forward, backward, update; a step whose gradient is not finite is skipped. Returns the learning rate."""
        s, progress = self.config.schedule, self.progress
        quantised = progress >= 1 - s.qat
        set_numerics(self.model, replace(self.model.numerics, quantize=quantised))
        lr = learning_rate(progress, self.step, self.config.optim.lr, s.warmup, s.decay, s.floor)
        with stored_weights(self.model) if quantised else nullcontext():
            self._backward(pack, report, decaying=progress >= 1 - s.decay)
        norm = self.optimizer.clip()
        if self._finite(norm):
            self.optimizer.step(lr)
        report.norm += norm
        report.load += balance(self.model, self.config.loss.bias_speed)
        self.optimizer.zero()
        self.step += 1
        return lr

    def _backward(self, pack: Packed, report: Report, decaying: bool) -> None:
        c = self.config.loss
        weight, every = c.mtp[decaying], c.mtp_every
        out = losses(self.model, pack, mtp=weight > 0 and self.step % every == 0)
        total = out.main if out.mtp is None else out.main + weight * every * out.mtp
        total.backward()
        _record(report, out.main, out.mtp, out.tokens, pack)

    def _finite(self, norm: float) -> bool:
        if norm == norm and norm != float("inf"):
            self._bad = 0
            return True
        self._bad += 1
        self._say(f"step {self.step}: gradient is not finite, step skipped")
        if self._bad >= BAD_STEPS:
            raise TrainError(f"no finite gradient in {BAD_STEPS} steps; resume from {CHECKPOINT} with a lower rate")
        return False

    def save(self) -> None:
        """Write model, optimizer and position aside, then rename: a crash leaves the previous checkpoint whole."""
        aside = self.folder / (CHECKPOINT + ".writing")
        torch.save(self._state(), aside)
        aside.replace(self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Go on from the folder's checkpoint, bit for bit as if never interrupted (schedules in steps)."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            raise TrainError(f"no {CHECKPOINT} in {self.folder}: start without --resume")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # damaged bytes lead torch anywhere
            raise TrainError(f"{path} cannot be read ({error!r}): start again in a new folder") from None
        if state["model_config"] != _plain(self.config.model.to_dict()):
            raise TrainError(f"{path} was trained with another model configuration; use its recipe or a new folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "seconds": self.seconds,
            "model_config": _plain(self.config.model.to_dict()),
        }


def _plain(value: Any) -> Any:
    """Lists for tuples, so that a configuration equals itself after a round trip."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


@torch.no_grad()
def _record(report: Report, main: Tensor, mtp: Tensor | None, each: Tensor, pack: Packed) -> None:
    rows = pack.weights.nonzero().squeeze(-1)
    sure = pack.weights[rows] == 1.0
    kinds = pack.efforts[rows][sure].cpu()
    report.by_effort[0].index_add_(0, kinds, each[sure].cpu())
    report.by_effort[1].index_add_(0, kinds, torch.ones(len(kinds)))
    report.main += main.item()
    if mtp is not None:
        report.mtp += mtp.item()
        report.mtp_steps += 1
    report.steps += 1
    report.tokens += pack.tokens.shape[0]
