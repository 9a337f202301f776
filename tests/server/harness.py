"""A server on a real port, and what the tests of the dialects ask of it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from anthropic import Anthropic
from openai import OpenAI

from fathom.api import Engine, Event, FinishReason, GenerateRequest, Guide, SamplingParams, Status, Ticket
from fathom.encoding.codec import Codec
from fathom.engine.stub import Script, ScriptedEngine
from fathom.server.app import create_app
from fathom.server.listen import Listener, Patience, bound

MODEL = "deepseek-v4-flash"

PREFIXES = ("", "/v1", "/beta", "/anthropic", "/anthropic/v1")
"""Base paths that a user may have typed; every endpoint is served under each."""

BROKEN = "the engine broke down"

OFF = {"thinking": {"type": "disabled"}}


class Relay:
    """An `api.Engine` in front of another one, which each test may change."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    @property
    def context(self) -> int:
        return self.inner.context

    def submit(self, request: GenerateRequest, sink: Callable[[Event], None]) -> Ticket:
        return self.inner.submit(request, sink)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        return self.inner.generate(prompt_ids, params)

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        return self.inner.generate_batch(requests)

    def status(self) -> Status:
        return self.inner.status()

    def close(self) -> None:
        self.inner.close()


@dataclass(eq=False)
class Site:
    """A running server: `url` is its root; `relay` the engine behind it; `listener` its loop."""

    url: str
    codec: Codec
    relay: Relay
    raw: httpx.Client
    listener: Listener

    def ids(self, text: str) -> list[int]:
        """Token ids of a script: control tokens spelled in it become control ids."""
        added = "|".join(map(re.escape, self.codec.tokenizer.added))
        return self.codec.tokenizer.splice(text, [m.span() for m in re.finditer(added, text)])

    def script(self, *answers: str | list[int] | Script, **options: Any) -> ScriptedEngine:
        """From now on the engine says these, in turn; the last one again and again."""
        ids = [self.ids(a) if isinstance(a, str) else a for a in answers]
        self.relay.inner = stub = ScriptedEngine(ids, **options)
        return stub

    def prompt(self, place: int = -1) -> list[int]:
        """The ids of a prompt that the engine was given."""
        return list(self.relay.inner.requests[place].prompt_ids)

    def prompt_text(self, place: int = -1) -> str:
        return self.codec.tokenizer.decode(self.prompt(place))

    def urge(self, answer: str) -> None:
        """From now on the engine says this as far as each request's guide lets it, then ends as soon as it may."""

        def line(_: Sequence[int]) -> list[int]:
            return urged(stub.requests[-1].guide, self.ids(answer), self.codec)

        self.relay.inner = stub = ScriptedEngine([line])

    def break_down(self) -> None:
        """From now on the engine says two tokens and then fails."""
        self.script(Script(self.ids("So")[:2], FinishReason.ERROR, BROKEN))

    def openai(self, base: str = "/v1", **options: Any) -> OpenAI:
        return _client(OpenAI, self.url + base, **options)

    def anthropic(self, base: str = "/anthropic", **options: Any) -> Anthropic:
        return _client(Anthropic, self.url + base, **options)

    def chat(self, text: str = "Hi", *, path: str = "/chat/completions", **fields: Any) -> httpx.Response:
        """POST a chat completion; `messages=` replaces the one user message."""
        return self.raw.post(path, json={"model": MODEL, "messages": [user(text)]} | fields)

    def messages(self, text: str = "Hi", *, path: str = "/anthropic/v1/messages", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "max_tokens": 500, "messages": [user(text)]}
        return self.raw.post(path, json=body | fields)

    def responses(self, said: str = "Hi", *, path: str = "/responses", **fields: Any) -> httpx.Response:
        return self.raw.post(path, json={"model": MODEL, "input": said} | fields)


@functools.cache
def _client(kind: Any, url: str, **options: Any) -> Any:
    """One client for all tests that ask for the same: to make one takes longer than most tests."""
    return kind(base_url=url, api_key="none", **{"max_retries": 0, **options})


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | fields


def result(identity: str, value: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": value}


def function(name: str, **properties: str) -> dict[str, Any]:
    """A chat tool whose parameters have these JSON types, the first one required."""
    schema = {"type": "object", "properties": {k: {"type": v} for k, v in properties.items()}}
    if properties:
        schema |= {"required": [next(iter(properties))]}
    return {"type": "function", "function": {"name": name, "description": f"The {name}", "parameters": schema}}


T1 = function("get_weather", city="string", days="integer")
"""The tool of the cases: weather of a city for some days."""

T1_MESSAGES = {
    "name": "get_weather",
    "description": "The get_weather",
    "input_schema": T1["function"]["parameters"],
}
T1_RESPONSES = {"type": "function", **T1["function"]}


def invoke(name: str, *parameters: tuple[str, str, Any]) -> str:
    """One call in the model's markup; a parameter is (key, "true" or "false", value as written)."""
    inner = "".join(f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>\n' for k, s, v in parameters)
    return f'<｜DSML｜invoke name="{name}">\n{inner}</｜DSML｜invoke>'


def block(*invokes: str) -> str:
    """A whole tool block with the blank line before it."""
    inner = "\n".join(invokes)
    return f"\n\n<｜DSML｜tool_calls>\n{inner}\n</｜DSML｜tool_calls>"


PARIS = invoke("get_weather", ("city", "true", "Paris"), ("days", "false", 2))
ROME = invoke("get_weather", ("city", "true", "Rome"))


def urged(guide: Guide | None, wanted: list[int], codec: Codec) -> list[int]:
    """The wanted ids while the guide allows them; from the first that it refuses, the shortest way to an end."""
    assert guide is not None
    end = codec.tokenizer.added["<｜end▁of▁sentence｜>"]
    closing = [end, *(codec.tokenizer.encode(sign)[0] for sign in '"}]:0')]
    said: list[int] = []
    while len(said) < 500:
        mask = guide.allowed() or b"\xff" * codec.tokenizer.size
        may = [i for i in range(codec.tokenizer.size) if mask[i // 8] >> i % 8 & 1]
        if not wanted or wanted[0] not in may:
            wanted = [next((i for i in closing if i in may), may[0])]
        token, wanted = wanted[0], wanted[1:]
        guide.accept(token)
        if token == end:
            return said
        said.append(token)
    raise AssertionError("the guide lets no answer end")


MARKUP = ("DSML", "<think>", "</think>", "<｜", "｜>")
"""None of these may be seen in an answer that does not quote it."""


def leaks(value: Any) -> list[str]:
    """The markup that an answer (text or JSON) shows."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [mark for mark in MARKUP if mark in text]


def data_lines(text: str) -> list[str]:
    """The payloads of a raw event stream."""
    return [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]


def chunks(text: str) -> list[dict[str, Any]]:
    """The JSON payloads of a raw event stream, `[DONE]` left out."""
    return [json.loads(line) for line in data_lines(text) if line != "[DONE]"]


def deltas(text: str) -> list[dict[str, Any]]:
    """The deltas of a streamed chat completion."""
    return [choice["delta"] for chunk in chunks(text) for choice in chunk["choices"]]


def joined(text: str, field: str) -> str:
    """One text field of a streamed chat completion."""
    return "".join(delta.get(field) or "" for delta in deltas(text))


def streamed_calls(text: str) -> list[dict[str, str]]:
    """The tool calls of a streamed chat completion, put together."""
    calls: list[dict[str, str]] = []
    for piece in (p for delta in deltas(text) for p in delta.get("tool_calls") or ()):
        if piece["index"] == len(calls):
            calls.append({"id": piece["id"], "name": piece["function"]["name"], "arguments": ""})
        calls[piece["index"]]["arguments"] += piece["function"].get("arguments") or ""
    return calls


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def serving(
    engine: Engine, codec: Codec, desk: Any, settings: Any, patience: Patience | None = None, **more: Any
) -> Iterator[Site]:
    """A server for these on a free port, until the block ends."""
    relay = Relay(engine)
    app = create_app(relay, desk, settings=settings, **more)
    listener, socket = Listener(app, patience), bound("127.0.0.1", 0)
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=listener.run, args=([socket],), daemon=True)
    thread.start()
    assert eventually(lambda: listener.started, 20)
    with httpx.Client(base_url=url, timeout=60) as raw:
        yield Site(url, codec, relay, raw, listener)
    listener.should_exit = True
    listener.force_exit = True
    thread.join(10)
