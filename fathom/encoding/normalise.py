"""Lenient bodies in: what clients really send, made into what the prompt library takes. Reference recipe 4, api C.4.

The library refuses much that agents send. Nothing here looks at the prompt's text; that is the library's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fathom.encoding import pairing
from fathom.errors import RequestError

Body = dict[str, Any]

MOST_TOOLS = 128

KEEP_THINKING = "keep_thinking"
"""Set in a body whose client wants the thinking of earlier turns to stay in the prompt, tools or not."""

_UNENFORCED = ("minLength", "maxLength", "minItems", "maxItems")
"""Keywords that a strict schema may not have. Reference api B.4."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_ANY_OBJECT = {"type": "object"}

_BILLING = "x-anthropic-billing-header"


def parse(raw: bytes) -> Body:
    """The JSON object of a request. Raises RequestError for anything else."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        if _SURROGATE.search(raw):
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(400, "Failed to deserialize the JSON body: half of a surrogate pair is no text") from None
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at place {error.start}"
        raise RequestError(400, f"Failed to deserialize the JSON body: it is not UTF-8 ({place})") from None
    except ValueError as error:
        raise RequestError(400, f"Failed to deserialize the JSON body: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "Failed to deserialize the JSON body: it must be an object")
    return body


def chat(body: Body, strict: bool) -> Body:
    """A Chat Completions body."""
    body = _without_nulls(body)
    refuse_unsupported(body)
    if "max_completion_tokens" in body:
        body.setdefault("max_tokens", body.pop("max_completion_tokens"))
    if "tools" in body:
        body["tools"] = [_chat_tool(tool) for tool in _tools(body)]
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
        inner = form["json_schema"]
        body["response_format"] = {**form, "json_schema": {**inner, "schema": _typed(inner.get("schema"))}}
    elif _is_untold(form, body):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _ANY_OBJECT}}
    return body


def messages(body: Body, strict: bool) -> Body:
    """A Messages body."""
    body = _without_nulls(body)
    if strict:
        _refuse_any(body)
    else:
        _thinking(body)
    if isinstance(body.get("messages"), list):
        _lead(body)
        turns = [_messages_turn(turn) for turn in _objects(body["messages"])]
        body["messages"] = turns if strict else pairing.message_turns(turns)
    if "system" in body:
        body["system"] = _without_billing(body["system"])
        if not body["system"]:
            del body["system"]
    if "tools" in body:
        body["tools"] = [_messages_tool(t) for t in _tools(body) if t.get("type") in (None, "custom")]
        if not body["tools"]:
            body.pop("tools")
            body.pop("tool_choice", None)
    return body


def responses(body: Body, strict: bool) -> Body:
    """A Responses body."""
    body = _without_nulls(body)
    if isinstance(body.get("instructions"), str):
        body["instructions"] = _without_billing(body["instructions"])
    if "tools" in body:
        body["tools"] = [_with_object(t, "parameters") if t.get("type") == "function" else t for t in _tools(body)]
    text = body.get("text")
    if isinstance(text, dict) and isinstance(text.get("format"), dict) and "schema" in text["format"]:
        body["text"] = {**text, "format": {**text["format"], "schema": _typed(text["format"]["schema"])}}
    elif not strict and isinstance(text, dict) and _is_untold(text.get("format"), body):
        body["text"] = {**text, "format": {"type": "json_schema", "name": "answer", "schema": _ANY_OBJECT}}
    if isinstance(body.get("input"), list):
        items = [_responses_item(item) for item in body["input"]]
        body["input"] = items if strict else pairing.response_items(list(_late_system_as_user(items)))
    return body


NORMALISERS: dict[str, Callable[[Body, bool], Body]] = {"chat": chat, "messages": messages, "responses": responses}


# --- shared


def text_of(content: Any) -> str:
    """Any content as text: parts are joined by blank lines, what is not text is named."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise RequestError(400, f"content must be a string or a list of parts, not {_shown(content)}", param="content")
    return "\n\n".join(_part_text(part) for part in content if part)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RequestError(400, f"a part of content must be an object, not {_shown(part)}", param="content")
    for key in ("text", "refusal", "input_text", "output_text"):
        if isinstance(part.get(key), str):
            return str(part[key])
    source = part.get("source")
    if part.get("type") == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        return text_of(source.get("data") or source.get("content"))
    if part.get("type") == "search_result":
        return text_of(part.get("content"))
    return f"[Unsupported {part.get('type', 'part')}]"


def _shown(value: Any) -> str:
    """A wrong value, as JSON and not too long."""
    return json.dumps(value)[:60]


def _identity(holder: Body, key: str) -> str:
    """The id of a call, or of the call that a result belongs to."""
    value = holder.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RequestError(400, f"{key} must be a string, not {_shown(value)}", param=key)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _without_nulls(body: Body) -> Body:
    return {key: value for key, value in body.items() if value is not None}


def refuse_unsupported(body: Body) -> None:
    """Wishes that nobody here can grant. Raises RequestError, naming the field."""
    for name in ("n", "best_of"):
        if body.get(name, 1) != 1:
            raise RequestError(
                400, f"{name}={_shown(body[name])} is not supported: ask once for each answer", param=name
            )
    if body.get("logit_bias"):
        raise RequestError(400, "logit_bias is not supported: leave it out", param="logit_bias")


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


def _tools(body: Body) -> list[Body]:
    tools = body["tools"]
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise RequestError(400, "tools must be a list of objects", param="tools")
    for holder in (*tools, body.get("tool_choice")):
        if isinstance(holder, dict) and not isinstance(holder.get("function") or {}, dict):
            raise RequestError(400, f"function must be an object, not {_shown(holder['function'])}", param="tools")
    if len(tools) > MOST_TOOLS:
        raise RequestError(400, f"{len(tools)} tools are too many: at most {MOST_TOOLS} are allowed", param="tools")
    return tools


def _chat_tool(tool: Body) -> Body:
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    function = _with_object(function, "parameters")
    if function.get("strict"):
        _check_strict(function.get("parameters"))
        function["parameters"] = _typed(function.get("parameters"))
    return {**tool, "function": function}


def _check_strict(schema: Any) -> None:
    """Refuse what a strict tool's schema may not have. Reference api B.4. Raises RequestError."""
    if isinstance(schema, dict):
        if found := next((key for key in _UNENFORCED if key in schema and not isinstance(schema[key], dict)), None):
            raise RequestError(400, f"a strict tool may not have '{found}': leave it out, or strict", param="tools")
        schema = list(schema.values())
    for inner in schema if isinstance(schema, list) else ():
        _check_strict(inner)


def _typed(schema: Any) -> Any:
    """The schema with the types that `enum` and `const` imply, which the library wants said."""
    if isinstance(schema, list):
        return [_typed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: value if key in ("enum", "const") else _typed(value) for key, value in schema.items()}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values and "type" not in schema:
        kinds = sorted({_json_type(value) for value in values})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds, **schema}
    return schema


def _is_untold(form: Any, body: Body) -> bool:
    """Whether JSON is wanted of a model that no message tells so, which the library refuses; a schema would tell it."""
    spoken = (body.get("messages"), body.get("input"), body.get("instructions"))
    return isinstance(form, dict) and form.get("type") == "json_object" and "json" not in json.dumps(spoken).lower()


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in names if isinstance(value, kind)), "object")


def _with_object(tool: Body, key: str) -> Body:
    """A tool whose schema says that arguments are an object, which many generated ones leave out."""
    tool, schema = _without_nulls(tool), tool.get(key)
    return {**tool, key: {"type": "object", **schema}} if isinstance(schema, dict) and "type" not in schema else tool


def _without_billing(text: Any) -> Any:
    """Without the header that a command-line agent puts first and changes with every call."""
    if isinstance(text, str):
        return "\n".join(line for line in text.split("\n") if not line.startswith(_BILLING))
    if isinstance(text, list):
        blocks = [b for b in text if not (isinstance(b, dict) and str(b.get("text", "")).startswith(_BILLING))]
        return [{"type": "text", "text": _part_text(b)} for b in blocks]
    return text


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
    turn, role = _without_nulls(turn), turn.get("role")
    if "reasoning" in turn and isinstance(turn["reasoning"], str):
        turn.setdefault("reasoning_content", turn.pop("reasoning"))
    turn["content"] = text_of(turn.get("content"))
    if role == "system":
        turn["content"] = _without_billing(turn["content"])
    if role == "tool":
        turn["tool_call_id"] = _identity(turn, "tool_call_id")
    calls = turn.pop("tool_calls", None)
    if calls and not isinstance(calls, list):
        raise RequestError(400, f"tool_calls must be a list, not {_shown(calls)}", param="messages")
    return {**turn, "tool_calls": [_chat_call(call) for call in calls]} if calls else turn


def _chat_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(400, f"a tool call needs its function, not {_shown(call)}", param="messages")
    _identity(call, "id")
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
    return {**call, "type": "function", "function": {**function, "arguments": text}}


# --- messages


def _refuse_any(body: Body) -> None:
    """What the library takes for `auto`: the hosted service refuses it while the model thinks."""
    choice, thinking = body.get("tool_choice"), body.get("thinking")
    off = isinstance(thinking, dict) and thinking.get("type") == "disabled"
    if isinstance(choice, dict) and choice.get("type") == "any" and not off:
        raise RequestError(400, "Thinking mode does not support this tool_choice", param="tool_choice")


def _lead(body: Body) -> None:
    """System turns in front belong to the system text; the library shows any to the model as what a user says."""
    turns = _objects(body["messages"])
    count = next((n for n, turn in enumerate(turns) if turn.get("role") != "system"), len(turns))
    if count:
        system = body.get("system") or []
        blocks = [{"type": "text", "text": system}] if isinstance(system, str) else list(system)
        body["system"] = blocks + [{"type": "text", "text": text_of(turn.get("content"))} for turn in turns[:count]]
        body["messages"] = turns[count:]


def _messages_tool(tool: Body) -> Body:
    tool = _with_object({k: v for k, v in tool.items() if k not in ("type", "cache_control")}, "input_schema")
    return {"input_schema": {"type": "object"}, **tool}


def _messages_turn(turn: Body) -> Body:
    content = turn.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(blocks, list):
        raise RequestError(400, f"content must be a string or a list of blocks, not {_shown(content)}", param="content")
    blocks = [{"type": "text", "text": b} if isinstance(b, str) else b for b in blocks]
    if wrong := [b for b in blocks if not isinstance(b, dict)]:
        raise RequestError(400, f"a block of content must be an object, not {_shown(wrong[0])}", param="content")
    kept = [_block(b) for b in blocks if b.get("type") != "redacted_thinking"]
    kept = [b for b in kept if b.get("type") != "text" or b["text"]] or [{"type": "text", "text": ""}]
    return {"role": turn.get("role"), "content": kept}


def _block(block: Body) -> Body:
    kind = block.get("type")
    if kind == "thinking":
        return {"type": "thinking", "thinking": text_of(block.get("thinking")), "signature": ""}
    if kind == "tool_use":
        _identity(block, "id")
        return {k: block[k] for k in ("type", "id", "name", "input") if k in block}
    if kind == "tool_result":
        return {"type": kind, "tool_use_id": _identity(block, "tool_use_id"), "content": text_of(block.get("content"))}
    return {"type": "text", "text": _part_text(block)}


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
        _identity(item, "call_id")
    if item.get("type", "message") == "message" and isinstance(item.get("content"), list):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        return {**item, "content": [{"type": kind, "text": _part_text(part)} for part in item["content"]]}
    if pairing.is_output(item):
        return {**item, "output": text_of(item.get("output"))}
    return item
