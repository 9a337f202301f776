"""A checkpoint, loaded and ready to answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fathom.checkpoint.folder import Checkpoint
from fathom.checkpoint.load import load_config, load_model, share_bytes
from fathom.checkpoint.reader import Progress
from fathom.config import WEIGHTS
from fathom.engine.engine import Core
from fathom.engine.memory import Memory
from fathom.engine.service import Service
from fathom.engine.team import Part, Team
from fathom.errors import CheckpointError, ConfigError
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from fathom.parallel.plan import meet, rank_config
from fathom.parallel.tensor import Ranks

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


def _place(device: str, tp: int) -> str:
    """Where `tp` ranks compute. Raises ConfigError where there is no room for them."""
    checked_device(device)
    if tp < 1 or (tp > 1 and ":" in device):
        raise ConfigError(f"--tp {tp} on {device}: give at least 1, and for several GPUs --device cuda, the first ones")
    if device == "cuda" and tp > torch.cuda.device_count():
        raise ConfigError(f"--tp {tp} wants {tp} GPUs: torch sees {torch.cuda.device_count()}")
    return device


def load_part(
    part: Part, ranks: Ranks | None = None, progress: Callable[[Progress], None] | None = None
) -> Transformer:
    """A rank's model, joined to the others', or the whole of a team of one. Raises CheckpointError, ConfigError."""
    place = ranks.device if ranks else torch.device(part.device)
    dense, share = place.type == "cpu", (part.rank, part.tp)
    numerics = None if dense else _on_a_gpu(Checkpoint(part.folder), place, part.tp)
    model = load_model(part.folder, numerics=numerics, device=place, dense=dense, progress=progress, share=share)
    if ranks:
        meet(model, ranks)
    if part.threads or model.config.hidden_size <= _ONE_THREAD:
        torch.set_num_threads(part.threads or 1)
    elif dense and part.tp > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // part.tp))
    return model


def _on_a_gpu(checkpoint: Checkpoint, device: torch.device, tp: int) -> Numerics:
    """A checkpoint that was trained with quantised activations is computed with them, on every device.

    Raises ConfigError where its weights do not fit.
    """
    free, need = torch.cuda.mem_get_info(device)[0], share_bytes(checkpoint, tp)
    if need > free:
        text = f"the weights need {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on {device}"
        raise ConfigError(f"{text}: free some, take another GPU or more (--tp), or use --device cpu")
    return Numerics(torch.bfloat16, checkpoint.quantised)


def _watched(team: Team, progress: Callable[[Progress], None] | None) -> Callable[[Progress], None]:
    """The same, and an end where another rank cannot load its part."""

    def watched(done: Progress) -> None:
        team.check()
        if progress:
            progress(done)

    return watched


class LLM(Service):
    """An `api.Engine` over one model.

    max_context: the most tokens of a prompt and its answer, at most (and by default) what the model was made for.
    """

    def __init__(
        self,
        model: Transformer,
        max_context: int | None = None,
        memory: Memory | None = None,
        team: Team | None = None,
    ) -> None:
        super().__init__(Core(model, max_context, memory, team))
        self.model, self.team = model, team

    @staticmethod
    def load(
        model: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_context: int | None = None,
        memory: Memory | None = None,
        progress: Callable[[Progress], None] | None = None,
        tp: int = 1,
    ) -> LLM:
        """Load a checkpoint's folder, or `small`. On a CPU weights are widened, exactly, to the compute dtype; on a GPU
        they stay as stored and the model computes in BF16.

        device: cpu, cuda, cuda:1 ... threads: for torch; None is one for a small model, torch's own choice for others.
        progress: hears of bytes read. tp: over so many GPUs of this machine, a process each (`team`).
        Raises CheckpointError, ConfigError.
        """
        folder, memory = model_folder(str(model)), memory or Memory()
        part = Part(
            folder=folder, device=_place(device, tp), threads=threads, context=max_context, memory=memory, tp=tp
        )
        if tp == 1:
            return LLM(load_part(part, progress=progress), max_context, memory)
        rank_config(load_config(folder), tp)
        team = Team(part)
        try:
            return LLM(load_part(part, team.ranks, _watched(team, progress)), max_context, memory, team)
        except BaseException:
            team.close()
            raise
