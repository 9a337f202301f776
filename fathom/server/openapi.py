"""What the bodies of requests look like, for the description at `/openapi.json`. Reference api B.3, B.4, B.9, B.10.

It describes; what is accepted is decided where a body is read, which is more lenient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_ANY_OBJECT: Schema = {"type": "object"}
_EFFORT: Schema = {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]}
_COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": 393_216}
_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}


def bodies(served: Sequence[str]) -> dict[str, Schema]:
    """protocol -> the `requestBody` of its endpoint; `served`: the names of models."""
    model: Schema = {"enum": list(served)}
    claude: Schema = {"anyOf": [model, {"type": "string", "pattern": "^claude-[a-z0-9-]{1,40}$"}]}
    return {
        "chat": _body(_CHAT, model=model, messages=_list(_CHAT_MESSAGE)),
        "completions": _body(_COMPLETIONS, model=model, prompt=_TEXT),
        "responses": _body(_RESPONSES, model=model, input={"anyOf": [_TEXT, _list(_ITEM)]}),
        "messages": _body(_MESSAGES, model=claude, max_tokens=_COUNT, messages=_list(_TURN)),
        "count_tokens": _body(_MESSAGES, model=claude, messages=_list(_TURN)),
    }


def _body(optional: Schema, **required: Schema) -> Schema:
    schema = _object(list(required), **required, **optional)
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _object(required: Sequence[str] = (), **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    return schema | ({"required": list(required)} if required else {})


def _list(items: Schema, least: int = 1, most: int | None = None) -> Schema:
    schema: Schema = {"type": "array", "items": items, "minItems": least}
    return schema | ({"maxItems": most} if most else {})


def _kind(kind: str, **properties: Schema) -> Schema:
    """An object told from others by its `type`, all of whose properties are needed."""
    return _object(["type", *properties], type={"enum": [kind]}, **properties)


def _turn(role: str, content: Schema, **optional: Schema) -> Schema:
    return _object(["role", "content"], role={"enum": [role]}, content=content, **optional)


_WORD: Schema = {"type": "string", "minLength": 1}
_STOP: Schema = {"anyOf": [_WORD, _list(_WORD, most=16)]}
_SAMPLING: Schema = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 1e-6, "maximum": 1},
    "stream": _FLAG,
}
_TOP_LOGPROBS: Schema = {"type": "integer", "minimum": 0, "maximum": 20}
_SEED: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}


def _format(**named: Schema) -> Schema:
    """A wished form of an answer; `named`: where the protocol puts a schema."""
    return {"anyOf": [_kind("text"), _kind("json_object"), _kind("json_schema", **named)]}


_PARTS: Schema = {"anyOf": [_TEXT, _list(_kind("text", text=_TEXT))]}
_FUNCTION = _object(["name"], name=_NAME, description=_TEXT, parameters=_ANY_OBJECT, strict=_FLAG)
_CALL = _object(
    ["id", "type", "function"],
    id=_TEXT,
    type={"enum": ["function"]},
    function=_object(["name", "arguments"], name=_NAME, arguments=_TEXT),
)
_CHAT_MESSAGE: Schema = {
    "anyOf": [
        _turn("system", _PARTS),
        _turn("user", _PARTS),
        _turn("assistant", _PARTS, reasoning_content=_TEXT, tool_calls=_list(_CALL)),
        _turn("tool", _PARTS, tool_call_id=_TEXT),
    ]
}
_CHAT: Schema = {
    **_SAMPLING,
    "thinking": _object(["type"], type={"enum": ["enabled", "disabled"]}),
    "reasoning_effort": _EFFORT,
    "max_tokens": _COUNT,
    "stop": _STOP,
    "stream_options": _object(include_usage=_FLAG),
    "response_format": _format(json_schema=_object(["name", "schema"], name=_NAME, schema=_ANY_OBJECT)),
    "tools": _list(_kind("function", function=_FUNCTION), most=128),
    "tool_choice": {"enum": ["none", "auto", "required"]},
    "logprobs": _FLAG,
    "top_logprobs": _TOP_LOGPROBS,
    "seed": _SEED,
    "user_id": {"type": "string", "maxLength": 512},
}

_COMPLETIONS: Schema = {
    **_SAMPLING,
    "suffix": _TEXT,
    "max_tokens": _COUNT,
    "stop": _STOP,
    "echo": _FLAG,
    "logprobs": _TOP_LOGPROBS,
    "seed": _SEED,
}

_TEXT_BLOCK, _THOUGHT = _kind("text", text=_TEXT), _kind("thinking", thinking=_TEXT, signature=_TEXT)
_USE = _kind("tool_use", id=_TEXT, name=_NAME, input=_ANY_OBJECT)
_RESULT = _kind("tool_result", tool_use_id=_TEXT, content=_PARTS)
_TURN: Schema = {
    "anyOf": [
        _turn("user", {"anyOf": [_TEXT, _list({"anyOf": [_TEXT_BLOCK, _RESULT]})]}),
        _turn("assistant", {"anyOf": [_TEXT, _list({"anyOf": [_THOUGHT, _TEXT_BLOCK, _USE]})]}),
    ]
}
_MESSAGES_TOOL = _object(["name", "input_schema"], name=_NAME, description=_TEXT, input_schema=_ANY_OBJECT)
_MESSAGES: Schema = {
    **_SAMPLING,
    "system": _PARTS,
    "thinking": _object(["type"], type={"enum": ["enabled", "adaptive", "disabled"]}, budget_tokens=_COUNT),
    "output_config": _object(effort=_EFFORT, format=_kind("json_schema", schema=_ANY_OBJECT)),
    "stop_sequences": _list(_WORD, most=16),
    "tools": _list(_MESSAGES_TOOL, most=128),
    "tool_choice": _object(["type"], type={"enum": ["auto", "any", "none"]}),
    "metadata": _object(user_id=_TEXT),
}

_ITEM: Schema = {
    "anyOf": [
        _turn("user", _TEXT),
        _turn("assistant", _TEXT),
        _turn("system", _TEXT),
        _kind("reasoning", content=_list(_kind("reasoning_text", text=_TEXT))),
        _kind("function_call", call_id=_TEXT, name=_NAME, arguments=_TEXT),
        _kind("function_call_output", call_id=_TEXT, output=_TEXT),
    ]
}
_RESPONSES: Schema = {
    **_SAMPLING,
    "instructions": _TEXT,
    "max_output_tokens": _COUNT,
    "reasoning": _object(effort=_EFFORT),
    "text": _object(format=_format(name=_NAME, schema=_ANY_OBJECT)),
    "top_logprobs": _TOP_LOGPROBS,
    "tools": _list(_kind("function", name=_NAME) | {"additionalProperties": True}, most=128),
    "tool_choice": {"enum": ["none", "auto", "required"]},
}
