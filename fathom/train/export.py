"""From a trained model to a folder in the official layout that every other command opens."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from fathom.checkpoint.save import save_model
from fathom.errors import TrainError
from fathom.model.transformer import Transformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

SETTINGS = {"dialect": "april", "max_tokens": 1024}
"""What `fathom.json` says of a model that we trained: which prompts it knows, and how long an answer may become."""


def export(model: Transformer, tokenizer: Path, folder: Path) -> None:
    """Write weights (FP4 experts, FP8 linears), config, tokenizer and `fathom.json` to `folder`.

    An earlier export there is replaced once the new one is whole; anything else in its place is a TrainError.
    """
    if folder.exists() and not (folder / "fathom.json").exists() and any(folder.iterdir()):
        raise TrainError(f"{folder} holds something that is not an exported model; choose another folder")
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    with tempfile.TemporaryDirectory() as companions:
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, companions)
        (Path(companions) / "fathom.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
        save_model(model, aside, experts="fp4", linears="fp8", companions=companions)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
