"""Every skill against a second solution of its question, written here without the package's parsers and traces."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import pairwise

import pytest

from fathom.skills.base import EFFORTS, LEVELS, Task
from fathom.skills.mix import SKILLS, SOURCES

DRAWS = 200


def tasks(name: str, draws: int = DRAWS) -> list[Task]:
    rng = random.Random(7)
    return [SOURCES[name].generate(rng, level) for level in LEVELS for _ in range(draws)]


def reply(task: Task) -> object:
    return task.tool_call or task.answer


def solve_arithmetic(q: str) -> str:
    q = q.replace(" plus ", " + ").replace(" minus ", " - ").replace(" take away ", " - ").replace(" and ", " + ")
    a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", q).groups()
    return str(int(a) + int(b) * (1 if sign == "+" else -1))


def solve_chain(q: str) -> str:
    q = q.replace("10", "").replace("0 to 9", "")
    value, sign = None, 1
    for token in re.findall(r"add|subtract|[+-]|\d", q):
        if token.isdigit():
            value = int(token) if value is None else (value + sign * int(token)) % 10
        else:
            sign = 1 if token in ("add", "+") else -1
    return str(value)


def solve_sort(q: str) -> str:
    left, out = [int(w) for w in q.split() if w.isdigit()], []
    while left:
        out.append(str(left.pop(left.index(min(left)))))
    return " ".join(out)


def spelled(q: str) -> list[str]:
    return max(re.split(r'[" .?]', q), key=lambda word: word.count("-")).split("-")


def solve_reverse(q: str) -> str:
    return "-".join(spelled(q)[::-1])


def solve_count(q: str) -> str:
    before = q.split("?")[0].replace('"', "")
    letter = next(w for w in before.split() if len(w) == 1)
    return str(sum(item == letter for item in spelled(q)))


def solve_parity(q: str) -> str:
    return "odd" if sum(int(c) for c in q if c.isdigit()) & 1 else "even"


def solve_links(q: str) -> str:
    arrows = {a: b for a, _, b in (q[i : i + 3] for i in range(len(q) - 2) if q[i + 1] == ">")}
    place = next(
        w for w in re.sub(r"\S*>\S*", " ", q).replace(":", "").replace(".", "").replace("?", "").split() if w in arrows
    )
    for _ in range(int(next(c for c in q if c.isdigit()))):
        place = arrows[place]
    return place


def solve_cups(q: str) -> str:
    words = re.split(r"[ .:?,]+", q.removeprefix("A "))
    place = next(w for w in words if w in list("ABCDE"))
    for pair in (w for w in words if "-" in w):
        if place in pair:
            place = pair.replace("-", "").replace(place, "")
    return place


SOLVERS: dict[str, Callable[[str], str]] = {
    "arithmetic": solve_arithmetic,
    "chain": solve_chain,
    "sort": solve_sort,
    "reverse": solve_reverse,
    "count": solve_count,
    "parity": solve_parity,
    "links": solve_links,
    "cups": solve_cups,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_answers_equal_a_second_solution(name: str) -> None:
    for task in tasks(name):
        assert SOLVERS[name](task.question) == task.answer, task.question


def test_the_end_of_a_walk_is_not_told_by_its_missing_pair() -> None:
    drawn = tasks("links")
    shortcut = sum(f"{task.answer}>" not in task.question for task in drawn) / len(drawn)
    assert 0.15 < shortcut < 0.35


@pytest.mark.parametrize("name", SOURCES)
def test_verifiers_accept_the_answer_and_nothing_else(name: str) -> None:
    drawn = tasks(name)
    for task, other in pairwise(drawn):
        skill = SOURCES[name]
        assert skill.verify(task, reply(task))
        assert skill.verify(task, reply(other)) == (reply(other) == reply(task))
        assert not skill.verify(task, None)
        assert not skill.verify(task, "") and not skill.verify(task, task.answer + " or 1")


def test_text_is_judged_without_case_space_and_full_stop() -> None:
    task = SKILLS["parity"].generate(random.Random(1), 1)
    assert SKILLS["parity"].verify(task, f" {task.answer.upper()}.\n")


def test_tool_calls_are_judged_by_name_and_arguments() -> None:
    for task in tasks("tools"):
        name, arguments = task.tool_call
        verify = SKILLS["tools"].verify
        assert not verify(task, ("other", arguments))
        assert not verify(task, (name, dict(arguments, extra=1)))
        assert not verify(task, (name, {key: f"{value}x" for key, value in arguments.items()}))
        assert name in [tool["function"]["name"] for tool in task.tools]
        assert all(str(value) in task.question for value in arguments.values())


@pytest.mark.parametrize("name", SOURCES)
def test_draws_are_several_worded_and_repeatable(name: str) -> None:
    assert tasks(name) == tasks(name)
    shapes = {re.sub(r"[^A-Za-z]+|\b\w\b", " ", t.question) for t in tasks(name)}
    assert len(shapes) >= 5
    for task in tasks(name):
        assert set(task.traces) == set(EFFORTS) and task.traces["none"] == ""
        assert len(task.traces["high"]) <= len(task.traces["max"])


def end_of(task: Task) -> str:
    """What the trace for `max` finds, in the form of the answer."""
    trace = task.traces["max"]
    last = {"arithmetic": r"r(\d+)$", "chain": r"=(\d)$", "count": r"(\d)$", "links": r">(\w)$", "cups": r"(\w)$"}
    if task.skill in last:
        return re.search(last[task.skill], trace)[1]
    if task.skill == "sort":
        return " ".join(re.findall(r">(\d+)", trace))
    if task.skill == "parity":
        return {"e": "even", "o": "odd"}[trace[-1]]
    return "-".join(trace.split("\n")[1][1::2])


@pytest.mark.parametrize("name", SOLVERS)
def test_the_trace_ends_in_the_answer(name: str) -> None:
    for task in tasks(name):
        assert end_of(task) == task.answer, task


def test_arithmetic_steps_are_true() -> None:
    for task in tasks("arithmetic"):
        steps = [line.split("=") for line in task.traces["max"].split("\n") if "=" in line]
        assert len(steps) == task.level + 1
        for left, right in steps:
            assert (eval(left) - int(right)) % 10 == 0
            assert "-" in left or eval(left) == int(right)
        places = reversed(task.traces["high"].split(" "))
        assert sum(int(p) * 10**i for i, p in enumerate(places)) == int(task.answer)


@pytest.mark.parametrize("effort", ["high", "max"])
def test_chain_steps_are_true(effort: str) -> None:
    for task in tasks("chain"):
        values = task.traces[effort].split("=")
        for left, right in pairwise(values):
            assert eval(left) % 10 == int(right[0])


def test_coarse_traces_end_like_fine_ones() -> None:
    for name in ("chain", "count", "parity", "links", "cups"):
        assert all(t.traces["high"][-1] == t.traces["max"][-1] for t in tasks(name))
