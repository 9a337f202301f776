"""One streamed request of the soak, over a plain socket, so that a client can leave in every way.

HTTP/1.0: the answer ends where the connection does. A client leaves in two ways. "half" closes its sending side and
reads on to the end: all that the server had written still arrives, so tokens received can be laid beside tokens billed.
"gone" cuts the connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PATHS = {
    "chat": "/v1/chat/completions",
    "messages": "/anthropic/v1/messages",
    "responses": "/v1/responses",
    "completions": "/beta/completions",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked; most: tokens of the answer; leaving: "", "half" or "gone", after so many pieces."""

    protocol: str
    turns: Sequence[dict[str, Any]]
    effort: str
    most: int
    leaving: str
    after: int

    def body(self) -> dict[str, Any]:
        """As the protocol wants it."""
        common = {"model": "small", "stream": True, "temperature": 0.7}
        off = {"thinking": {"type": "disabled"}} if self.effort == "none" else {}
        first, *turns = self.turns
        if self.protocol == "messages":
            effort = off or {"output_config": {"effort": self.effort}}
            return common | effort | {"system": first["content"], "messages": turns, "max_tokens": self.most}
        if self.protocol == "responses":
            effort = {"reasoning": {"effort": self.effort}}
            return common | effort | {"instructions": first["content"], "input": turns, "max_output_tokens": self.most}
        if self.protocol == "completions":
            return common | {"prompt": turns[-1]["content"], "max_tokens": self.most}
        effort = off or {"reasoning_effort": self.effort}
        return common | effort | {"messages": list(self.turns), "max_tokens": self.most, "logprobs": True}


@dataclass(slots=True)
class Seen:
    """What the client learned. finish: the reason, where the answer came to its end; tokens: by log probabilities."""

    protocol: str
    leaving: str
    status: int = 0
    retry_after: str = "1"
    id: str = ""
    hit: int = 0
    miss: int = 0
    output: int = 0
    finish: str = ""
    tokens: int = 0
    pieces: int = 0
    text: str = ""
    error: str = ""


async def ask(port: int, key: str, asked: Ask) -> Seen:
    """Ask, read, perhaps leave."""
    seen = Seen(asked.protocol, asked.leaving)
    try:
        async with asyncio.timeout(600):
            await _exchange(port, key, asked, seen)
    except (OSError, TimeoutError, ValueError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


async def _exchange(port: int, key: str, asked: Ask, seen: Seen) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        body = json.dumps(asked.body()).encode()
        head = (
            f"POST {PATHS[asked.protocol]} HTTP/1.0",
            f"authorization: Bearer {key}",
            f"content-length: {len(body)}",
        )
        writer.write("\r\n".join((*head, "", "")).encode() + body)
        await _head(reader, seen)
        if seen.status != 200:
            seen.error = "" if seen.status == 429 else (await reader.read()).decode()[:200]
            return
        left = False
        async for line in reader:
            if line.startswith(b"data: {"):
                _take(seen, json.loads(line[6:]))
            if asked.leaving and not left and seen.pieces >= asked.after:
                if asked.leaving == "gone":
                    return
                writer.write_eof()
                left = True
        if not seen.finish and not left and not seen.error:
            seen.error = "the stream ended without a reason"
    finally:
        writer.transport.abort()


async def _head(reader: asyncio.StreamReader, seen: Seen) -> None:
    seen.status = int((await reader.readline()).split()[1])
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(":")
        if name.lower() == "retry-after":
            seen.retry_after = value.strip()


def _take(seen: Seen, data: dict[str, Any]) -> None:
    """One event."""
    if data.get("error"):
        seen.error = str(data["error"].get("message", data["error"]))
    elif seen.protocol in ("chat", "completions"):
        _chat(seen, data)
    elif seen.protocol == "messages":
        _messages(seen, data)
    else:
        _responses(seen, data)


def _chat(seen: Seen, data: dict[str, Any]) -> None:
    seen.id = data["id"]
    for choice in data["choices"]:
        delta = choice.get("delta") or {}
        seen.text += delta.get("content") or ""
        found = choice.get("logprobs") or {}
        if seen.protocol == "chat":
            seen.tokens += sum(len(found.get(part) or ()) for part in ("content", "reasoning_content"))
        seen.pieces += 1
        seen.finish = choice.get("finish_reason") or seen.finish
    if usage := data.get("usage"):
        seen.hit, seen.miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
        seen.output = usage["completion_tokens"]


def _messages(seen: Seen, data: dict[str, Any]) -> None:
    kind = data["type"]
    if kind == "message_start":
        seen.id = data["message"]["id"]
        usage = data["message"]["usage"]
        seen.hit, seen.miss = usage["cache_read_input_tokens"], usage["input_tokens"]
    elif kind == "content_block_delta":
        seen.pieces += 1
        seen.text += data["delta"].get("text") or ""
    elif kind == "message_delta":
        seen.output = data["usage"]["output_tokens"]
        seen.finish = data["delta"]["stop_reason"]


def _responses(seen: Seen, data: dict[str, Any]) -> None:
    response = data.get("response") or {}
    seen.id = response.get("id") or seen.id
    seen.pieces += data["type"].endswith(".delta")
    if data["type"] == "response.output_text.delta":
        seen.text += data["delta"]
    if data["type"] in ("response.completed", "response.incomplete"):
        usage = response["usage"]
        seen.hit = usage["input_tokens_details"]["cached_tokens"]
        seen.miss, seen.output = usage["input_tokens"] - seen.hit, usage["output_tokens"]
        seen.finish = response["status"]
