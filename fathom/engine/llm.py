"""A checkpoint, loaded and ready to answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fathom.checkpoint.load import load_model
from fathom.checkpoint.reader import Progress
from fathom.config import WEIGHTS
from fathom.engine.engine import Core, Memory
from fathom.engine.service import Service
from fathom.errors import CheckpointError
from fathom.model.transformer import Transformer

_ONE_THREAD = 512
"""Up to this hidden size one thread is torch's default here: a second computes little and waits much. On two cores that
others use as well, the embedded model's shape decodes 68 tokens a second with one thread and 2 to 6 with two."""


def model_folder(model: str) -> Path:
    """The folder of a checkpoint: a path, or `small` for the embedded one. Raises CheckpointError for a bare preset."""
    if model in ("flash", "pro"):
        raise CheckpointError(f"'{model}' is a configuration without weights: give a checkpoint's folder, or small")
    return WEIGHTS / "small" if model == "small" else Path(model)


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
        threads: int | None = None,
        max_context: int | None = None,
        memory: Memory | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> LLM:
        """Load a checkpoint's folder, or `small`, for the CPU: weights are widened, exactly, to the compute dtype.

        threads: for torch; None is one for a small model, torch's own choice for others. progress: hears of bytes read.
        Raises CheckpointError, ConfigError.
        """
        loaded = load_model(model_folder(str(model)), progress=progress)
        if threads or loaded.config.hidden_size <= _ONE_THREAD:
            torch.set_num_threads(threads or 1)
        return LLM(loaded, max_context, memory)
