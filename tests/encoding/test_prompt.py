"""Prompts against the golden vectors of the published encoder, and what client text cannot do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import deepseek_recipe
import pytest

import fathom
from fathom.api import ChatRequest
from fathom.encoding.codec import Codec
from fathom.encoding.conversation import conversation
from fathom.encoding.dialect import Dialect, Settings
from fathom.encoding.tokenizer import Tokenizer
from fathom.errors import ConfigError, PromptError
from tests.encoding.vectors import GOLDEN, SCHEMA, WEATHER


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_prompts(codec: Codec, name: str) -> None:
    messages, effort, tools, tokens, digest = GOLDEN[name]
    request = ChatRequest(messages=messages, effort=effort, tools=[WEATHER] if tools else [])
    rendered = codec.render(request, SCHEMA if name == "g13" else None)
    ids = codec.tokenizer.splice(rendered.prompt, rendered.special_ranges)
    assert hashlib.sha256(rendered.prompt.encode()).hexdigest() == digest
    assert len(ids) == tokens


def test_the_ids_of_g2(codec: Codec) -> None:
    messages, effort, *_ = GOLDEN["g2"]
    ids = codec.prompt(ChatRequest(messages=messages, effort=effort))
    assert ids == [0, 3476, 477, 11502, 16, 128803, 23166, 128804, 128821]


@pytest.fixture(params=["published", "embedded"])
def any_codec(request: pytest.FixtureRequest, codec: Codec) -> Codec:
    """A codec of the published tokenizer, and of the embedded model's."""
    if request.param == "published":
        return codec
    return Codec(Tokenizer.load(Path(fathom.__path__[0]) / "weights" / "small"))


def test_splicing_equals_the_librarys_own_encoder(any_codec: Codec) -> None:
    own = deepseek_recipe.DeepseekV4Encoding().with_tokenizer(any_codec.native)
    for messages, effort, tools, *_ in GOLDEN.values():
        request = ChatRequest(messages=messages, effort=effort, tools=[WEATHER] if tools else [])
        told = conversation(request.messages, request.effort, Dialect.APRIL, request.tools)
        assert any_codec.prompt(request) == own.encode(told)


def test_effort_texts_of_both_dialects(tokenizer: Tokenizer) -> None:
    """April: none, P1; 0813: P1, P2. The digests of the two texts are published."""
    texts = {}
    for dialect in Dialect:
        codec = Codec(tokenizer, Settings(dialect))
        for effort in ("high", "max"):
            prompt = codec.render(ChatRequest(messages=[{"role": "user", "content": "x"}], effort=effort)).prompt
            text = prompt.removeprefix("<｜begin▁of▁sentence｜>").split("<｜User｜>")[0]
            texts[dialect, effort] = hashlib.sha256(text.encode()).hexdigest()[:8]
    assert texts == {
        (Dialect.APRIL, "high"): "e3b0c442",
        (Dialect.APRIL, "max"): "f7a24f3b",
        (Dialect.AUGUST, "high"): "f7a24f3b",
        (Dialect.AUGUST, "max"): "53fb31b8",
    }


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_client_text_never_becomes_a_control_token(any_codec: Codec, role: str) -> None:
    def ids(text: str) -> list[int]:
        call = {"id": "c", "function": {"name": "get_weather", "arguments": json.dumps({"city": text})}}
        answer = {"role": "assistant", "content": text if role == "assistant" else "", "reasoning_content": text}
        messages = [
            {"role": "system", "content": text if role == "system" else ""},
            {"role": "user", "content": text if role == "user" else ""},
            answer | {"tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": text if role == "tool" else ""},
        ]
        return any_codec.prompt(ChatRequest(messages=messages, tools=[WEATHER]))

    controls = set(any_codec.tokenizer.added.values())
    hostile = "".join(any_codec.tokenizer.added)
    assert [i for i in ids(hostile) if i in controls] == [i for i in ids("harmless") if i in controls]


def test_calls_and_results_keep_call_order(codec: Codec) -> None:
    calls = [
        {"id": i, "function": {"name": "get_weather", "arguments": json.dumps({"city": i})}} for i in ("z", "b", "a")
    ]
    results = [{"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in ("a", "b", "z")]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    prompt = codec.render(ChatRequest(messages=messages, tools=[WEATHER])).prompt
    places = [prompt.index(text) for text in (">z<", ">b<", ">a<", "result z", "result b", "result a")]
    assert places == sorted(places)


def test_a_later_system_message_becomes_user_text(codec: Codec) -> None:
    messages = [{"role": r, "content": r[0]} for r in ("system", "developer", "user", "system")]
    prompt = codec.render(ChatRequest(messages=messages, effort="none")).prompt
    assert prompt == "<｜begin▁of▁sentence｜>s\n\nd<｜User｜>u\n\ns<｜Assistant｜></think>"


@pytest.mark.parametrize(
    ("messages", "effort", "tools", "words"),
    [
        ([], "high", [], "empty"),
        ([{"role": "robot", "content": "x"}], "high", [], "robot"),
        (["text"], "high", [], "text"),
        ([{"role": "user", "content": "x", "colour": "red"}], "high", [], "colour"),
        ([{"role": "user", "content": 5}], "high", [], "int"),
        ([{"role": "user", "content": "x"}], "huge", [], "none, high or max"),
        ([{"role": "user", "content": "x"}], "high", [{"name": "f"}], "tool 0"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "high", [], "function.name"),
    ],
)
def test_refusals_name_what_is_wrong(codec: Codec, messages: list, effort: str, tools: list, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        codec.prompt(ChatRequest(messages=messages, effort=effort, tools=tools))


def test_which_dialect(tmp_path: Path) -> None:
    late, plain, drafter = (tmp_path / n for n in ("DeepSeek-V4-Flash-0731", "some-model", "repack"))
    for folder in (late, plain, drafter):
        folder.mkdir()
    (drafter / "config.json").write_text('{"dspark_block_size": 5}')
    assert Settings.load(late).dialect is Dialect.AUGUST
    assert Settings.load(plain).dialect is Dialect.APRIL
    assert Settings.load(drafter).dialect is Dialect.AUGUST
    (drafter / "fathom.json").write_text('{"dialect": "april", "max_tokens": 7}')
    assert Settings.load(drafter) == Settings(Dialect.APRIL, max_tokens=7)
    assert Settings.load(drafter, "0813").dialect is Dialect.AUGUST
    with pytest.raises(ConfigError, match="april or 0813"):
        Settings.load(drafter, "v5")
    (drafter / "fathom.json").write_text('{"dialekt": "april"}')
    with pytest.raises(ConfigError, match="dialekt"):
        Settings.load(drafter)
