"""Tables that the tests of the model fill in and that pytest prints at its end: a number nobody sees proves nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

_LINES: list[str] = []


@pytest.fixture(scope="session")
def say() -> Iterator[Callable[[str], None]]:
    """Adds a line to the summary."""
    yield _LINES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _LINES:
        terminalreporter.section("measured")
        for line in _LINES:
            terminalreporter.write_line(line)
        _LINES.clear()
