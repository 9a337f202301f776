"""Scores and intervals against figures from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fathom.evals.base import Outcome, summarise, wilson
from fathom.evals.run import write


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (50, 100, 0.40383, 0.59617), (81, 263, 0.25529, 0.36623)],
)
def test_wilson_equals_published_values(right: int, n: int, low: float, high: float) -> None:
    """The last row is Newcombe (1998), table I, without continuity correction (0.2553, 0.3662)."""
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_nothing_asked_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.fixture
def outcomes() -> list[Outcome]:
    rows = [("a", 1, True), ("a", 2, False), ("b", 1, True), ("b", 1, True), ("b", 1, True)]
    return [Outcome(g, level, e, right or e == "max", 4, "x") for e in ("none", "max") for g, level, right in rows]


def test_groups_weigh_the_same_in_the_mean(outcomes: list[Outcome]) -> None:
    report = summarise("skills", {}, outcomes)
    assert report.mean("none") == 0.75 and report.mean("max") == 1.0
    assert report.efforts() == ["none", "max"]
    first = report.scores[0]
    assert (first.group, first.n, first.by_level, first.thinking_tokens) == ("a", 2, {1: 1.0, 2: 0.0}, 4.0)


def test_report_as_files(outcomes: list[Outcome], tmp_path: Path) -> None:
    data, table = write(summarise("skills", {"seed": 3}, outcomes), tmp_path / "new")
    read = json.loads(data.read_text())
    assert read["mean"] == {"none": 0.75, "max": 1.0} and read["settings"] == {"seed": 3}
    lines = table.read_text().splitlines()
    assert lines[0] == "| skill | none | max | best constant |"
    assert lines[2].startswith("| a | 50.0 (9-91) [4] | 100.0 (34-100) [4] |")
    assert {line.count("|") for line in lines} == {5}
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == ["skills.json", "skills.md"]
