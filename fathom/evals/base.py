"""What an evaluation yields: outcomes one by one, scores with intervals, and a report as JSON or Markdown."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question asked once. `thinking_tokens` counts what came before the end of thinking."""

    group: str
    level: int
    effort: str
    right: bool
    thinking_tokens: int
    expected: str


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of `n`, with the 95 % Wilson interval of the accuracy; all three are fractions."""

    group: str
    effort: str
    n: int
    accuracy: float
    low: float
    high: float
    thinking_tokens: float
    by_level: dict[int, float]


@dataclass(frozen=True, slots=True)
class Report:
    """Scores of one run.

    `settings` is what to repeat it with; `guess` is the accuracy of the best constant answer, by group."""

    task: str
    settings: dict[str, Any]
    scores: tuple[Score, ...]
    guess: dict[str, float]

    def mean(self, effort: str) -> float:
        """Accuracy averaged over the groups, each weighing the same."""
        return _mean([s.accuracy for s in self.scores if s.effort == effort])

    def efforts(self) -> list[str]:
        """The efforts asked for, in their order."""
        return list(dict.fromkeys(s.effort for s in self.scores))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        means = {effort: self.mean(effort) for effort in self.efforts()}
        return asdict(self) | {"scores": [asdict(s) for s in self.scores], "mean": means}

    def to_markdown(self) -> str:
        """A table for the model card: accuracy in percent, its interval, mean thinking tokens in brackets."""
        efforts = self.efforts()
        by = {(s.group, s.effort): s for s in self.scores}
        lines = [f"| skill | {' | '.join(efforts)} | best constant |", "| --- |" + " ---: |" * (len(efforts) + 1)]
        for group, guess in self.guess.items():
            cells = " | ".join(_cell(by[group, effort]) for effort in efforts)
            lines.append(f"| {group} | {cells} | {100 * guess:.0f} |")
        means = " | ".join(f"**{100 * self.mean(effort):.1f}**" for effort in efforts)
        lines.append(f"| **mean** | {means} | {100 * _mean(list(self.guess.values())):.0f} |")
        return "\n".join(lines)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share; (0, 1) when nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def summarise(task: str, settings: dict[str, Any], outcomes: Sequence[Outcome]) -> Report:
    """Scores by group and effort, in the order of first appearance."""
    cells = dict.fromkeys((o.group, o.effort) for o in outcomes)
    scores = tuple(_score([o for o in outcomes if (o.group, o.effort) == cell]) for cell in cells)
    groups = dict.fromkeys(o.group for o in outcomes)
    return Report(task, settings, scores, {g: _guess(o.expected for o in outcomes if o.group == g) for g in groups})


def _score(outcomes: list[Outcome]) -> Score:
    right, n = sum(o.right for o in outcomes), len(outcomes)
    levels = sorted({o.level for o in outcomes})
    return Score(
        outcomes[0].group,
        outcomes[0].effort,
        n,
        right / n,
        *wilson(right, n),
        _mean([o.thinking_tokens for o in outcomes]),
        {level: _mean([o.right for o in outcomes if o.level == level]) for level in levels},
    )


def _guess(expected: Iterable[str]) -> float:
    answers = list(expected)
    return max(map(answers.count, set(answers))) / len(answers)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _cell(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} ({100 * score.low:.0f}-{100 * score.high:.0f}) [{score.thinking_tokens:.0f}]"
