"""What an installed package has besides its modules."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_file_that_is_no_module_is_installed() -> None:
    """A wheel holds what the patterns name: what they forget is missing only on the user's machine."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fathom"]
    named = {path for pattern in patterns for path in (ROOT / "fathom").glob(pattern)}
    found = {p for p in (ROOT / "fathom").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert found - named == set()


def test_torch_chooses_its_own_triton() -> None:
    """A torch wheel for Linux asks for one version of Triton: with another in the constraints pip finds no solution."""
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "torch" in pinned and "triton" not in pinned
