"""Sampled ids to answers: thinking, text and tool calls, with every id pushed alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest
from tokenizers import Tokenizer as Bpe

from fathom.api import ChatRequest, Completion, Delta, Event, FinishReason, SamplingParams, Usage
from fathom.encoding.chat import Chat
from fathom.encoding.codec import Codec
from fathom.encoding.dialect import Settings
from tests.encoding.vectors import WEATHER

CALLS = """need two</think>ok

<｜DSML｜tool_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Paris "2>&1" 👩‍🚀</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""


class Script:
    """An engine that says what it was told to."""

    context = 1000

    def __init__(self, ids: Sequence[int], finish: FinishReason = FinishReason.STOP) -> None:
        self.ids, self.finish = ids, finish
        self.seen: list[SamplingParams] = []

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        self.seen.append(params)
        yield from (Event(token=i) for i in self.ids)
        yield Event(finish=self.finish, usage=Usage(len(prompt_ids), len(self.ids)))

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        return [list(self.generate(*r)) for r in requests]


def answer(
    codec: Codec, reference: Bpe, text: str, effort: str = "high", finish: FinishReason = FinishReason.STOP
) -> Completion:
    ids = reference.encode(text, add_special_tokens=False).ids
    request = ChatRequest(messages=[{"role": "user", "content": "q"}], effort=effort, tools=[WEATHER])
    chat = Chat(Script(ids, finish), codec)
    *deltas, whole = chat.stream(request)
    assert isinstance(whole, Completion)
    assert whole.token_ids == tuple(ids)
    assert "".join(d.text for d in deltas if isinstance(d, Delta)) == whole.text
    assert "".join(d.thinking for d in deltas if isinstance(d, Delta)) == whole.thinking
    return whole


@pytest.mark.parametrize(
    ("text", "effort", "thinking", "content"),
    [
        ("abc</think>xyz", "high", "abc", "xyz"),
        ("</think>xyz", "high", "", "xyz"),
        ("abc", "high", "abc", ""),
        ("xyz", "none", "", "xyz"),
        ("</think>hi", "none", "", "hi"),
        ("a</think>what is 2 <", "high", "a", "what is 2 <"),
        ("a<｜User｜>b</think>c<｜▁pad▁｜>d", "high", "ab", "cd"),
        ("x</think>👩‍🚀 and 杭州", "high", "x", "👩‍🚀 and 杭州"),
    ],
)
def test_thinking_and_text(codec: Codec, reference: Bpe, text: str, effort: str, thinking: str, content: str) -> None:
    whole = answer(codec, reference, text, effort)
    assert (whole.thinking, whole.text, whole.finish) == (thinking, content, FinishReason.STOP)


def test_tool_calls(codec: Codec, reference: Bpe) -> None:
    whole = answer(codec, reference, CALLS)
    assert (whole.thinking, whole.text, whole.finish) == ("need two", "ok", FinishReason.TOOL_CALLS)
    assert [json.loads(c.arguments) for c in whole.tool_calls] == [
        {"city": 'Paris "2>&1" 👩‍🚀', "days": 2},
        {"city": "Rome"},
    ]
    assert len({c.id for c in whole.tool_calls}) == 2


def test_a_cut_anywhere_ends_cleanly(codec: Codec, reference: Bpe) -> None:
    for end in range(0, len(CALLS), 7):
        whole = answer(codec, reference, CALLS[:end], finish=FinishReason.LENGTH)
        assert whole.finish is FinishReason.LENGTH
        assert "DSML" not in whole.text + whole.thinking


def test_an_answer_goes_back_into_the_conversation(codec: Codec, reference: Bpe) -> None:
    """With tools the next prompt begins with this prompt and the sampled ids (reference recipe 3)."""
    ids = reference.encode(CALLS, add_special_tokens=False).ids
    request = ChatRequest(messages=[{"role": "user", "content": "q"}], tools=[WEATHER])
    whole = Chat(Script(ids), codec).chat(request)
    result = {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": "18C"}
    later = ChatRequest(messages=[*request.messages, whole.message(), result], tools=[WEATHER])
    before = codec.prompt(request) + ids + [codec.tokenizer.added["<｜end▁of▁sentence｜>"]]
    assert codec.prompt(later)[: len(before)] == before


def test_the_checkpoints_bound_on_answers(codec: Codec) -> None:
    engine = Script([5])
    chat = Chat(engine, Codec(codec.tokenizer, Settings(max_tokens=99)))
    messages = [{"role": "user", "content": "q"}]
    chat.chat_batch([ChatRequest(messages=messages, params=SamplingParams(max_tokens=n)) for n in (None, 5)])
    assert [p.max_tokens for p in engine.seen] == [99, 5]
