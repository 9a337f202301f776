"""Sorting a few two-digit numbers, by taking out the smallest again and again."""

import random
import re

from fathom.skills.base import Completion, Task, phrase, same_text, traces

_ASK = (
    "Sort these numbers: {items}",
    "Put these numbers in ascending order: {items}",
    "Sort from smallest to largest: {items}",
    "Order from low to high: {items}",
    "Please sort {items}",
    "Arrange in increasing order: {items}",
)


class Sort:
    """Level n: n + 2 different numbers between 10 and 99."""

    name = "sort"

    def generate(self, rng: random.Random, level: int) -> Task:
        items = rng.sample(range(10, 100), level + 2)
        listed = _join(items)
        both = traces(_split(items), _selection(items))
        return Task(self.name, level, phrase(rng, _ASK, items=listed), _join(sorted(items)), both, key=listed)

    def verify(self, task: Task, completion: Completion) -> bool:
        return same_text(completion, " ".join(sorted(re.findall(r"\d+", task.question))))


def _join(items: list[int]) -> str:
    return " ".join(map(str, items))


def _split(items: list[int]) -> str:
    """The smaller half in order, the rest as it stood."""
    low = sorted(items)[: len(items) // 2]
    return f"{_join(low)}<{_join([i for i in items if i not in low])}"


def _selection(items: list[int]) -> str:
    """One line a step: what is left, and its smallest."""
    lines, rest = [], list(items)
    while rest:
        lines.append(f"{_join(rest)}>{min(rest)}")
        rest.remove(min(rest))
    return "\n".join(lines)
