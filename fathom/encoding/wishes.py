"""What bodies ask of us and not of the prompt library: read off them before it sees them. Reference recipe 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fathom.encoding.body import shown
from fathom.encoding.tools import closed
from fathom.errors import RequestError


def take_choice(body: dict[str, Any], protocol: str) -> tuple[str, ...] | None:
    """A forced choice of tool, taken out of the body: names of which one must be called, none for any; None if free.

    The library refuses some choices and ignores others; the answer's guide enforces all of them.
    """
    choice = _among_allowed(body)
    if not body.get("tools"):
        body.pop("tool_choice", None)
        return None
    kind = choice.get("type") if isinstance(choice, dict) else choice
    forced: tuple[str, ...] | None = None
    if kind in ("required", "any"):
        forced = ()
    elif isinstance(choice, dict) and kind in ("function", "tool", "custom"):
        forced = (_tool_name(choice),)
        if forced[0] not in {_tool_name(tool) for tool in body["tools"]}:
            wrong = f"tool_choice names '{forced[0]}', which is no tool of this request"
            raise RequestError(400, wrong, param="tool_choice")
    if forced is not None:
        body["tool_choice"] = {"type": "auto"} if protocol == "messages" else "auto"
    return forced


def _among_allowed(body: dict[str, Any]) -> Any:
    """The choice; one of `allowed_tools` takes the other tools out of the body."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return choice
    inner = choice.get("allowed_tools")
    allowed: dict[str, Any] = inner if isinstance(inner, dict) else choice
    names = {_tool_name(tool) for tool in allowed.get("tools") or ()}
    body["tools"] = [tool for tool in body.get("tools") or () if _tool_name(tool) in names]
    body["tool_choice"] = allowed.get("mode", "auto")
    return body["tool_choice"]


def _tool_name(tool: Any) -> str:
    tool = tool if isinstance(tool, dict) else {}
    return str(tool.get("name") or (tool.get("function") or {}).get("name") or "")


def top_k(body: Mapping[str, Any]) -> int | None:
    """Clients of other engines write 0 or -1 for "all"."""
    given = body.get("top_k")
    return None if given in (0, -1) else given


def budget(body: Mapping[str, Any]) -> int | None:
    """How many tokens the thinking may take; None for any number, which some clients write as 0 or -1."""
    thinking = body.get("thinking")
    found = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    if found is None:
        return None
    if not isinstance(found, int) or isinstance(found, bool):
        wrong = f"thinking.budget_tokens must be a whole number, not {shown(found)}"
        raise RequestError(400, wrong, param="thinking")
    return found if found > 0 else None


def json_format(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema that the answer of a Messages body must fit, which the library leaves aside; None for any text."""
    options = body.get("output_config")
    form = options.get("format") if isinstance(options, dict) else None
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        wanted = '{"type": "json_schema", "schema": {...}}'
        raise RequestError(400, f"output_config.format must be {wanted}, not {shown(form)}", param="output_config")
    return dict(closed(form["schema"]))


def take_task(body: dict[str, Any]) -> str | None:
    """The quick instruction on the last message, taken off; an answer that carries one is not continued."""
    turns = body.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else {}
    task = last.pop("task", None) if isinstance(last, dict) else None
    return task if isinstance(task, str) else None


def user(body: Mapping[str, Any], protocol: str, isolate_messages: bool) -> str:
    """The client's user, whose prefixes are not shared with others; Messages has one only if they are isolated."""
    if protocol == "messages":
        metadata = body.get("metadata")
        return str(metadata.get("user_id") or "") if isolate_messages and isinstance(metadata, dict) else ""
    return str(body.get("user_id") or body.get("user") or "")
