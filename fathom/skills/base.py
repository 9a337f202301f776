"""What a skill is: a generator of verifiable tasks with a trace for each thinking effort.

A task is asked in plain language and has one right answer. `traces` holds what a model should think before it
answers: nothing for `none`, a checkpoint every two or three operations for `high`, every operation with its
operands copied for `max`. Small models learn a step that is one lookup or one copy, so traces never skip
(reference training F); letters and digits stand two tokens apart in questions and traces alike ("m-a-p", "1m2a3p"),
which makes copying a constant shift.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fathom import api

EFFORTS = api.EFFORTS
LEVELS = (1, 2, 3)

ToolCall = tuple[str, Mapping[str, Any]]
Completion = str | ToolCall | None


@dataclass(frozen=True)
class Task:
    """One question with its answer and the thinking that leads there.

    `key` is the content without its phrasing: held-out tasks are chosen by it, so that no other wording of a held-out
    problem is trained on. `tools` are OpenAI function schemas; `tool_call` is then (name, arguments) and `answer` "".
    """

    skill: str
    level: int
    question: str
    answer: str
    traces: Mapping[str, str]
    key: str
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_call: ToolCall | None = field(default=None)


class Skill(Protocol):
    """A family of tasks in three levels of difficulty."""

    name: str

    def generate(self, rng: random.Random, level: int) -> Task:
        """Draw a task; the same generator state and level give the same task."""
        ...

    def verify(self, task: Task, completion: Completion) -> bool:
        """Judge a completion by solving the question again, from its text, without the trace."""
        ...


def traces(high: str, full: str) -> dict[str, str]:
    """The three traces of a task, by effort."""
    return {"none": "", "high": high, "max": full}


def phrase(rng: random.Random, templates: Sequence[str], **values: object) -> str:
    """Fill one of the phrasings."""
    return rng.choice(templates).format(**values)


def same_text(completion: Completion, expected: str) -> bool:
    """Whether a completion says the expected answer: case, outer spaces and a final full stop do not count."""
    if not isinstance(completion, str):
        return False
    return re.sub(r"\s+", " ", completion).strip().rstrip(".").lower() == expected.lower()
