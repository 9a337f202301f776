"""Valid bodies of every protocol with one or two values replaced: answered or refused, never a fault."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.harness import MODEL, T1, T1_MESSAGES, T1_RESPONSES, Site, result, said, user

_CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", 1]}, "b": {"anyOf": [{"type": "null"}]}}}

BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be kind."},
            user([{"type": "text", "text": "Weather?"}, {"type": "image_url", "image_url": {"url": "data:"}}]),
            said("One moment.", reasoning_content="Look it up.", tool_calls=[_CALL]),
            result("c1", "18C"),
            user("So?"),
        ],
        "tools": [T1],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "thinking": {"type": "enabled"},
        "reasoning_effort": "high",
        "stop": ["a", "b"],
        "max_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
        "chat_template_kwargs": {"thinking": True, "drop_thinking": False},
        "user_id": "u",
    },
    "/anthropic/v1/messages": {
        "model": MODEL,
        "max_tokens": 20,
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            user([{"type": "text", "text": "Weather?"}, {"type": "document", "source": {"type": "text", "data": "x"}}]),
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Look it up.", "signature": "s"},
                    {"type": "text", "text": "One moment."},
                    {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Paris"}},
                ],
            },
            user([{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "18C"}]}]),
        ],
        "tools": [T1_MESSAGES],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        "thinking": {"type": "enabled", "budget_tokens": 100},
        "output_config": {"effort": "high"},
        "stop_sequences": ["x"],
        "metadata": {"user_id": "u"},
    },
    "/responses": {
        "model": MODEL,
        "instructions": "Be kind.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Look"}]},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "18C"},
        ],
        "tools": [T1_RESPONSES, {"type": "custom", "name": "apply_patch"}],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}},
        "max_output_tokens": 20,
        "include": ["reasoning.encrypted_content"],
    },
    "/completions": {"model": MODEL, "prompt": "a", "suffix": "b", "max_tokens": 5, "stop": ["x"], "echo": True},
}

OTHERS: list[Any] = [
    None, True, False, 0, -1, 7, 1.5, 2**70, 1e300, "", "x", "\x00", "\ud800", "｜DSML｜", "a" * 3000,
    [], [None], [[]], ["x"], [7], {}, {"type": None}, {"type": "text"}, {"type": "x", "x": {}}, [{}], {"$ref": "#"},
]  # fmt: skip


COUNT = int(os.environ.get("FATHOM_FUZZ_BODIES", "100"))
"""Bodies of each protocol; more of them by hand."""


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*above, key)
        yield from places(item, (*above, key))


def mutated(body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A copy in which one or two values are something else, or gone."""
    body = copy.deepcopy(body)
    for _ in range(draw.choice((1, 1, 2))):
        *way, last = draw.choice(list(places(body)))
        holder: Any = body
        for key in way:
            holder = holder[key]
        if draw.random() < 0.15:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(draw.choice(OTHERS))
    return body


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_a_fault(site: Site, path: str) -> None:
    draw = random.Random(path)
    site.script("Let me see.</think>It is four.")
    for _ in range(COUNT):
        body = mutated(BODIES[path], draw) | ({"stream": True} if draw.random() < 0.2 else {})
        answer = site.raw.post(path, content=json.dumps(body))
        assert answer.status_code in (200, 400, 422), (answer.status_code, json.dumps(body))
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
    status = site.relay.inner.status()
    assert status.running == status.waiting == 0
