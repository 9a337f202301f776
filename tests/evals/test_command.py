"""`fathom eval skills` from arguments to table, over the shipped tokenizer and an engine that recites right answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("deepseek_recipe")

from fathom.api import ChatRequest, Event, FinishReason, SamplingParams, Usage
from fathom.cli import eval as command
from fathom.encoding.chat import Chat
from fathom.encoding.codec import Codec
from fathom.errors import ConfigError
from fathom.skills.base import EFFORTS, Task
from fathom.skills.mix import SKILLS, held_out

FOLDER = Path(command.__file__).parents[1] / "weights" / "small"


class Reciter:
    """An engine that knows every prompt of the plan and the tokens that should follow."""

    context = 4096

    def __init__(self, codec: Codec, tasks: Sequence[Task]) -> None:
        self.codec = codec
        self.answers = {tuple(self.prompt(t, e)): self.tokens(t, e) for t in tasks for e in EFFORTS}

    def prompt(self, task: Task, effort: str, *more: dict[str, object]) -> list[int]:
        messages = [{"role": "user", "content": task.question}, *more]
        return self.codec.prompt(ChatRequest(messages=messages, effort=effort, tools=task.tools))

    def tokens(self, task: Task, effort: str) -> list[int]:
        """With tools the prompt format keeps a finished turn whole; without them its thinking is written here."""
        encode, added = self.codec.tokenizer.encode, self.codec.tokenizer.added
        if not task.tools:
            thinking = [] if effort == "none" else [*encode(task.traces[effort]), added["</think>"]]
            return thinking + encode(task.answer)
        name, arguments = task.tool_call
        call = {"id": "a", "function": {"name": name, "arguments": json.dumps(arguments)}}
        turn = {"role": "assistant", "content": "", "reasoning_content": task.traces[effort], "tool_calls": [call]}
        whole = self.prompt(task, effort, turn)[len(self.prompt(task, effort)) :]
        return whole[: whole.index(1)]

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        ids = self.answers[tuple(prompt_ids)]
        yield from (Event(token=i) for i in ids)
        yield Event(finish=FinishReason.STOP, usage=Usage(len(prompt_ids), len(ids)))

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        return [list(self.generate(*request)) for request in requests]


@pytest.fixture
def reciting(monkeypatch: pytest.MonkeyPatch) -> Reciter:
    codec = Codec.load(FOLDER)
    engine = Reciter(codec, [t for name in SKILLS for level in (1, 2, 3) for t in held_out(name, level, 3, 0)])
    end = codec.tokenizer.added["</think>"]
    monkeypatch.setattr(command, "_open", lambda *_: (Chat(engine, codec), end))
    return engine


def test_right_answers_in_the_real_format_all_count(
    reciting: Reciter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.evaluate("skills", samples=3, out=tmp_path)
    printed = capsys.readouterr().out
    assert "| **mean** | **100.0** | **100.0** | **100.0** |" in printed
    report = json.loads((tmp_path / "skills.json").read_text())
    lengths = {(s["group"], s["effort"]): s["thinking_tokens"] for s in report["scores"]}
    encode = reciting.codec.tokenizer.encode
    asked = [t for level in (1, 2, 3) for t in held_out("sort", level, 3, 0)]
    for effort in EFFORTS:
        expected = sum(len(encode(t.traces[effort])) for t in asked) / len(asked)
        assert lengths["sort", effort] == pytest.approx(expected)


def test_json_and_choices(reciting: Reciter, capsys: pytest.CaptureFixture[str]) -> None:
    command.evaluate("skills", samples=2, effort=["max"], skill=["tools", "chain"], level=[2], as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert [(s["group"], s["effort"], s["n"]) for s in report["scores"]] == [("tools", "max", 2), ("chain", "max", 2)]


@pytest.mark.parametrize(("task", "more"), [("chess", {}), ("skills", {"effort": ["low"]}), ("skills", {"samples": 0})])
def test_what_does_not_exist_is_refused(task: str, more: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        command.evaluate(task, **more)
