"""The skills that models are trained on here, asked with problems kept out of training."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from fathom.api import EFFORTS, ChatModel, ChatRequest, Completion, SamplingParams
from fathom.errors import ConfigError
from fathom.evals.base import Outcome, Report, summarise
from fathom.skills.base import LEVELS, Task
from fathom.skills.base import Completion as Reply
from fathom.skills.mix import SKILLS, held_out

ThinkingTokens = Callable[[Completion], int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to ask: `samples` problems of each skill and level, each with every effort; greedy unless told otherwise.

    Raises ConfigError for a skill, effort or level that does not exist and for sizes below 1.
    """

    skills: tuple[str, ...] = tuple(SKILLS)
    efforts: tuple[str, ...] = EFFORTS
    levels: tuple[int, ...] = LEVELS
    samples: int = 100
    seed: int = 0
    batch: int = 128
    max_tokens: int = 192
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for what, given, known in (
            ("skill", self.skills, tuple(SKILLS)),
            ("effort", self.efforts, EFFORTS),
            ("level", self.levels, LEVELS),
        ):
            if wrong := [str(g) for g in given if g not in known]:
                raise ConfigError(f"unknown {what} '{wrong[0]}': use {', '.join(map(str, known))}")
        for size in ("samples", "batch", "max_tokens"):
            if getattr(self, size) < 1:
                raise ConfigError(f"{size} must be at least 1, not {getattr(self, size)}")


def evaluate(
    model: ChatModel, plan: Plan, thinking_tokens: ThinkingTokens, progress: Progress = lambda done, total: None
) -> Report:
    """Ask everything in the plan. `thinking_tokens` counts those of a completion; `progress` hears (done, total)."""
    asked = [
        (task, effort)
        for skill in plan.skills
        for level in plan.levels
        for task in held_out(skill, level, plan.samples, plan.seed)
        for effort in plan.efforts
    ]
    outcomes: list[Outcome] = []
    for batch in _batches(sorted(asked, key=_length), plan.batch):
        replies = model.chat_batch([_request(task, effort, plan) for task, effort in batch])
        outcomes += [
            _judge(task, effort, reply, thinking_tokens(reply))
            for (task, effort), reply in zip(batch, replies, strict=True)
        ]
        progress(len(outcomes), len(asked))
    outcomes.sort(key=lambda o: (plan.skills.index(o.group), plan.efforts.index(o.effort)))
    return summarise("skills", asdict(plan), outcomes)


def reply_of(completion: Completion) -> Reply:
    """What a verifier judges: the one tool call if there is exactly one and it is an object, else the text."""
    if not completion.tool_calls:
        return completion.text
    if len(completion.tool_calls) > 1:
        return None
    call = completion.tool_calls[0]
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        return None
    return (call.name, arguments) if isinstance(arguments, dict) else None


def _length(asked: tuple[Task, str]) -> int:
    """Short answers with short ones: a batch lasts as long as its longest."""
    task, effort = asked
    return len(task.traces[effort]) + 1000 * len(task.tools)


def _batches(asked: Sequence[tuple[Task, str]], size: int) -> Iterator[Sequence[tuple[Task, str]]]:
    return (asked[i : i + size] for i in range(0, len(asked), size))


def _request(task: Task, effort: str, plan: Plan) -> ChatRequest:
    params = SamplingParams(temperature=plan.temperature, max_tokens=plan.max_tokens, seed=plan.seed)
    message = {"role": "user", "content": task.question}
    return ChatRequest(messages=[message], effort=effort, tools=task.tools, params=params)


def _judge(task: Task, effort: str, completion: Completion, thinking: int) -> Outcome:
    right = SKILLS[task.skill].verify(task, reply_of(completion))
    expected = task.answer if task.tool_call is None else repr(task.tool_call)
    return Outcome(task.skill, task.level, effort, right, thinking, expected)
