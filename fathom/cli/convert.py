"""`fathom convert`: a checkpoint in other number formats, or a random one of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.screen import Loading
from fathom.errors import ConfigError


def convert(
    paths: Annotated[
        list[str], typer.Argument(metavar="IN OUT", help="Folders, or small as IN; with --random only OUT.")
    ],
    experts: Annotated[str | None, typer.Option(help="Store routed experts as fp4, fp8 or bf16.")] = None,
    linears: Annotated[str | None, typer.Option(help="Store the other quantised linears as fp8 or bf16.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Round what the new format cannot hold.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Write random weights for --model.")] = False,
    model: Annotated[str | None, typer.Option(help="With --random: flash, pro, small or a folder.")] = None,
    layers: Annotated[int | None, typer.Option(help="With --random: only the first layers.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --random: which weights; 0 if absent.")] = None,
) -> None:
    """Convert a checkpoint to other number formats, or write a random one."""
    _check_form("--experts", experts, ("fp4", "fp8", "bf16"))
    _check_form("--linears", linears, ("fp8", "bf16"))
    if random:
        if lossy:
            raise ConfigError("--lossy goes with a conversion: random weights are made in the form that is asked for")
        _random(paths, model, layers, seed or 0, experts, linears)
        return
    if (model, layers, seed) != (None, None, None):
        raise ConfigError("--model, --layers and --seed go with --random; to convert, give the folders IN and OUT")
    if len(paths) != 2:
        raise ConfigError(f"convert takes two folders, IN and OUT, got {len(paths)}")
    from fathom.checkpoint.convert import convert as run
    from fathom.engine.llm import model_folder

    source, folder = model_folder(paths[0]), Path(paths[1])
    files = _dialect(source)
    run(source, folder, experts=experts, linears=linears, lossy=lossy, files=files, progress=Loading())
    _done(folder)


def _random(
    paths: list[str], model: str | None, layers: int | None, seed: int, experts: str | None, linears: str | None
) -> None:
    from fathom.checkpoint.random import write_random
    from fathom.config import WEIGHTS, ModelConfig, preset

    if len(paths) != 1:
        raise ConfigError(f"convert --random takes one folder, OUT, got {len(paths)}")
    if model is None:
        raise ConfigError("convert --random needs --model: flash, pro, small or a folder with config.json")
    folder = None if model in ("flash", "pro") else WEIGHTS / "small" if model == "small" else Path(model)
    config = ModelConfig.load(folder) if folder else preset(model)
    out = Path(paths[0])
    write_random(
        out,
        config,
        layers=layers,
        seed=seed,
        experts=experts,
        linears=linears,
        companions=folder,
        progress=Loading(),
    )
    _done(out)


def _check_form(flag: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ConfigError(f"{flag} '{value}' is unknown: use {' or '.join(known)}")


def _dialect(source: Path) -> dict[str, bytes]:
    """A `fathom.json` for a source that tells its prompt dialect by its folder's name: the copy has another name."""
    from fathom.encoding.dialect import Dialect, Settings

    if not source.is_dir() or (source / "fathom.json").exists():
        return {}
    dialect = Settings.load(source).dialect
    if dialect is Dialect.APRIL:
        return {}
    return {"fathom.json": (json.dumps({"dialect": str(dialect)}, indent=2) + "\n").encode()}


def _done(folder: Path) -> None:
    files = list(folder.iterdir())
    print(f"{folder}: {len(files)} files, {sum(f.stat().st_size for f in files):,} bytes")
