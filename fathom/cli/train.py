"""`fathom train`: run a recipe and export what it made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A run of fathom/train/recipes.py, such as first_light.")],
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoint, and the exported model in model/.")],
    minutes: Annotated[float | None, typer.Option(help="Train so long instead of what the recipe says.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of the CPU.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that prepare data.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with tokenizer.json; the embedded one's if absent.")
    ] = None,
) -> None:
    """Train a model from scratch and export it in the official layout."""
    from functools import partial

    import torch

    from fathom.config import WEIGHTS
    from fathom.engine.llm import checked_device
    from fathom.errors import TrainError
    from fathom.train.export import export
    from fathom.train.recipes import adapted
    from fathom.train.recipes import recipe as named
    from fathom.train.render import open_renderer
    from fathom.train.trainer import CHECKPOINT, Trainer

    place = checked_device(device)
    if threads:
        torch.set_num_threads(threads)
    # Products of a GPU in TF32: twice the speed, and noise below the gradient's.
    torch.set_float32_matmul_precision("high")
    source = tokenizer or WEIGHTS / "small"
    config = adapted(named(recipe), minutes, workers, open_renderer(source).size)
    trainer = Trainer(config, out, partial(open_renderer, source), place, _say)
    if resume:
        trainer.resume()
    elif (out / CHECKPOINT).exists():
        raise TrainError(f"{out} holds a run already: add --resume to go on, or choose another folder")
    trainer.train()
    export(trainer.model, source, out / "model")
    _say(f"exported to {out / 'model'}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
