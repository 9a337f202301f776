"""Tools and their schemas, as the prompt library takes them. Reference api B.3, B.4; recipe 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fathom.encoding.body import Body, shown, without_nulls
from fathom.errors import RequestError

MOST_TOOLS = 128

_UNENFORCED = ("minLength", "maxLength", "minItems", "maxItems")
"""Keywords that a strict schema may not have. Reference api B.4."""

_MAPS = ("properties", "patternProperties", "$defs", "$def", "definitions")
"""Keywords whose values are schemas by name."""

_VALUES = ("enum", "const", "default", "examples")
"""Keywords whose values are no schemas."""


def tools_of(body: Body) -> list[Body]:
    """The tools of a body, objects. Raises RequestError."""
    tools = body["tools"]
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise RequestError(400, "tools must be a list of objects", param="tools")
    for holder in (*tools, body.get("tool_choice")):
        if isinstance(holder, dict) and not isinstance(holder.get("function") or {}, dict):
            raise RequestError(400, f"function must be an object, not {shown(holder['function'])}", param="tools")
    if len(tools) > MOST_TOOLS:
        raise RequestError(400, f"{len(tools)} tools are too many: at most {MOST_TOOLS} are allowed", param="tools")
    return tools


def chat_tool(tool: Body, hosted: bool) -> Body:
    """A tool of Chat Completions; hosted: the library is to judge a strict one as the hosted service does."""
    function = tool.get("function")
    return {**tool, "function": function_of(function, hosted)} if isinstance(function, dict) else tool


def function_of(holder: Body, hosted: bool) -> Body:
    """A function, its arguments an object. A strict one's schema is closed and no longer called strict.

    The library would refuse or drop much of a strict schema: references in choices, `$defs`, `const`.
    """
    holder = with_object(holder, "parameters")
    if not holder.get("strict"):
        return holder
    _walked(schema := holder.get("parameters"), _checked)
    if hosted:
        return holder | {"parameters": typed(schema)}
    return holder | {"parameters": closed(schema), "strict": False}


def strict_names(tools: Sequence[Body]) -> list[str]:
    """The tools whose arguments must fit their schema."""
    holders = [tool.get("function") or tool for tool in tools]
    return [str(h.get("name")) for h in holders if isinstance(h, dict) and h.get("strict")]


def messages_tool(tool: Body) -> Body:
    """A tool of Messages."""
    tool = with_object({k: v for k, v in tool.items() if k not in ("type", "cache_control")}, "input_schema")
    return {"input_schema": {"type": "object"}, **tool}


def with_object(tool: Body, key: str) -> Body:
    """A tool whose schema says that arguments are an object, which many generated ones leave out."""
    tool, schema = without_nulls(tool), tool.get(key)
    return {**tool, key: {"type": "object", **schema}} if isinstance(schema, dict) and "type" not in schema else tool


def typed(schema: Any) -> Any:
    """The schema with the types that `enum` and `const` imply, which the library wants said."""
    return _walked(schema, _with_type)


def closed(schema: Any) -> Any:
    """The schema as a strict one is meant: objects have the properties that are named, and all of them."""
    return _walked(schema, lambda inner: _closed_object(_with_type(inner)))


def _walked(schema: Any, change: Callable[[Body], Body]) -> Any:
    """`change` done to a schema and everything in it that is one, the innermost first."""
    if isinstance(schema, list):
        return [_walked(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: Body = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            made[key] = {name: _walked(inner, change) for name, inner in value.items()}
        else:
            made[key] = value if key in _VALUES else _walked(value, change)
    return change(made)


def _with_type(schema: Body) -> Body:
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not isinstance(values, list) or not values or "type" in schema:
        return schema
    kinds = sorted({_json_type(value) for value in values})
    return {"type": kinds[0] if len(kinds) == 1 else kinds, **schema}


def _closed_object(schema: Body) -> Body:
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return schema
    meant = {"required": list(properties), "additionalProperties": False}
    return schema | {key: value for key, value in meant.items() if key not in schema}


def _checked(schema: Body) -> Body:
    """Refuse what a strict tool's schema may not have. Raises RequestError."""
    if found := next((key for key in _UNENFORCED if key in schema), None):
        raise RequestError(400, f"a strict tool may not have '{found}': leave it out, or strict", param="tools")
    return schema


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in names if isinstance(value, kind)), "object")
