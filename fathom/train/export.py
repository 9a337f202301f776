"""From a trained model to a folder in the official layout that every other command opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fathom.checkpoint.save import save_model
from fathom.errors import TrainError
from fathom.model.transformer import Transformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DIALECT = "april"


def export(model: Transformer, tokenizer: Path, folder: Path) -> None:
    """Write weights (FP4 experts, FP8 linears), config, tokenizer and prompt dialect to `folder`.

    Everything is written to a folder beside it first, so that a full disk leaves no half-written model.
    """
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_model(model, aside, experts="fp4", linears="fp8")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, aside / name)
    (aside / "fathom.json").write_text(json.dumps({"dialect": DIALECT}, indent=2) + "\n")
    _replace(aside, folder)


def _replace(aside: Path, folder: Path) -> None:
    """Rename; a folder that is already there is only replaced when it is a model of ours."""
    if folder.exists():
        if not (folder / "fathom.json").exists() and any(folder.iterdir()):
            raise TrainError(f"{folder} holds something that is not an exported model; choose another folder")
        shutil.rmtree(folder)
    aside.rename(folder)
