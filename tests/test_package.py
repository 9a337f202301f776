"""What an installed package has besides its modules."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_file_that_is_no_module_is_installed() -> None:
    """A wheel holds what the patterns name: what they forget is missing only on the user's machine."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fathom"]
    named = {path for pattern in patterns for path in (ROOT / "fathom").glob(pattern)}
    found = {p for p in (ROOT / "fathom").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert found - named == set()


def test_the_constraints_name_the_triton_that_torch_asks_for() -> None:
    """A torch wheel for Linux wants one version of Triton: with another in the constraints pip finds no solution."""
    pinned = dict(re.findall(r"^(torch|triton)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    wanted = re.findall(r"triton==([\d.]+)", " ".join(requires("torch") or ()))
    if version("torch") != pinned["torch"] or not wanted:
        pytest.skip("another torch is installed, or one without Triton")
    assert wanted == [pinned["triton"]]
