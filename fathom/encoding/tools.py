"""Tools and their schemas, as the prompt library takes them. Reference api B.3, B.4; recipe 4."""

from __future__ import annotations

from typing import Any

from fathom.encoding.body import Body, shown, without_nulls
from fathom.errors import RequestError

MOST_TOOLS = 128

_UNENFORCED = ("minLength", "maxLength", "minItems", "maxItems")
"""Keywords that a strict schema may not have. Reference api B.4."""


def tools_of(body: Body) -> list[Body]:
    tools = body["tools"]
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise RequestError(400, "tools must be a list of objects", param="tools")
    for holder in (*tools, body.get("tool_choice")):
        if isinstance(holder, dict) and not isinstance(holder.get("function") or {}, dict):
            raise RequestError(400, f"function must be an object, not {shown(holder['function'])}", param="tools")
    if len(tools) > MOST_TOOLS:
        raise RequestError(400, f"{len(tools)} tools are too many: at most {MOST_TOOLS} are allowed", param="tools")
    return tools


def chat_tool(tool: Body) -> Body:
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    function = with_object(function, "parameters")
    if function.get("strict"):
        _check_strict(function.get("parameters"))
        function["parameters"] = typed(function.get("parameters"))
    return {**tool, "function": function}


def messages_tool(tool: Body) -> Body:
    tool = with_object({k: v for k, v in tool.items() if k not in ("type", "cache_control")}, "input_schema")
    return {"input_schema": {"type": "object"}, **tool}


def with_object(tool: Body, key: str) -> Body:
    """A tool whose schema says that arguments are an object, which many generated ones leave out."""
    tool, schema = without_nulls(tool), tool.get(key)
    return {**tool, key: {"type": "object", **schema}} if isinstance(schema, dict) and "type" not in schema else tool


def typed(schema: Any) -> Any:
    """The schema with the types that `enum` and `const` imply, which the library wants said."""
    if isinstance(schema, list):
        return [typed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: value if key in ("enum", "const") else typed(value) for key, value in schema.items()}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values and "type" not in schema:
        kinds = sorted({_json_type(value) for value in values})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds, **schema}
    return schema


def _check_strict(schema: Any) -> None:
    """Refuse what a strict tool's schema may not have. Reference api B.4. Raises RequestError."""
    if isinstance(schema, dict):
        if found := next((key for key in _UNENFORCED if key in schema and not isinstance(schema[key], dict)), None):
            raise RequestError(400, f"a strict tool may not have '{found}': leave it out, or strict", param="tools")
        schema = list(schema.values())
    for inner in schema if isinstance(schema, list) else ():
        _check_strict(inner)


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in names if isinstance(value, kind)), "object")
