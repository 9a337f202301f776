"""Lenient bodies in: what clients really send, made into what the prompt library takes. Reference recipe 4, api C.4.

The library refuses much that agents send. Nothing here looks at the prompt's text; that is the library's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fathom.encoding import pairing
from fathom.encoding.body import Body, identity, refuse_unsupported, shown, without_nulls
from fathom.encoding.content import part_text, text_of, without_billing
from fathom.encoding.tools import chat_tool, closed, function_of, messages_tool, strict_names, tools_of, typed
from fathom.errors import RequestError

KEEP_THINKING = "keep_thinking"
"""Set in a body whose client wants the thinking of earlier turns to stay in the prompt, tools or not."""

STRICT_TOOLS = "strict_tools"
"""Set in a body: the names of the tools whose arguments must fit their schema."""

_ANY_OBJECT = {"type": "object"}


def chat(body: Body, strict: bool) -> Body:
    """A Chat Completions body."""
    body = without_nulls(body)
    refuse_unsupported(body)
    if "max_completion_tokens" in body:
        body.setdefault("max_tokens", body.pop("max_completion_tokens"))
    if "tools" in body:
        body[STRICT_TOOLS] = strict_names(tools_of(body))
        body["tools"] = [chat_tool(tool, strict) for tool in body["tools"]]
    if isinstance(body.get("messages"), list):
        body["messages"] = _chat_turns(body["messages"], strict)
    form = body.get("response_format")
    if strict:
        if isinstance(form, dict) and form.get("type") == "json_schema":
            raise RequestError(400, "This response_format type is unavailable now", param="response_format")
        return body
    _template_options(body)
    _thinking(body)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    if isinstance(form, dict) and isinstance(form.get("json_schema"), dict):
        body["response_format"] = {**form, "json_schema": _enforced(form["json_schema"])}
    elif _is_untold(form, body):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _ANY_OBJECT}}
    return body


def messages(body: Body, strict: bool) -> Body:
    """A Messages body."""
    body = without_nulls(body)
    if strict:
        _refuse_any(body)
    else:
        _thinking(body)
    if isinstance(body.get("messages"), list):
        _lead(body)
        turns = [_messages_turn(turn) for turn in _objects(body["messages"])]
        body["messages"] = turns if strict else pairing.message_turns(turns)
    if "system" in body:
        body["system"] = without_billing(body["system"])
        if not body["system"]:
            del body["system"]
    if "tools" in body:
        body[STRICT_TOOLS] = strict_names(tools_of(body))
        body["tools"] = [messages_tool(t) for t in body["tools"] if t.get("type") in (None, "custom")]
        if not body["tools"]:
            body.pop("tools")
            body.pop("tool_choice", None)
    return body


def responses(body: Body, strict: bool) -> Body:
    """A Responses body."""
    body = without_nulls(body)
    if isinstance(body.get("instructions"), str):
        body["instructions"] = without_billing(body["instructions"])
    if "tools" in body:
        body[STRICT_TOOLS] = strict_names(tools_of(body))
        body["tools"] = [function_of(t, strict) if t.get("type") == "function" else t for t in body["tools"]]
    text = body.get("text")
    if isinstance(text, dict) and isinstance(text.get("format"), dict) and "schema" in text["format"]:
        body["text"] = {**text, "format": text["format"] if strict else _enforced(text["format"])}
    elif not strict and isinstance(text, dict) and _is_untold(text.get("format"), body):
        body["text"] = {**text, "format": {"type": "json_schema", "name": "answer", "schema": _ANY_OBJECT}}
    if isinstance(body.get("input"), list):
        items = [_responses_item(item) for item in body["input"]]
        body["input"] = items if strict else pairing.response_items(list(_late_system_as_user(items)))
    return body


NORMALISERS: dict[str, Callable[[Body, bool], Body]] = {"chat": chat, "messages": messages, "responses": responses}


# --- options


def _template_options(body: Body) -> None:
    """What users of other engines write: `chat_template_kwargs`, `enable_thinking`."""
    options = body.pop("chat_template_kwargs", None)
    options = dict(options) if isinstance(options, dict) else {}
    if "enable_thinking" in body:
        options.setdefault("enable_thinking", body.pop("enable_thinking"))
    switch = options.get("thinking", options.get("enable_thinking"))
    if isinstance(switch, bool):
        body.setdefault("thinking", {"type": "enabled" if switch else "disabled"})
    if isinstance(options.get("reasoning_effort"), str):
        body.setdefault("reasoning_effort", options["reasoning_effort"])
    if options.get("drop_thinking") is False:
        body[KEEP_THINKING] = True


def _thinking(body: Body) -> None:
    """Any way to switch thinking on counts as such."""
    given = body.get("thinking")
    if given is None:
        return
    if not isinstance(given, dict | bool):
        raise RequestError(400, 'thinking must be {"type": "enabled"} or {"type": "disabled"}', param="thinking")
    off = given is False or (isinstance(given, dict) and given.get("type") in ("disabled", "none"))
    body["thinking"] = {"type": "disabled" if off else "enabled"}


def _refuse_any(body: Body) -> None:
    """What the library takes for `auto`: the hosted service refuses it while the model thinks."""
    choice, thinking = body.get("tool_choice"), body.get("thinking")
    off = isinstance(thinking, dict) and thinking.get("type") == "disabled"
    if isinstance(choice, dict) and choice.get("type") == "any" and not off:
        raise RequestError(400, "Thinking mode does not support this tool_choice", param="tool_choice")


def _enforced(form: Body) -> Body:
    """A format whose schema is enforced as it is meant; what the library calls strict knows less than schemas have."""
    make = closed if form.get("strict") else typed
    return {**form, "schema": make(form.get("schema")), "strict": False}


def _is_untold(form: Any, body: Body) -> bool:
    """Whether JSON is wanted of a model that no message tells so, which the library refuses; a schema would tell it."""
    spoken = (body.get("messages"), body.get("input"), body.get("instructions"))
    return isinstance(form, dict) and form.get("type") == "json_object" and "json" not in json.dumps(spoken).lower()


# --- chat


def _objects(turns: Sequence[Any]) -> Sequence[Body]:
    if any(not isinstance(turn, dict) for turn in turns):
        raise RequestError(400, "messages must be a list of objects", param="messages")
    return turns


def _chat_turns(given: Sequence[Any], strict: bool) -> list[Body]:
    turns = _objects(given)
    if strict:
        return [_chat_message(turn) for turn in turns]
    return pairing.chat_turns([_chat_message(turn) for turn in _placed(turns)])


def _placed(turns: Sequence[Body]) -> Iterable[Body]:
    """Instructions in front are the system's; later ones are what a user says, so that the prefix stays."""
    leading = True
    for turn in turns:
        role = turn.get("role")
        if role in ("system", "developer"):
            yield {**turn, "role": "system" if leading else "user"}
        else:
            leading = False
            yield turn


def _chat_message(turn: Body) -> Body:
    turn, role = without_nulls(turn), turn.get("role")
    if "reasoning" in turn and isinstance(turn["reasoning"], str):
        turn.setdefault("reasoning_content", turn.pop("reasoning"))
    turn["content"] = text_of(turn.get("content"))
    if role == "system":
        turn["content"] = without_billing(turn["content"])
    if role == "tool":
        turn["tool_call_id"] = identity(turn, "tool_call_id")
    calls = turn.pop("tool_calls", None)
    if role != "assistant":
        return turn
    if calls and not isinstance(calls, list):
        raise RequestError(400, f"tool_calls must be a list, not {shown(calls)}", param="messages")
    return {**turn, "tool_calls": [_chat_call(call) for call in calls]} if calls else turn


def _chat_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(400, f"a tool call needs its function, not {shown(call)}", param="messages")
    identity(call, "id")
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
    return {**call, "type": "function", "function": {**function, "arguments": text}}


# --- messages


def _lead(body: Body) -> None:
    """System turns in front belong to the system text; the library shows any to the model as what a user says."""
    turns = _objects(body["messages"])
    count = next((n for n, turn in enumerate(turns) if turn.get("role") != "system"), len(turns))
    if count:
        system = body.get("system") or []
        blocks = [{"type": "text", "text": system}] if isinstance(system, str) else list(system)
        body["system"] = blocks + [{"type": "text", "text": text_of(turn.get("content"))} for turn in turns[:count]]
        body["messages"] = turns[count:]


def _messages_turn(turn: Body) -> Body:
    content = turn.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(blocks, list):
        raise RequestError(400, f"content must be a string or a list of blocks, not {shown(content)}", param="content")
    blocks = [{"type": "text", "text": b} if isinstance(b, str) else b for b in blocks]
    if wrong := [b for b in blocks if not isinstance(b, dict)]:
        raise RequestError(400, f"a block of content must be an object, not {shown(wrong[0])}", param="content")
    kept = [_block(b) for b in blocks if b.get("type") != "redacted_thinking"]
    kept = [b for b in kept if b.get("type") != "text" or b["text"]] or [{"type": "text", "text": ""}]
    return {"role": turn.get("role"), "content": kept}


def _block(block: Body) -> Body:
    kind = block.get("type")
    if kind == "thinking":
        return {"type": "thinking", "thinking": text_of(block.get("thinking")), "signature": ""}
    if kind == "tool_use":
        identity(block, "id")
        return {k: block[k] for k in ("type", "id", "name", "input") if k in block}
    if kind == "tool_result":
        return {"type": kind, "tool_use_id": identity(block, "tool_use_id"), "content": text_of(block.get("content"))}
    return {"type": "text", "text": part_text(block)}


# --- responses


def _late_system_as_user(items: Sequence[Any]) -> Iterable[Any]:
    """The library moves system messages to the front, where a late one would change the whole prompt."""
    leading = True
    for item in items:
        if isinstance(item, dict) and item.get("role") == "system":
            yield item if leading else {**item, "role": "user"}
        else:
            leading = False
            yield item


def _responses_item(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    if pairing.is_call(item) or pairing.is_output(item):
        identity(item, "call_id")
    if item.get("type", "message") == "message" and isinstance(item.get("content"), list):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        return {**item, "content": [{"type": kind, "text": part_text(part)} for part in item["content"]]}
    if pairing.is_output(item):
        return {**item, "output": text_of(item.get("output"))}
    return item
