"""Which prompt dialect a checkpoint speaks, and what else its `fathom.json` says. Reference api A.4, A.9.

"V4" is two dialects that differ only in the text an effort adds: the April preview (high adds nothing) and the
checkpoints of 31 July and 13 August (each level adds its own). The rule, first match wins: the caller's choice;
`dialect` in `fathom.json`; `0813` if the folder's name has 0731, 0813 or Vision-Exp in it, or config.json has a
`dspark_*` key; else `april`. A re-pack of the April weights with a drafter has such a key too: give it a `fathom.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from fathom.api import EFFORTS, SamplingParams
from fathom.errors import ConfigError, PromptError, SamplingError


class Dialect(StrEnum):
    """A prompt dialect."""

    APRIL = "april"
    AUGUST = "0813"

    def level(self, effort: str) -> str | None:
        """The level that the prompt library renders as this dialect's `effort`; None does not think.

        The library speaks 0813, where `low` adds no text; April's texts are those of one level below.
        """
        levels = {"none": None, "high": "high", "max": "max"}
        if self is Dialect.APRIL:
            levels |= {"high": "low", "max": "high"}
        if effort not in levels:
            raise PromptError(f"unknown effort '{effort}': use {', '.join(EFFORTS[:-1])} or {EFFORTS[-1]}")
        return levels[effort]


@dataclass(frozen=True, slots=True)
class Settings:
    """`fathom.json`: what a checkpoint wants of those who talk to it. Every field may be left out.

    max_tokens: the default bound of an answer; context: the default context in tokens; temperature, top_p: defaults.
    """

    dialect: Dialect = Dialect.APRIL
    max_tokens: int | None = None
    context: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    @staticmethod
    def load(folder: Path, dialect: str | None = None) -> Settings:
        """Read the folder's `fathom.json` if it has one. Raises ConfigError for unknown keys, dialects and values."""
        path = folder / "fathom.json"
        found = _read(path)
        known = [f.name for f in fields(Settings)]
        if unknown := sorted(set(found) - set(known)):
            raise ConfigError(f"{path}: unknown key '{unknown[0]}'; known are {', '.join(known)}")
        _check_numbers(path, found)
        chosen = dialect or found.get("dialect") or _by_rule(folder)
        return Settings(**(found | {"dialect": _named(str(chosen))}))


def _check_numbers(path: Path, found: dict[str, Any]) -> None:
    for name in ("max_tokens", "context"):
        value = found.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{path}: {name} is {value!r}: it must be a whole number of at least 1, or left out")
    for name in found.keys() & {"temperature", "top_p"}:
        if type(found[name]) not in (int, float):
            raise ConfigError(f"{path}: {name} is {found[name]!r}: it must be a number, or left out")
        try:
            SamplingParams(**{name: found[name]})
        except SamplingError as error:
            raise ConfigError(f"{path}: {error}") from None


def _named(name: str) -> Dialect:
    try:
        return Dialect(name)
    except ValueError:
        raise ConfigError(f"unknown dialect '{name}': use {' or '.join(Dialect)}") from None


def _by_rule(folder: Path) -> Dialect:
    late = re.search(r"0731|0813|vision-exp", folder.resolve().name, re.IGNORECASE)
    drafter = any(key.startswith("dspark_") for key in _read(folder / "config.json"))
    return Dialect.AUGUST if late or drafter else Dialect.APRIL


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return found
