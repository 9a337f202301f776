"""The waist: what an engine takes and gives. Everything else knows only this, so another engine may stand behind it.

Two levels. An `Engine` turns token ids into token ids. A `ChatModel` turns messages into an answer;
`encoding.chat.Chat` is one, made of any engine and a checkpoint's prompt format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, Protocol

from fathom.errors import SamplingError

EFFORTS = ("none", "high", "max")
"""How hard to think: not at all, or with the two levels of the checkpoint's prompt format."""

MAX_SEED = 2**63 - 1

MAX_LOGPROBS = 20
"""The most alternatives that can be asked for with each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature: 0 is greedy, at most 2; top_p in (0, 1]: the smallest set of tokens with that probability; top_k: only
    the k likeliest; max_tokens: None is what the context leaves; seed: None draws one; stop_ids: besides the end of
    sentence; logprobs: None for none, else how many alternatives (0 to 20) come with each token's own.
    Raises SamplingError, naming the value and its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            _check(name, getattr(self, name), _is(getattr(self, name), Real), "a number")
        for name in ("top_k", "max_tokens", "seed", "logprobs"):
            _check(name, value := getattr(self, name), value is None or _is(value, Integral), "a whole number")
        _check("temperature", self.temperature, 0 <= self.temperature <= 2, "from 0 (greedy) to 2")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        _check("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}")
        _check("stop_ids", self.stop_ids, all(i >= 0 for i in self.stop_ids), "token ids, none negative")
        _check("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "from 0 to 20")


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check(name: str, value: object, fine: bool, wanted: str) -> None:
    if not fine or (isinstance(value, float) and math.isnan(value)):
        raise SamplingError(f"{name} {value!r} is out of range: it must be {wanted}")


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached` of the prompt's tokens were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log of a sampled token's probability, before temperature and cuts; `top`: (id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One sampled token; or, last, the end with its reason and the usage. Stop tokens are not shown.

    usage: comes with the end, and with the first token, so that a stream can begin with the counts of its prompt.
    error: with `FinishReason.ERROR`, one line for the user.
    """

    token: int | None = None
    finish: FinishReason | None = None
    usage: Usage | None = None
    logprob: Logprob | None = None
    error: str | None = None


class Guide(Protocol):
    """What may be sampled next: a request's own, fed with every token that was sampled."""

    def allowed(self) -> bytes | None:
        """A bit for each token id, lowest first (id i is bit i % 8 of byte i // 8); None allows everything."""

    def accept(self, token: int) -> None:
        """This token, a stop token included, was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Token ids to be continued.

    namespace: prefixes are shared only with requests of the same one; keep: positions in the prompt at which a later
    prompt may branch off (the beginning of the last user turn, for example), worth a resume point.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    guide: Guide | None = None
    namespace: str = ""
    keep: tuple[int, ...] = ()


class Ticket(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """End it within one step; its last event then has `FinishReason.CANCELLED`. Any thread, any number of times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What an engine is doing: requests waiting and running.

    tiers of its cache: name (device, host, disk) -> (bytes used, bytes at most); restored: prompt tokens that each tier
    has given back so far; notes: what the user should know.
    """

    waiting: int = 0
    running: int = 0
    tiers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    restored: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Engine(Protocol):
    """Token ids in, token ids out."""

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""

    def submit(self, request: GenerateRequest, sink: Callable[[Event], None]) -> Ticket:
        """Begin a request; `sink` gets its events, from the engine's thread, and must not block.

        Raises PromptError and ContextError at once, before anything is computed.
        """

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        """Events of one request as they come. Raises as `submit`; closing the iterator cancels."""

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        """All events of many requests, computed side by side, in the order of the requests."""

    def status(self) -> Status:
        """What it is doing now."""

    def close(self) -> None:
        """Cancel what runs, save what is worth it, and stop."""


Message = Mapping[str, Any]
"""As on the wire: role (system, user, assistant, tool), content, reasoning_content, tool_calls, tool_call_id."""

Tool = Mapping[str, Any]
"""A function tool: {"type": "function", "function": {"name", "description", "parameters"}}."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `arguments` is JSON text as the model wrote it, so it may be broken."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be continued."""

    messages: Sequence[Message]
    effort: str = "high"
    tools: Sequence[Tool] = ()
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to the visible answer."""

    thinking: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer; `token_ids` are the sampled ids, stop token excluded."""

    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    finish: FinishReason
    usage: Usage
    token_ids: tuple[int, ...]

    def message(self) -> dict[str, Any]:
        """The answer as an assistant message, to be appended to its conversation."""
        calls = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in self.tool_calls
        ]
        message = {"role": "assistant", "content": self.text, "reasoning_content": self.thinking}
        return message | ({"tool_calls": calls} if calls else {})


class ChatModel(Protocol):
    """Messages in, answers out."""

    def stream(self, request: ChatRequest) -> Iterator[Delta | Completion]:
        """The answer in pieces; the last item is the whole."""

    def chat(self, request: ChatRequest) -> Completion:
        """The whole answer."""

    def chat_batch(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """The answers to many requests, computed side by side."""
