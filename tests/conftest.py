"""One thread for torch (the tests' models are tiny), tables of what was measured, and what a run left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

_OPTIONAL = {"gpu": "a CUDA device", "external": "more than Python, or much time"}
_skipped: Counter[str] = Counter()
_lines: list[str] = []


@pytest.fixture(scope="session")
def say() -> Callable[[str], None]:
    """Adds a line to what the run prints at its end: a number nobody sees proves nothing."""
    return _lines.append


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the deselected tests by the marker that explains them."""
    _skipped.update(name for item in items for name in _OPTIONAL if item.get_closest_marker(name))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several hands over what it has to say."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["said"] = (dict(_skipped), list(_lines))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take it: every process has deselected the same tests, and measured its own."""
    skipped, lines = getattr(node, "workeroutput", {}).get("said", ({}, []))
    _skipped.update({name: count - _skipped[name] for name, count in skipped.items()})
    _lines.extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables; say what did not run, why, and how to run it."""
    if _lines:
        terminalreporter.section("measured")
    for line in _lines:
        terminalreporter.write_line(line)
    for name, count in sorted(_skipped.items()):
        terminalreporter.write_line(f"not run: {count} tests that need {_OPTIONAL[name]} (pytest -m {name})")
