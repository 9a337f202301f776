"""The skills evaluation with models that are made up: a perfect one, one that never thinks, one that talks nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import pytest

from fathom.api import ChatRequest, Completion, Delta, FinishReason, ToolCall, Usage
from fathom.errors import ConfigError
from fathom.evals.skills import Plan, evaluate, reply_of
from fathom.skills.base import Task
from fathom.skills.mix import SKILLS, held_out

SMALL = {"samples": 6, "batch": 7}


def completion(text: str = "", calls: Sequence[tuple[str, str]] = (), thinking: str = "") -> Completion:
    made = tuple(ToolCall(f"call_{i}", *call) for i, call in enumerate(calls))
    return Completion(
        text=text, thinking=thinking, tool_calls=made, finish=FinishReason.STOP, usage=Usage(1, 1), token_ids=()
    )


class Oracle:
    """Knows all held-out tasks; `fails(task, effort)` says when to be wrong."""

    def __init__(self, fails: Callable[[Task, str], bool]) -> None:
        self.fails, self.sizes = fails, []
        tasks = [t for name in SKILLS for level in (1, 2, 3) for t in held_out(name, level, SMALL["samples"], 0)]
        self.known = {(t.question, repr(t.tools)): t for t in tasks}

    def chat(self, request: ChatRequest) -> Completion:
        task = self.known[request.messages[0]["content"], repr(tuple(request.tools))]
        if self.fails(task, request.effort):
            return completion("nonsense")
        if task.tool_call:
            return completion(calls=[(task.tool_call[0], json.dumps(task.tool_call[1]))])
        return completion(task.answer, thinking=task.traces[request.effort])

    def chat_batch(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        self.sizes.append(len(requests))
        return [self.chat(r) for r in requests]

    def stream(self, request: ChatRequest) -> Iterator[Delta | Completion]:
        yield self.chat(request)


def test_a_perfect_model_scores_one() -> None:
    heard: list[tuple[int, int]] = []
    model = Oracle(lambda task, effort: False)
    report = evaluate(model, Plan(**SMALL), lambda c: len(c.thinking), lambda *at: heard.append(at))
    assert [report.mean(e) for e in ("none", "high", "max")] == [1.0, 1.0, 1.0]
    assert {(s.group, s.effort) for s in report.scores} == {(s, e) for s in SKILLS for e in ("none", "high", "max")}
    assert all(s.n == 18 and s.high == 1.0 for s in report.scores)
    assert heard[-1] == (len(SKILLS) * 54,) * 2 and max(model.sizes) == 7
    chain = {s.effort: s.thinking_tokens for s in report.scores if s.group == "chain"}
    assert chain["none"] == 0 < chain["high"] < chain["max"]


def test_failures_land_where_they_happen() -> None:
    model = Oracle(lambda task, effort: (effort == "none" and task.skill == "cups") or task.level == 3)
    report = evaluate(model, Plan(skills=("cups", "tools"), **SMALL), lambda c: 0)
    found = {(s.group, s.effort): s for s in report.scores}
    assert found["cups", "none"].accuracy == 0 and found["cups", "max"].by_level == {1: 1.0, 2: 1.0, 3: 0.0}
    assert found["tools", "none"].accuracy == pytest.approx(2 / 3)
    assert report.mean("none") == pytest.approx(1 / 3)


def test_only_one_whole_call_counts() -> None:
    assert reply_of(completion("a")) == "a"
    assert reply_of(completion(calls=[("f", '{"x": 1}')])) == ("f", {"x": 1})
    assert reply_of(completion(calls=[("f", '{"x": ')])) is None
    assert reply_of(completion(calls=[("f", "[1]")])) is None
    assert reply_of(completion(calls=[("f", "{}"), ("f", "{}")])) is None


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"efforts": ("low",)}, "unknown effort 'low'"),
        ({"skills": ("chess",)}, "unknown skill 'chess'"),
        ({"levels": (4,)}, "unknown level '4'"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_a_plan_refuses_what_does_not_exist(wrong: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Plan(**wrong)
