"""The examples, run as a person runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.config import ModelConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_offline_greets_adds_and_calls_a_tool() -> None:
    greeting, total, call = run("offline.py").stdout.splitlines()
    assert greeting.startswith("Hello")
    assert total == str(17 + 25)
    assert call == 'get_weather {"city": "Paris"}'


def test_train_tiny_leaves_a_checkpoint_that_answers(tmp_path: Path) -> None:
    done = run("train_tiny.py", tmp_path / "run", 2)
    assert "step 2 100.0%" in done.stdout and " tokens: " in done.stdout
    assert ModelConfig.load(tmp_path / "run" / "model").expert_dtype == "fp4"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_is_read_at_a_glance(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
