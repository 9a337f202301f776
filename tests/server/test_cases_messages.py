"""Cases 71 to 83 of reference api D.3: Messages, driven by the anthropic client."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import pytest

from tests.server.harness import BROKEN, MODEL, PARIS, ROME, T1_MESSAGES, Site, block, eventually, leaks, user

SAID = "Let me see.</think>It is four."
CALLED = "Look it up.</think>One moment." + block(PARIS)


def create(site: Site, text: Any = "2+2?", **fields: Any) -> anthropic.types.Message:
    return site.anthropic().messages.create(**{"model": MODEL, "max_tokens": 500, "messages": [user(text)]} | fields)


def kinds(message: anthropic.types.Message) -> list[str]:
    return [piece.type for piece in message.content]


def test_case_71_an_answer(site: Site) -> None:
    site.script(SAID)
    answer = create(site, max_tokens=50)
    thinking, text = answer.content
    assert (thinking.type, thinking.thinking, text.type, text.text) == (
        "thinking",
        "Let me see.",
        "text",
        "It is four.",
    )
    assert thinking.signature
    assert (answer.type, answer.role, answer.stop_reason, answer.stop_sequence) == (
        "message",
        "assistant",
        "end_turn",
        None,
    )
    used = answer.usage
    assert used.input_tokens + (used.cache_read_input_tokens or 0) == len(site.prompt())
    assert used.output_tokens == len(site.ids(SAID))
    assert used.cache_creation_input_tokens is not None


@pytest.mark.parametrize(
    "thinking",
    [
        {"type": "adaptive"},
        {"type": "enabled", "budget_tokens": 1},
        {"type": "enabled", "budget_tokens": 100_000},
        {"type": "disabled"},
    ],
)
def test_case_72_kinds_of_thinking(site: Site, thinking: Any) -> None:
    off = thinking["type"] == "disabled"
    site.script("It is four." if off else SAID)
    assert kinds(create(site, thinking=thinking)) == (["text"] if off else ["thinking", "text"])
    assert site.prompt_text().endswith("</think>" if off else "<think>")


def test_case_72_a_thinking_budget_is_kept(real: Site) -> None:
    answer = create(real, "sort: 9, 3, 7, 1, 8", thinking={"type": "enabled", "budget_tokens": 4})
    assert len(real.ids(answer.content[0].thinking)) <= 4
    assert kinds(answer)[-1] == "text"


def events(site: Site, **fields: Any) -> list[Any]:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 500, "messages": [user("2+2?")]} | fields
    return list(site.anthropic().messages.create(stream=True, **body))


def test_case_73_the_order_of_a_stream(site: Site) -> None:
    site.script(SAID)
    found = [e for e in events(site) if e.type != "ping"]
    order = [e.type for n, e in enumerate(found) if n == 0 or e.type != found[n - 1].type]
    piece = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert order == ["message_start", *piece, *piece, "message_delta", "message_stop"]
    ends = [found[n - 1].delta.type for n, e in enumerate(found) if e.type == "content_block_stop"]
    assert ends == ["signature_delta", "text_delta"]
    assert found[-2].usage.output_tokens == len(site.ids(SAID))
    with site.anthropic().messages.stream(model=MODEL, max_tokens=500, messages=[user("2+2?")]) as stream:
        final = stream.get_final_message()
    assert [b.to_dict().get("thinking") or b.to_dict().get("text") for b in final.content] == [
        "Let me see.",
        "It is four.",
    ]
    assert final.stop_reason == "end_turn"


def test_case_74_a_stream_of_a_call(site: Site) -> None:
    site.script(CALLED)
    found = events(site, tools=[T1_MESSAGES])
    opened = {e.index: e.content_block for e in found if e.type == "content_block_start"}
    assert [b.type for b in opened.values()] == ["thinking", "text", "tool_use"]
    pieces = [
        e.delta.partial_json for e in found if getattr(getattr(e, "delta", None), "type", "") == "input_json_delta"
    ]
    assert json.loads("".join(pieces)) == {"city": "Paris", "days": 2}
    assert [e.delta.stop_reason for e in found if e.type == "message_delta"] == ["tool_use"]
    with site.anthropic().messages.stream(
        model=MODEL, max_tokens=500, messages=[user("Weather?")], tools=[T1_MESSAGES]
    ) as stream:
        final = stream.get_final_message()
    assert final.content[2].input == {"city": "Paris", "days": 2} and final.content[2].name == "get_weather"
    assert not leaks(final.model_dump_json())


def foreign_signature(turn: list[Any]) -> list[Any]:
    return [b | {"signature": "EqQBCgIYAhIM"} if b["type"] == "thinking" else b for b in turn]


TURNS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "as it came": lambda turn: turn,
    "no thinking": lambda turn: [b for b in turn if b["type"] != "thinking"],
    "redacted": lambda turn: [{"type": "redacted_thinking", "data": "xyz"}, *turn[1:]],
    "foreign signature": foreign_signature,
    "only the call": lambda turn: turn[2:],
}

RESULTS = {
    "text": {"content": "18C"},
    "parts": {"content": [{"type": "text", "text": "18C"}, {"type": "text", "text": "dry"}]},
    "error": {"content": "18C", "is_error": True},
    "nothing": {},
    "image": {"content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}]},
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("answer", RESULTS)
def test_case_75_a_call_goes_back(site: Site, turn: str, answer: str) -> None:
    site.script(CALLED, "</think>18 degrees.")
    first = create(site, tools=[T1_MESSAGES])
    blocks = [b.to_dict() for b in first.content]
    result = {"type": "tool_result", "tool_use_id": first.content[2].id} | RESULTS[answer]
    turns = [user("2+2?"), {"role": "assistant", "content": TURNS[turn](blocks)}, user([result])]
    last = create(site, messages=turns, tools=[T1_MESSAGES])
    assert last.content[-1].text == "18 degrees."
    assert ("18C" in site.prompt_text()) == (answer in ("text", "parts", "error"))
    assert "EqQBCgIYAhIM" not in site.prompt_text()


def test_case_75_text_and_results_in_any_order(site: Site) -> None:
    site.script("</think>ok")
    called = [{"type": "tool_use", "id": i, "name": "get_weather", "input": {"city": i}} for i in ("b", "a")]
    results = [{"type": "tool_result", "tool_use_id": i, "content": f"R-{i}"} for i in ("a", "b")]
    turns = [user("Go"), {"role": "assistant", "content": [*called, {"type": "text", "text": "after"}]}]
    create(site, messages=[*turns, user([{"type": "text", "text": "before"}, *results])], tools=[T1_MESSAGES])
    text = site.prompt_text()
    assert text.index("R-b") < text.index("R-a") and "before" in text and "after" in text


def test_case_76_what_agents_send(site: Site) -> None:
    site.script("</think>ok")
    body = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
            {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}, "unknown": 1},
        ],
        "messages": [
            user([{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "citations": None}]),
            {"role": "system", "content": "Be brief."},
        ],
        "metadata": {"user_id": "user_1_session_2"},
        "output_config": {"effort": "high"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": []},
    }
    assert site.messages(**body).status_code == 200
    text = site.prompt_text()
    assert text.startswith("<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi")
    assert "Be brief." in text and "billing" not in text and text.endswith("<｜Assistant｜><think>")


UNUSUAL: list[dict[str, Any]] = [
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "the text inside"}},
    {"type": "search_result", "source": "x", "title": "t", "content": [{"type": "text", "text": "found"}]},
    {"type": "container_upload", "file_id": "f"},
    {"type": "made_up", "x": [1]},
]


@pytest.mark.parametrize("piece", UNUSUAL, ids=lambda p: p["type"])
def test_case_76_unusual_blocks(site: Site, piece: dict[str, Any]) -> None:
    site.script("</think>ok")
    assert site.messages(messages=[user([{"type": "text", "text": "See:"}, piece])]).status_code == 200
    wanted = {"document": "the text inside", "search_result": "found"}.get(piece["type"], "See:")
    assert wanted in site.prompt_text()


def test_case_77_counting_tokens(site: Site) -> None:
    site.script(CALLED)
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [user("Weather in Paris?")],
        "tools": [T1_MESSAGES],
        "system": "Be kind.",
        "thinking": {"type": "enabled", "budget_tokens": 2000},
    }
    counted = site.anthropic().messages.count_tokens(**asked).input_tokens
    used = site.anthropic().messages.create(max_tokens=100, **asked).usage
    read, written = used.cache_read_input_tokens or 0, used.cache_creation_input_tokens or 0
    assert counted == used.input_tokens + read + written == len(site.prompt())
    assert len(site.relay.inner.requests) == 1


def test_case_78_stop_sequences(site: Site) -> None:
    site.script("Let me see.</think>It is X or so.")
    answer = create(site, stop_sequences=["X"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "X")
    assert answer.content[-1].text == "It is "
    (delta,) = [e.delta for e in events(site, stop_sequences=["Y", "X"]) if e.type == "message_delta"]
    assert (delta.stop_reason, delta.stop_sequence) == ("stop_sequence", "X")


def test_case_79_one_token(site: Site) -> None:
    site.script(SAID)
    answer = create(site, max_tokens=1)
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 1)


def test_case_80_an_unknown_model(site: Site) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        create(site, model="foo")
    assert refused.value.body["type"] == "error" and "foo" in refused.value.body["error"]["message"]


def test_case_80_overload_before_a_stream(narrow: Site) -> None:
    """Two may be served at once; the third is sent away before its stream begins."""
    gate = threading.Event()
    stub = narrow.script("word", gate=gate)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, narrow) for _ in range(2)]
        assert eventually(lambda: len(stub.requests) == 2)
        with pytest.raises(anthropic.APIStatusError) as refused:
            narrow.anthropic().messages.create(model=MODEL, max_tokens=5, messages=[user("Hi")], stream=True)
        gate.set()
        assert [w.result() for w in waiting] == [200, 200]
    assert refused.value.status_code in (429, 503, 529)
    assert refused.value.body["error"]["message"] and refused.value.response.headers["retry-after"]


def post(site: Site) -> int:
    body = {"model": MODEL, "max_tokens": 30, "messages": [user("Hi")]}
    return httpx.post(site.url + "/v1/messages", json=body, timeout=30).status_code


def test_case_80_a_fault_within_a_stream(site: Site) -> None:
    site.break_down()
    with pytest.raises(anthropic.APIStatusError) as broken:
        events(site)
    assert BROKEN in str(broken.value)
    raw = site.messages(stream=True).text
    assert raw.count("event: error\n") == 1 and "message_stop" not in raw
    whole = site.messages()
    assert BROKEN in whole.text and "error" in whole.json()


@pytest.mark.parametrize(
    "headers", [{"x-api-key": "k"}, {"authorization": "Bearer k"}, {"x-api-key": "k", "authorization": "Bearer l"}, {}]
)
def test_case_81_any_key_header(site: Site, headers: dict[str, str]) -> None:
    """Without configured keys none is asked for, and none disturbs."""
    site.script(SAID)
    body = {"model": MODEL, "max_tokens": 50, "messages": [user("Hi")]}
    assert httpx.post(site.url + "/anthropic/v1/messages", json=body, headers=headers).status_code == 200


def test_case_82_beta_headers(site: Site) -> None:
    site.script(SAID)
    body = {"model": MODEL, "max_tokens": 50, "messages": [user("Hi")]}
    headers = {"anthropic-beta": "claude-code-20250219,made-up-2030", "anthropic-version": "2026-10-21"}
    answer = site.raw.post("/anthropic/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200


TWO: Any = [{"name": n, "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}} for n in "fg"]


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "g"}])
def test_case_83_a_forced_call(real: Site, choice: Any, thinking: str) -> None:
    fields: Any = {"thinking": {"type": thinking, **({"budget_tokens": 50} if thinking == "enabled" else {})}}
    answer = create(real, "Hello!", tools=TWO, tool_choice=choice, extra_body={"temperature": 0}, **fields)
    assert answer.stop_reason == "tool_use"
    names = {b.name for b in answer.content if b.type == "tool_use"}
    assert names == {"g"} if choice["type"] == "tool" else names <= {"f", "g"}


def test_case_83_no_call(site: Site) -> None:
    site.script("Hm.</think>ok" + block(ROME))
    answer = create(site, tools=[T1_MESSAGES], tool_choice={"type": "none"})
    assert "## Tools" not in site.prompt_text()
    assert kinds(answer) == ["thinking", "text"] and not leaks(answer.model_dump_json())
