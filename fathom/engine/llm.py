"""A checkpoint, loaded and ready to answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fathom.checkpoint.folder import Checkpoint
from fathom.checkpoint.load import load_model
from fathom.checkpoint.reader import Progress
from fathom.config import WEIGHTS
from fathom.engine.engine import Core
from fathom.engine.memory import Memory
from fathom.engine.service import Service
from fathom.errors import CheckpointError, ConfigError
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer

_ONE_THREAD = 512
"""Up to this hidden size one thread is torch's default here: a second computes little and waits much. On two cores that
others use as well, the embedded model's shape decodes 68 tokens a second with one thread and 2 to 6 with two."""


def model_folder(model: str) -> Path:
    """The folder of a checkpoint: a path, or `small` for the embedded one. Raises CheckpointError for a bare preset."""
    if model in ("flash", "pro"):
        raise CheckpointError(f"'{model}' is a configuration without weights: give a checkpoint's folder, or small")
    return WEIGHTS / "small" if model == "small" else Path(model)


def checked_device(name: str) -> str:
    """A device that is there, by its name. Raises ConfigError."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal() or (kind == "cpu" and number):
        raise ConfigError(f"device {name!r} is unknown: use cpu, cuda or cuda:1")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name} is not there: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return name


def _on_a_gpu(checkpoint: Checkpoint, device: torch.device) -> Numerics:
    """A checkpoint that was trained with quantised activations is computed with them, on every device.

    Raises ConfigError where its weights do not fit.
    """
    free = torch.cuda.mem_get_info(device)[0]
    if checkpoint.bytes > free:
        text = f"the weights need {checkpoint.bytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on {device}"
        raise ConfigError(f"{text}: free some, take another GPU, or use --device cpu")
    return Numerics(torch.bfloat16, checkpoint.quantised)


class LLM(Service):
    """An `api.Engine` over one model.

    max_context: the most tokens of a prompt and its answer, at most (and by default) what the model was made for.
    """

    def __init__(self, model: Transformer, max_context: int | None = None, memory: Memory | None = None) -> None:
        super().__init__(Core(model, max_context, memory))
        self.model = model

    @staticmethod
    def load(
        model: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_context: int | None = None,
        memory: Memory | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> LLM:
        """Load a checkpoint's folder, or `small`. On a CPU weights are widened, exactly, to the compute dtype; on a GPU
        they stay as stored and the model computes in BF16.

        device: cpu, cuda, cuda:1 ... threads: for torch; None is one for a small model, torch's own choice for others.
        progress: hears of bytes read.
        Raises CheckpointError, ConfigError.
        """
        place = torch.device(checked_device(device))
        folder, dense = model_folder(str(model)), place.type == "cpu"
        numerics = None if dense else _on_a_gpu(Checkpoint(folder), place)
        loaded = load_model(folder, numerics=numerics, device=place, dense=dense, progress=progress)
        if threads or loaded.config.hidden_size <= _ONE_THREAD:
            torch.set_num_threads(threads or 1)
        return LLM(loaded, max_context, memory)
