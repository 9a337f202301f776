"""Bodies that no sensible client sends: one clear refusal each, and the server goes on."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import pytest

from tests.server.harness import MODEL, OFF, T1, T1_MESSAGES, T1_RESPONSES, Site, function, user

SAID = "Let me see.</think>It is four."


def served(site: Site) -> bool:
    """Whether a plain request is answered."""
    return bool(site.chat(**OFF).json()["choices"][0]["message"]["content"])


def body(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [user(text)]} | fields


WRONG: list[dict[str, Any]] = [
    {"messages": "Hi"},
    {"messages": {"role": "user"}},
    {"messages": [None]},
    {"messages": ["Hi"]},
    {"messages": [{"role": "king", "content": "Hi"}]},
    {"messages": [{"content": "Hi"}]},
    {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": [7]}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": "f"}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]}, user("Hi")]},
    {"model": 7},
    {"model": None},
    {"temperature": "hot"},
    {"temperature": 3},
    {"temperature": -1},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_k": 5.5},
    {"thinking": {"type": "enabled", "budget_tokens": "x"}},
    {"seed": "x"},
    {"seed": 2**70},
    {"stop": 7},
    {"stop": [7]},
    {"stop": ["x"] * 17},
    {"stream": "yes"},
    {"n": 2},
    {"logit_bias": {"5": 1}},
    {"top_logprobs": 21, "logprobs": True},
    {"tools": "f"},
    {"tools": [7]},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
    {"tools": [T1, T1]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 7}}}]},
    {"tools": [T1], "tool_choice": "sometimes"},
    {"tools": [T1], "tool_choice": {"type": "function", "function": {"name": "unknown"}}},
    {"response_format": {"type": "poem"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": False}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}, "tools": [T1]},
    {"thinking": "yes"},
]
"""Fields of a chat completion that no sensible client sends."""


@pytest.mark.parametrize("fields", WRONG, ids=lambda f: json.dumps(f)[:60])
def test_wrong_fields_are_named(site: Site, fields: dict[str, Any]) -> None:
    site.script(SAID)
    answer = site.raw.post("/chat/completions", json=body() | fields)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["message"]
    assert served(site)


WRONG_MESSAGES: list[dict[str, Any]] = [
    {"messages": "Hi"},
    {"messages": [{"role": "user", "content": 7}]},
    {"system": 7},
    {"tools": [{"name": 7}]},
    {"tools": [T1_MESSAGES | {"input_schema": {"type": "object", "properties": 7}}]},
    {"stop_sequences": "X"},
    {"max_tokens": "x"},
    {"max_tokens": 0},
    {"tools": [T1_MESSAGES], "tool_choice": {"type": "tool"}},
    {"tools": [T1_MESSAGES], "tool_choice": {"type": "tool", "name": "unknown"}},
]


@pytest.mark.parametrize("fields", WRONG_MESSAGES, ids=lambda f: json.dumps(f)[:60])
def test_wrong_fields_of_messages(site: Site, fields: dict[str, Any]) -> None:
    site.script(SAID)
    answer = site.messages(**fields)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["type"] == "error" and answer.json()["error"]["message"]


WRONG_RESPONSES: list[dict[str, Any]] = [
    {"input": 7},
    {"input": None},
    {"input": [7]},
    {"input": [{"type": "message", "role": "user", "content": 7}]},
    {"tools": [T1_RESPONSES | {"name": 7}]},
    {"max_output_tokens": -1},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": 7}}},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": False}}},
    {"reasoning": 7},
]


@pytest.mark.parametrize("fields", WRONG_RESPONSES, ids=lambda f: json.dumps(f)[:60])
def test_wrong_fields_of_responses(site: Site, fields: dict[str, Any]) -> None:
    site.script(SAID)
    answer = site.responses(**fields)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["chat", "messages", "responses"])
def test_too_many_tools_in_every_dialect(site: Site, kind: str) -> None:
    names = [f"f{n}" for n in range(129)]
    answer = {
        "chat": lambda: site.chat(tools=[function(n) for n in names]),
        "messages": lambda: site.messages(tools=[T1_MESSAGES | {"name": n} for n in names]),
        "responses": lambda: site.responses(tools=[T1_RESPONSES | {"name": n} for n in names]),
    }[kind]()
    assert answer.status_code == 400
    assert "128" in answer.json()["error"]["message"]


HOSTILE = [
    b'{"model":"deepseek-v4-flash","messages":[{"role":"user","content":"\xff\xfe"}]}',
    b'{"model":"deepseek-v4-flash","messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"model":"deepseek-v4-flash","seed":' + b"9" * 5000 + b',"messages":[{"role":"user","content":"x"}]}',
    b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"model":"deepseek-v4-flash","temperature":1e999,"messages":[{"role":"user","content":"x"}]}',
    b'{"model":"deepseek-v4-flash","temperature":NaN,"messages":[{"role":"user","content":"x"}]}',
]


@pytest.mark.parametrize("content", HOSTILE, ids=["utf8", "surrogate", "integer", "nested", "infinite", "nan"])
@pytest.mark.parametrize("path", ["/chat/completions", "/anthropic/v1/messages", "/responses", "/completions"])
def test_hostile_bodies(site: Site, path: str, content: bytes) -> None:
    site.script(SAID)
    answer = site.raw.post(path, content=content)
    assert answer.status_code in (400, 422), answer.text
    assert "error" in answer.json()
    assert served(site)


def test_a_body_over_the_limit(small_bodies: Site) -> None:
    """With a stated length and without: refused before it is read to its end."""
    small_bodies.script(SAID)
    big = json.dumps(body("x" * 200_000)).encode()
    assert small_bodies.raw.post("/chat/completions", content=big).status_code == 413
    pieces = (big[n : n + 1000] for n in range(0, len(big), 1000))
    # The server may hang up while the client still writes.
    with contextlib.suppress(httpx.TransportError):
        assert small_bodies.raw.post("/chat/completions", content=pieces).status_code == 413
    assert served(small_bodies)


def test_other_methods_and_paths(site: Site) -> None:
    for answer in (site.raw.get("/chat/completions"), site.raw.post("/models"), site.raw.get("/no/such/path")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"]
