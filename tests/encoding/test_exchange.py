"""Requests of all protocols, without HTTP: the prompt, the sampling, the guide and the namespace they become."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

import fathom
from fathom.api import Event, FinishReason
from fathom.encoding.codec import Codec
from fathom.encoding.desk import Desk
from fathom.encoding.dialect import Dialect, Settings
from fathom.encoding.exchange import Exchange
from fathom.encoding.intake import count_tokens, open_exchange
from fathom.errors import ContextError, FathomError, RequestError
from tests.encoding.vectors import GOLDEN, SCHEMA, WEATHER

OFF: dict[str, Any] = {"thinking": {"type": "disabled"}}
USER = {"role": "user", "content": "Hi"}
NEEDED: dict[str, dict[str, Any]] = {
    "chat": {"messages": [USER]},
    "messages": {"messages": [USER], "max_tokens": 50},
    "responses": {"input": "Hi"},
    "completions": {"prompt": "Hi"},
}
MESSAGES_TOOL = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}


@pytest.fixture(scope="module")
def small() -> Codec:
    return Codec.load(Path(fathom.__path__[0]) / "weights" / "small")


def desk_of(codec: Codec, **options: Any) -> Desk:
    return Desk(
        **{"codec": codec, "served": ("deepseek-v4-flash", "deepseek-v4-pro", "own"), "context": 1 << 20} | options
    )


@pytest.fixture
def desk(small: Codec) -> Desk:
    return desk_of(small)


def opened(desk: Desk, protocol: str = "chat", **fields: Any) -> Exchange:
    return open_exchange(protocol, json.dumps({"model": "own", **NEEDED[protocol], **fields}).encode(), desk)


def text(exchange: Exchange, desk: Desk) -> str:
    return desk.codec.tokenizer.decode(exchange.prompt_ids)


# --- prompts


@pytest.mark.parametrize("name", GOLDEN)
def test_cases_12_30_golden_prompts(codec: Codec, name: str) -> None:
    turns, effort, tools, tokens, digest = GOLDEN[name]
    fields: dict[str, Any] = OFF if effort == "none" else {"reasoning_effort": effort}
    fields = fields | ({"tools": [WEATHER]} if tools else {})
    if name == "g13":
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    desk = desk_of(codec)
    exchange = opened(desk, messages=turns, **fields)
    assert len(exchange.prompt_ids) == tokens
    assert hashlib.sha256(text(exchange, desk).encode()).hexdigest() == digest


_P1, _P2, _NONE = "f7a24f3b", "53fb31b8", "e3b0c442"


@pytest.mark.parametrize("protocol", ["chat", "messages", "responses"])
@pytest.mark.parametrize(
    ("effort", "april", "august"),
    [
        ("low", _NONE, _NONE),
        ("medium", _NONE, _P1),
        ("high", _NONE, _P1),
        ("xhigh", _NONE, _P1),
        ("max", _P1, _P2),
        (None, _NONE, _P1),
    ],
)
def test_case_14_efforts(codec: Codec, protocol: str, effort: str | None, april: str, august: str) -> None:
    """The digests of the two texts are published."""
    names = {"chat": {"reasoning_effort": effort}, "responses": {"reasoning": {"effort": effort}}}
    fields = names.get(protocol, {"output_config": {"effort": effort}}) if effort else {}
    for dialect, wanted in ((Dialect.APRIL, april), (Dialect.AUGUST, august)):
        desk = desk_of(Codec(codec.tokenizer, Settings(dialect)))
        prompt = text(opened(desk, protocol, **fields), desk)
        prefix = prompt.removeprefix("<｜begin▁of▁sentence｜>").split("<｜User｜>")[0]
        assert hashlib.sha256(prefix.encode()).hexdigest()[:8] == wanted


def test_cases_13_15_tools_in_the_prompt(desk: Desk) -> None:
    shown = text(opened(desk, tools=[WEATHER]), desk)
    hidden = text(opened(desk, tools=[WEATHER], tool_choice="none"), desk)
    assert "Paris" not in shown and "get_weather" in shown and "get_weather" not in hidden
    turned = {"type": "object", "properties": dict(reversed(WEATHER["function"]["parameters"]["properties"].items()))}
    other = {"type": "function", "function": {**WEATHER["function"], "parameters": turned}}
    order = text(opened(desk, tools=[other]), desk)
    assert order.index('"days"') < order.index('"city"') and shown.index('"city"') < shown.index('"days"')


def test_case_19_text_is_no_control_token(desk: Desk) -> None:
    hostile = "".join(desk.codec.tokenizer.added)
    controls = set(desk.codec.tokenizer.added.values())

    def seen(said: str) -> list[int]:
        ids = opened(desk, messages=[{"role": "system", "content": said}, {"role": "user", "content": said}]).prompt_ids
        return [token for token in ids if token in controls]

    assert seen(hostile) == seen("harmless")


def test_cases_21_22_23_72_thinking_off(desk: Desk) -> None:
    for fields in (OFF, {"reasoning_effort": "none"}, OFF | {"reasoning_effort": "max"}):
        exchange = opened(desk, **fields)
        assert not exchange.thinking and text(exchange, desk).endswith("</think>")
    assert not opened(desk, "messages", **OFF).thinking
    for kind in ("adaptive", "enabled"):
        assert opened(desk, "messages", thinking={"type": kind, "budget_tokens": 7}).thinking


def test_case_31_missing_reasoning(desk: Desk, small: Codec) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    turns = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "x"}]
    assert "<think></think>" in text(opened(desk, messages=turns, tools=[WEATHER]), desk)
    with pytest.raises(RequestError, match="must be passed back to the API"):
        opened(desk_of(small, strict=True), messages=turns, tools=[WEATHER])


@pytest.mark.parametrize(
    ("turn", "ending", "thinking"),
    [
        ([{"type": "text", "text": "Th"}], "<think></think>Th", False),
        ([{"type": "thinking", "thinking": "hm", "signature": ""}], "<think>hm", True),
    ],
)
def test_messages_go_on_from_a_given_beginning(desk: Desk, turn: Any, ending: str, thinking: bool) -> None:
    exchange = opened(desk, "messages", messages=[USER, {"role": "assistant", "content": turn}])
    assert text(exchange, desk).endswith(ending) and exchange.thinking is thinking


def test_case_62_a_prefix_goes_on(desk: Desk) -> None:
    exchange = opened(desk, messages=[USER, {"role": "assistant", "content": "```", "prefix": True}], **OFF)
    assert text(exchange, desk).endswith("</think>```")


# --- what is refused


@pytest.mark.parametrize(
    ("protocol", "fields", "words"),
    [
        ("chat", {"model": "foo"}, "deepseek-v4-flash or deepseek-v4-pro or own"),
        ("chat", {"model": "claude-opus-4-8"}, "not served"),
        ("messages", {"model": "foo"}, "not served"),
        ("chat", {"model": None}, "model is missing"),
        ("chat", {"messages": []}, "Empty"),
        ("chat", {"messages": ["x"]}, "list of objects"),
        ("messages", {"messages": []}, "at least one"),
        ("responses", {"input": []}, "empty"),
        ("chat", {"max_tokens": 0}, "393216"),
        ("chat", {"max_tokens": -1}, "-1"),
        ("chat", {"max_tokens": 393217}, "393216"),
        ("chat", {"max_tokens": "x"}, "x"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"reasoning_effort": "bogus"}, "bogus"),
        ("chat", {"temperature": 3}, "temperature"),
        ("chat", {"stop": ["a"] * 17}, "17"),
        ("chat", {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [WEATHER]}, "'g'"),
        ("responses", {"tools": [{"type": "custom", "name": "other"}]}, "apply_patch"),
        ("completions", {"prompt": ["a", "b"]}, "prompt must be a string"),
        ("completions", {"logit_bias": {"1": 2}}, "logit_bias"),
        ("completions", {"best_of": 2}, "best_of"),
    ],
)
def test_cases_6_9_10_24_89_refusals_name_what_is_wrong(
    desk: Desk, protocol: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(FathomError, match=words) as caught:
        opened(desk, protocol, **fields)
    assert getattr(caught.value, "status", 400) == 400


@pytest.mark.parametrize("depth", [200, 900, 100_000])
def test_deep_bodies_are_refused(desk: Desk, depth: int) -> None:
    schema = '{"a":' * depth + "1" + "}" * depth
    tool = f'{{"type": "function", "function": {{"name": "f", "strict": true, "parameters": {schema}}}}}'
    raw = f'{{"model": "own", "messages": [{{"role": "user", "content": "x"}}], "tools": [{tool}]}}'
    with pytest.raises(RequestError, match=r"nested too deeply|recursion limit"):
        open_exchange("chat", raw.encode(), desk)


@pytest.mark.parametrize("protocol", list(NEEDED))
def test_case_91_a_prompt_that_does_not_fit(small: Codec, protocol: str) -> None:
    key = {"responses": "input", "completions": "prompt"}.get(protocol, "messages")
    said: Any = "word " * 200
    fields = {key: said if key != "messages" else [{"role": "user", "content": said}]}
    needed = len(opened(desk_of(small), protocol, **fields).prompt_ids)
    with pytest.raises(ContextError, match=rf"{needed} tokens.* 100 "):
        opened(desk_of(small, context=100), protocol, **fields)


@pytest.mark.parametrize("protocol", list(NEEDED))
def test_a_prompt_far_too_long_is_refused_soon(small: Codec, protocol: str) -> None:
    """Megabytes would take minutes and gigabytes to encode."""
    key = {"responses": "input", "completions": "prompt"}.get(protocol, "messages")
    said: Any = "7" * 20_000_000
    fields = {key: said if key != "messages" else [{"role": "user", "content": said}]}
    begun = time.perf_counter()
    with pytest.raises(ContextError, match=r"more than 50000 tokens.* holds 50000 "):
        opened(desk_of(small, context=50_000), protocol, **fields)
    assert time.perf_counter() - begun < 5, "all of it takes ten times as long"


# --- names, sampling, namespaces


def test_case_6_names_of_models(desk: Desk) -> None:
    def served(protocol: str, name: str) -> str:
        return opened(desk, protocol, model=name).model

    assert served("chat", "deepseek-v4-pro[1m]") == "deepseek-v4-pro"
    assert served("messages", "claude-opus-4-8") == "deepseek-v4-pro"
    assert served("messages", "claude-haiku-4-5[1m]") == "deepseek-v4-flash"
    assert served("completions", "own") == "own"


def test_cases_10_32_sampling(desk: Desk, small: Codec) -> None:
    params = opened(desk, temperature=0, top_p=0.5, seed=7, top_k=3, logprobs=True, top_logprobs=5).params
    assert (params.temperature, params.top_p, params.seed, params.top_k, params.logprobs) == (0, 0.5, 7, 3, 5)
    settings = desk.codec.settings
    params = opened(desk, temperature=None, top_k=-1).params
    assert (params.temperature, params.top_p) == (settings.temperature, settings.top_p)
    assert (params.top_k, params.logprobs, params.max_tokens) == (None, None, settings.max_tokens)
    assert opened(desk, max_tokens=393216).params.max_tokens == 393216
    assert opened(desk_of(small, strict=True), temperature=0.2).params.temperature == 1
    left = opened(desk_of(small, context=100), max_tokens=5000)
    assert left.params.max_tokens == 100 - len(left.prompt_ids)
    assert opened(desk, "messages", max_tokens=1).params.max_tokens == 1
    assert opened(desk, "responses", max_output_tokens=9).params.max_tokens == 9


def test_default_bounds_without_settings(codec: Codec) -> None:
    desk = desk_of(Codec(codec.tokenizer, Settings()))
    assert opened(desk, **OFF).params.max_tokens == 8192
    assert opened(desk).params.max_tokens == 65536
    assert opened(desk, reasoning_effort="max").params.max_tokens == 131072
    assert opened(desk, "completions").params.max_tokens == 4096


def test_case_67_namespaces(desk: Desk, small: Codec) -> None:
    def space(protocol: str, key: str = "", at: Desk = desk, **fields: Any) -> str:
        body = json.dumps({"model": "own", **NEEDED[protocol], **fields}).encode()
        return open_exchange(protocol, body, at, key=key).generate().namespace

    for protocol in NEEDED:
        assert space(protocol) == space(protocol) != space(protocol, key="k")
    for protocol in ("chat", "responses", "completions"):
        assert space(protocol, user_id="a") != space(protocol, user_id="b")
    users = [{"metadata": {"user_id": name}} for name in "ab"]
    assert space("messages", **users[0]) == space("messages", **users[1])
    isolating = desk_of(small, users=True)
    assert space("messages", at=isolating, **users[0]) != space("messages", at=isolating, **users[1])


def test_where_the_last_user_turn_begins(desk: Desk) -> None:
    turns = [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    request = opened(desk, messages=turns).generate()
    (place,) = request.keep
    assert desk.codec.tokenizer.decode(request.prompt_ids[place:]) == "<｜User｜>b<｜Assistant｜><think>"


# --- guides


def allowed(exchange: Exchange, desk: Desk) -> set[str]:
    mask = exchange.generate().guide.allowed()
    added = desk.codec.tokenizer.added
    return {name for name, i in added.items() if mask is None or mask[i // 8] >> i % 8 & 1}


def urged(exchange: Exchange, desk: Desk, said: str) -> bool:
    """Whether the guide lets these words come next."""
    guide, tokenizer = exchange.generate().guide, desk.codec.tokenizer
    for token in tokenizer.encode(said):
        mask = guide.allowed()
        if mask is not None and not mask[token // 8] >> token % 8 & 1:
            return False
        guide.accept(token)
    return True


@pytest.mark.parametrize(
    ("protocol", "choice"),
    [
        ("chat", "required"),
        ("chat", {"type": "function", "function": {"name": "get_weather"}}),
        ("chat", {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}),
        ("messages", {"type": "any"}),
        ("messages", {"type": "tool", "name": "get_weather"}),
        ("responses", "required"),
        ("responses", {"type": "function", "name": "get_weather"}),
    ],
)
def test_cases_56_83_forced_calls(desk: Desk, protocol: str, choice: Any) -> None:
    """While it thinks a model is free; then a call must come. Without thinking the prompt opens the block itself."""
    tools = {"chat": WEATHER, "messages": MESSAGES_TOOL, "responses": {"type": "function", **WEATHER["function"]}}
    fields = {"tools": [tools[protocol]], "tool_choice": choice}
    exchange = opened(desk, protocol, **fields)
    assert exchange.thinking and text(exchange, desk).endswith("<think>")
    guide = exchange.generate().guide
    guide.accept(desk.codec.tokenizer.added["</think>"])
    assert not allowed(exchange, desk) and not urged(exchange, desk, "No")
    off = {"reasoning": {"effort": "none"}} if protocol == "responses" else OFF
    exchange = opened(desk, protocol, **fields, **off)
    assert text(exchange, desk).endswith("\n\n<｜DSML｜tool_calls>\n") and not exchange.thinking


@pytest.mark.parametrize(
    ("protocol", "fields"),
    [
        ("chat", {"tools": [WEATHER], "tool_choice": "required"}),
        ("messages", {"tools": [MESSAGES_TOOL], "tool_choice": {"type": "any"}}),
        ("messages", {"tools": [MESSAGES_TOOL], "tool_choice": {"type": "tool", "name": "get_weather"}}),
    ],
)
def test_case_56_strict_refuses_forced_calls_while_thinking(small: Codec, protocol: str, fields: Any) -> None:
    with pytest.raises(RequestError, match="Thinking mode does not support this tool_choice"):
        opened(desk_of(small, strict=True), protocol, **fields)


def test_a_tool_may_be_called_any(desk: Desk) -> None:
    """The name of a tool is no keyword of ours."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("any", "b")
    ]
    choice = {"type": "function", "function": {"name": "any"}}
    exchange = opened(desk, tools=tools, tool_choice=choice, **OFF)
    assert '"name": "b"' not in text(exchange, desk)


def test_cases_60_61_90_json(desk: Desk) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for protocol, fields in (
        ("chat", {"response_format": form, **OFF}),
        (
            "responses",
            {
                "text": {"format": {"type": "json_schema", "name": "n", "schema": schema}},
                "reasoning": {"effort": "none"},
            },
        ),
    ):
        assert urged(opened(desk, protocol, **fields), desk, '{"a":1}')
        assert not urged(opened(desk, protocol, **fields), desk, '{"b":1}')
    assert not urged(opened(desk, response_format={"type": "json_object"}, **OFF), desk, "[1]")


def test_a_budget_of_thinking(desk: Desk) -> None:
    exchange = opened(desk, "messages", thinking={"type": "enabled", "budget_tokens": 2})
    guide, tokenizer = exchange.generate().guide, desk.codec.tokenizer
    for token in tokenizer.encode("ab")[:1] * 2:
        guide.accept(token)
    assert allowed(exchange, desk) == {"</think>"} and not urged(exchange, desk, "c")


def test_case_88_what_responses_carry_along(desk: Desk) -> None:
    fields = {
        "previous_response_id": "r",
        "include": ["x"],
        "prompt_cache_key": "k",
        "truncation": "auto",
        "store": True,
    }
    assert opened(desk, "responses", **fields).prompt_ids == opened(desk, "responses").prompt_ids


def test_case_89_apply_patch(desk: Desk) -> None:
    assert "apply_patch" in text(opened(desk, "responses", tools=[{"type": "custom", "name": "apply_patch"}]), desk)


# --- completions


def test_completions_fill_in(desk: Desk) -> None:
    assert text(opened(desk, "completions"), desk) == "<｜begin▁of▁sentence｜>Hi"
    middle = text(opened(desk, "completions", suffix="!"), desk)
    assert middle == "<｜begin▁of▁sentence｜><｜fim▁begin｜>Hi<｜fim▁hole｜>!<｜fim▁end｜>"
    assert (
        opened(desk, "completions", temperature=None, suffix=None).params.temperature == desk.codec.settings.temperature
    )


def test_a_vocabulary_that_cannot_fill_in(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(desk.codec.tokenizer.added, "<｜fim▁hole｜>")
    with pytest.raises(RequestError, match="fim▁hole"):
        opened(desk, "completions", suffix="!")


# --- answers and time


def test_case_78_a_stop_sequence_reaches_the_writer(desk: Desk) -> None:
    writer = opened(desk, "messages", stop_sequences=["X"], **OFF).writer("id")
    writer.start(1, 0)
    for token in desk.codec.tokenizer.encode("abcXdef"):
        if not writer.stopped:
            writer.push(Event(token=token))
    assert writer.stopped
    writer.finish(Event(finish=FinishReason.CANCELLED))
    body = json.loads(writer.body())
    assert (body["stop_reason"], body["stop_sequence"], body["content"][0]["text"]) == ("stop_sequence", "X", "abc")


def test_case_77_counting_goes_beyond_the_context(small: Codec) -> None:
    said = json.dumps({"model": "own", "messages": [{"role": "user", "content": "word " * 500}]}).encode()
    full, narrow = desk_of(small), desk_of(small, context=100)
    assert count_tokens(said, narrow) == len(open_exchange("messages", said, full).prompt_ids)
    endless = json.dumps({"model": "own", "messages": [{"role": "user", "content": "7" * 6_000_000}]}).encode()
    with pytest.raises(RequestError, match="more than 4194304 tokens"):
        count_tokens(endless, narrow)


def test_an_agents_next_round_opens_quickly(codec: Codec) -> None:
    """About 25,000 tokens and 30 tools; the first round compiles the tools."""
    desk, prose = desk_of(codec), "The quick brown fox jumps over the lazy dog; naming 17 files. "
    properties = {name: {"type": "string", "description": prose} for name in ("path", "command", "mode")}
    tools = [
        {"name": f"tool_{n}", "description": prose * 8, "input_schema": {"type": "object", "properties": properties}}
        for n in range(30)
    ]
    fields = {"system": prose * 200, "tools": tools, "messages": [{"role": "user", "content": prose * 800}]}
    assert len(opened(desk, "messages", **fields).prompt_ids) > 20_000
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        opened(desk, "messages", **fields)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.2


@pytest.mark.parametrize(
    ("protocol", "fields"),
    [
        ("chat", {"messages": [{"role": "system", "content": ""}]}),
        ("responses", {"input": [{"type": "web_search_call"}]}),
    ],
)
def test_a_conversation_without_any_text_is_answered(desk: Desk, protocol: str, fields: dict[str, Any]) -> None:
    """What the library drops leaves no message at all; the answer can be written and kept all the same."""
    exchange = opened(desk, protocol, **fields)
    writer = exchange.writer("id")
    writer.start(3, 0)
    for token in [desk.codec.tokenizer.added["</think>"], *desk.codec.tokenizer.encode("Hi")]:
        writer.push(Event(token=token))
    writer.finish(Event(finish=FinishReason.STOP))
    exchange.remember(writer)
    assert writer.message()["content"] == "Hi"
