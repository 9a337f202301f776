"""One thread for torch (the tests' models are tiny), and a word about the tests that a run left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

_OPTIONAL = {"gpu": "a CUDA device", "external": "more than Python, or much time"}
_skipped: Counter[str] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the deselected tests by the marker that explains them."""
    _skipped.update(name for item in items for name in _OPTIONAL if item.get_closest_marker(name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what did not run, why, and how to run it."""
    for name, count in sorted(_skipped.items()):
        terminalreporter.write_line(f"not run: {count} tests that need {_OPTIONAL[name]} (pytest -m {name})")
