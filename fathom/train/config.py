"""What a training run is: frozen settings, composed. Defaults live here, runs in `recipes.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fathom.config import ModelConfig
from fathom.errors import TrainError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which documents are drawn, and how heavy their tokens weigh in the loss.

    shares, efforts: relative frequencies of skills (empty: every skill alike) and of the three efforts.
    tokens_per_batch: documents are added until a batch holds at least this many tokens.
    prompt_weight: loss weight of prompt tokens; completions weigh 1.
    extra_turns: chance that another question and answer comes before the last one of a document.
    waste: padding that a document may get to share the length of others, as a share of its own.
    workers: processes that write documents, so that a step never waits; 0 writes them in the trainer itself.
    """

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)
    efforts: Mapping[str, float] = field(default_factory=lambda: {"none": 1.0, "high": 1.0, "max": 1.0})
    tokens_per_batch: int = 8192
    max_document: int = 2048
    prompt_weight: float = 0.1
    extra_turns: float = 0.1
    waste: float = 0.12
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Muon for matrices and AdamW for the rest, at one learning rate (reference training 4).

    ns_steps: Newton-Schulz steps with the fast and with the settling coefficients; the paper's are (8, 2).
    decay_vectors: whether AdamW's decay also holds for norms, biases and gating factors.
    clip: largest norm of the whole gradient.
    """

    lr: float = 2e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    decay_vectors: bool = False
    ns_steps: tuple[int, int] = (8, 2)
    ns_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    clip: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """How long, and the shape of the learning rate: linear warm-up, constant, then cosine down to `floor` of the peak.

    Exactly one of `minutes` (wall time of stepping) and `steps` bounds the run. warmup is in steps, decay is the share
    of the run that the cosine takes, qat the share at the end in which weights and activations are quantised in the
    forward.
    """

    minutes: float | None = None
    steps: int | None = None
    warmup: int = 50
    decay: float = 0.4
    floor: float = 0.1
    qat: float = 0.25

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise TrainError("a schedule needs either minutes or steps, not both and not neither")
        for unit, length in (("minutes", self.minutes), ("steps", self.steps)):
            if length is not None and not 0 < length < math.inf:
                raise TrainError(f"a run of {length} {unit} is out of range: it must be longer than 0, and end")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the losses beside next-token cross-entropy (reference training 5).

    mtp: weight of the prediction block before and during the decay of the learning rate; mtp_every: it runs in one
    step of so many, with its weight multiplied by that. bias_speed: step of the routing bias.
    """

    mtp: tuple[float, float] = (0.3, 0.1)
    mtp_every: int = 1
    bias_speed: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A whole run. compute: dtype of activations and products; parameters and optimizer stay float32."""

    name: str
    model: ModelConfig
    schedule: ScheduleConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    compute: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    checkpoint_minutes: float = 5.0
    log_seconds: float = 10.0
