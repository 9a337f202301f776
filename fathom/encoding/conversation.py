"""Messages as on the wire, made into the prompt library's own. Reference api A.2, A.3, A.6; recipe 3.

The library's message classes check nothing, so what a conversation may hold is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fathom.api import Message, Tool
from fathom.encoding.dialect import Dialect
from fathom.errors import PromptError

if TYPE_CHECKING:
    import deepseek_recipe

FIELDS = {
    "system": {"content"},
    "developer": {"content"},
    "user": {"content"},
    "latest_reminder": {"content"},
    "assistant": {"content", "reasoning_content", "tool_calls", "prefix"},
    "tool": {"content", "tool_call_id"},
}
"""The fields of each role; `name` is allowed and not rendered, as by the reference."""


def library() -> Any:
    """The prompt library, loaded when first needed. Raises PromptError if it is not installed."""
    try:
        import deepseek_recipe
    except ImportError:
        hint = "install deepseek-recipe==0.2.0 (it has no wheels for Windows or musl)"
        raise PromptError(
            f"the prompt format comes from the package deepseek-recipe, which is missing: {hint}"
        ) from None
    return deepseek_recipe


def conversation(
    messages: Sequence[Message], effort: str, dialect: Dialect, tools: Sequence[Tool] = (), schema: Any = None
) -> deepseek_recipe.Conversation:
    """A conversation ready to be rendered in `dialect`; schema: JSON Schema the answer must follow, told to the model.

    Raises PromptError for an unknown role, field, effort or malformed tool, naming the message; for what is not UTF-8.
    """
    level = dialect.level(effort)
    if not messages:
        raise PromptError("the conversation is empty: it needs at least one message")
    try:
        return library().Conversation(
            _Builder(thinks=level is not None).build(messages),
            thinking_mode=level is not None,
            reasoning_effort=level,
            tools=[_tool(n, t) for n, t in enumerate(tools)] or None,
            response_schema=schema,
        )
    except UnicodeEncodeError as error:  # a lone surrogate: Python's stand-in for a byte that was no UTF-8
        code = ord(error.object[error.start])
        problem = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise PromptError(f"a text is not UTF-8 ({problem} at place {error.start}): convert it first") from None


@dataclass
class _Builder:
    """Walks the messages once. Call ids are renamed in call order: the library sorts calls and results by id."""

    thinks: bool
    calls: int = 0

    def build(self, messages: Sequence[Message]) -> list[Any]:
        leading = _leading(messages)
        texts = [content(m.get("content")) for m in messages[:leading]]
        built = [library().SystemMessage("\n\n".join(texts))] if leading else []
        ids: dict[str, str] = {}
        for n, message in enumerate(messages):
            _check(n, message)
            if n >= leading:
                built.append(self._message(n, message, ids))
        return built

    def _message(self, n: int, message: Message, ids: dict[str, str]) -> Any:
        text = content(message.get("content"))
        match message["role"]:
            case "assistant":
                return self._assistant(n, message, text, ids)
            case "tool" if message.get("tool_call_id") in ids:
                return library().ToolMessage(text, ids[message["tool_call_id"]])
            case "latest_reminder":
                return library().LatestReminderMessage(text)
        # A late system text and a result without its call are shown as what they are nearest to: user text.
        return library().UserMessage(text)

    def _assistant(self, n: int, message: Message, text: str, ids: dict[str, str]) -> Any:
        # The library renders any reasoning it is given, in either mode; the format has it only when thinking.
        thinking = str(message.get("reasoning_content") or "") if self.thinks else None
        calls = [self._call(n, call, ids) for call in message.get("tool_calls") or ()]
        return library().AssistantMessage(text, thinking, calls or None, bool(message.get("prefix")))

    def _call(self, n: int, call: Any, ids: dict[str, str]) -> Any:
        try:
            function = call["function"]
            name, arguments = function["name"], function["arguments"]
        except (KeyError, TypeError):
            raise PromptError(f"message {n}: a tool call needs function.name and function.arguments") from None
        ids[str(call.get("id", ""))] = renamed = f"call_{self.calls:06}"
        self.calls += 1
        return library().ToolCall(renamed, str(name), str(arguments))


def content(value: Any) -> str:
    """The text of a message's content: a string, nothing, or parts, of which only text can be shown."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, Sequence) or not all(isinstance(p, Mapping) for p in value):
        raise PromptError(f"content must be text or a list of parts, not {type(value).__name__}")
    return "\n\n".join(str(p.get("text", "")) if p.get("type") == "text" else _foreign(p) for p in value)


def _foreign(part: Mapping[str, Any]) -> str:
    return f"[Unsupported {part.get('type', 'part')}]"


def _leading(messages: Sequence[Message]) -> int:
    """How many messages at the start belong to the system text."""
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
    return next((n for n, role in enumerate(roles) if role not in ("system", "developer")), len(roles))


def _check(n: int, message: Message) -> None:
    if not isinstance(message, Mapping) or message.get("role") not in FIELDS:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise PromptError(f"message {n}: unknown role '{role}'; known are {', '.join(FIELDS)}")
    allowed = FIELDS[message["role"]] | {"role", "name"}
    if unknown := sorted(k for k in message if k not in allowed):
        raise PromptError(f"message {n}: a {message['role']} message has no field '{unknown[0]}'")


def _tool(n: int, tool: Tool) -> Any:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(f'tool {n}: needs {{"type": "function", "function": {{"name": ...}}}}')
    given = (function.get("description"), function.get("parameters"), function.get("strict"))
    return library().ToolDefinition(function["name"], *given)
