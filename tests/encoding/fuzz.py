"""Draws completions of a model that is well or unwell, and looks for leaks: `make fuzz COUNT=10000 SEED=0`.

Each is sent through the three protocols, streamed and whole, with and without tools, cut at random. What must hold:
no markup and no control token in what a client sees, the stream says what the body says, and it ends properly.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from fathom.api import Event, FinishReason, Usage
from fathom.config import WEIGHTS
from fathom.encoding.codec import Codec
from fathom.encoding.desk import Desk
from fathom.encoding.intake import open_exchange

D = "｜DSML｜"
CONTROLS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    D,
)
_ATOMS = re.compile("|".join(map(re.escape, CONTROLS)) + "|.", re.DOTALL)
"""A control token or a character: what can be cut in two is only text."""

LEAKS = (D, "<think>", "</think>", "<｜", "｜>", "\ufffd", "\udc01", "\udc02")
WORDS = (
    "sum",
    "Paris",
    "杭州",
    "2 < 3",
    "a > b",
    '"quoted"',
    "back\\slash",
    "\n",
    "\n\n",
    "🙂",
    "é",
    "</p>",
    "2>&1",
    "{",
    "}",
    "[1, 2]",
)
TOOLS = [
    {"name": "get_weather", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    {"name": "f", "properties": {"q": {}}},
]


def text(rng: random.Random, most: int = 12) -> str:
    """Some words with nothing of the format in them."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(most)))


def value(rng: random.Random) -> tuple[str, str]:
    """A parameter's string attribute and its value: right, or not."""
    as_json = rng.choice(("12", "true", "null", "[1, 2]", '{"a": "b"}', "1.5", '"x"', "NaN", "{broken", ""))
    return rng.choice((("true", text(rng)), ("false", as_json), ("true", as_json), ("false", text(rng))))


def parameter(rng: random.Random) -> str:
    key = rng.choice(("city", "days", "q", "my key", 'a"b', "back\\", "ключ", "k>", "a<b"))
    string, inner = value(rng)
    quote = rng.choice('""""\'')
    attribute = rng.choice((f" string={quote}{string}{quote}",) * 5 + ("",))
    end = rng.choice((f"</{D}parameter>",) * 8 + ("", "</parameter>", f"</{D}"))
    return f"<{D}parameter name={quote}{key}{quote}{attribute}>{inner}{end}\n"


def call(rng: random.Random) -> str:
    body = "".join(parameter(rng) for _ in range(rng.randrange(4)))
    if rng.random() < 0.1:
        body = rng.choice(('{"a": 1}', "bare text", '{"city": "Rome"', ""))
    end = rng.choice((f"</{D}invoke>",) * 8 + ("", f"</{D}foo>"))
    return f'<{D}invoke name="{rng.choice(("get_weather", "f", "unknown"))}">\n{body}{end}\n'


def block(rng: random.Random) -> str:
    opener = rng.choice(
        (f"\n\n<{D}tool_calls>\n",) * 8 + (f"<{D}tool_calls>", f"\n<{D}foo>", "", f"<{D}tool_calls>\nsorry")
    )
    closer = rng.choice((f"</{D}tool_calls>",) * 6 + ("", f"</{D}tool_calls>{text(rng)}", f"</{D}"))
    return opener + "".join(call(rng) for _ in range(rng.randrange(1, 4))) + closer


def completion(rng: random.Random) -> str:
    """What a model might say to a prompt that ends in `<think>`, or in `</think>`."""
    parts = [text(rng), rng.choice(("</think>",) * 6 + ("", "</think></think>", "<think>")), text(rng)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        parts += [block(rng), text(rng, 3)]
    said = "".join(parts)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.choice([0, len(said), *(m.start() for m in _ATOMS.finditer(said))])
        said = said[:at] + rng.choice((*CONTROLS, f"<{D}", f"</{D}invoke>", "<", "</")) + said[at:]
    return said


def body(protocol: str, rng: random.Random) -> dict[str, Any]:
    """A request that this completion may answer."""
    thinking = rng.random() < 0.7
    tools = TOOLS if rng.random() < 0.7 else []
    question = {"role": "user", "content": "Go on."}
    if protocol == "messages":
        made = [{"name": t["name"], "input_schema": {"type": "object", "properties": t["properties"]}} for t in tools]
        thought = {"type": "enabled" if thinking else "disabled"}
        return {"messages": [question], "max_tokens": 5000, "thinking": thought} | ({"tools": made} if made else {})
    functions = [
        {"name": t["name"], "parameters": {"type": "object", "properties": t["properties"]}, "description": ""}
        for t in tools
    ]
    effort = "high" if thinking else "none"
    if protocol == "responses":
        made = [{"type": "function", **f} for f in functions]
        return {"input": "Go on.", "reasoning": {"effort": effort}} | ({"tools": made} if made else {})
    made = [{"type": "function", "function": f} for f in functions]
    return {"messages": [question], "reasoning_effort": effort} | ({"tools": made} if made else {})


class Fuzz:
    """One vocabulary's fuzzer."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.desk = Desk(codec, ("m",), 1_000_000)
        self._controls = re.compile("|".join(map(re.escape, codec.tokenizer.added)))

    def ids(self, said: str) -> list[int]:
        """Token ids, control tokens as such."""
        return self.codec.tokenizer.splice(said, [m.span() for m in self._controls.finditer(said)])

    def run(self, seed: int) -> None:
        """Draw, answer in every protocol both ways, and check. Raises AssertionError with the seed."""
        for protocol in ("chat", "messages", "responses"):
            rng = random.Random(seed)
            ids = self.ids(completion(rng))
            finish = rng.choice((FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH))
            ids = ids[: rng.randrange(len(ids) + 1)] if finish is FinishReason.LENGTH else ids
            asked = json.dumps({"model": "m", **body(protocol, rng)}).encode()
            frames, whole = self.answer(protocol, asked, ids, finish)
            said, streamed = _seen(protocol, whole), _streamed(protocol, frames)
            assert said == streamed, (seed, protocol, said, streamed)
            given, pieces = _arguments(protocol, whole), _streamed_arguments(protocol, frames)
            leaks = [mark for mark in LEAKS for part in (*said, *given, *pieces) if mark in part]
            assert not leaks, (seed, protocol, leaks, said)
            assert _ended(protocol, frames), (seed, protocol, frames[-2:])
            if finish is FinishReason.STOP:  # what is cut stays open in a stream, and Messages has no place for a half
                assert [*map(json.loads, given)] == [*map(json.loads, pieces)], (seed, protocol, given, pieces)
                assert all(isinstance(json.loads(text), dict) for text in given), (seed, protocol, given)

    def answer(self, protocol: str, asked: bytes, ids: list[int], finish: FinishReason) -> tuple[list[Any], Any]:
        """The frames and the body of the same answer."""
        streamed, whole = (open_exchange(protocol, asked, self.desk).writer("id_1") for _ in range(2))
        frames: list[Any] = []
        for writer, keep in ((streamed, frames.extend), (whole, lambda _: None)):
            keep(writer.start(10, 0))
            for token in ids:
                keep(writer.push(Event(token=token)))
            keep(writer.finish(Event(finish=finish, usage=Usage(10, len(ids)))))
        return frames, json.loads(whole.body())


def _seen(protocol: str, whole: dict[str, Any]) -> list[str]:
    """Everything that a client reads in a body: texts, reasoning, names and arguments, in their order."""
    if protocol == "chat":
        message = whole["choices"][0]["message"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
        return [message.get("reasoning_content") or "", message.get("content") or "", *(x for c in calls for x in c)]
    seen: list[str] = []
    for item in whole["content"] if protocol == "messages" else whole["output"]:
        kind = item["type"]
        if kind == "tool_use":
            seen += [item["name"]]
        elif kind == "function_call":
            seen += [item["name"], item["arguments"]]
        else:
            parts = item.get("content") or [item]
            seen += ["".join(p.get("text") or p.get("thinking") or "" for p in parts)]
    return [part for part in seen if part]


def _streamed(protocol: str, frames: list[Any]) -> list[str]:
    """The same, put together from a stream."""
    payloads = [json.loads(f.data) for f in frames if f.data != "[DONE]"]
    joined: dict[Any, list[str]] = {}
    put: Callable[[Any, str], None] = lambda key, more: joined.setdefault(key, []).append(more)  # noqa: E731
    for p in payloads:
        if protocol == "chat":
            _chat_delta(p, put)
        elif protocol == "messages":
            index, delta = p.get("index"), p.get("delta") or {}
            if p["type"] == "content_block_start" and p["content_block"]["type"] == "tool_use":
                put((index, "name"), p["content_block"]["name"])
            if p["type"] == "content_block_delta":
                put((index, "text"), delta.get("text") or delta.get("thinking") or "")
        elif p["type"] == "response.output_item.added" and p["item"]["type"] == "function_call":
            put((p["output_index"], "name"), p["item"]["name"])
        elif p["type"].endswith(".delta"):
            put((p["output_index"], "text"), p["delta"])
    texts = ["".join(parts) for _, parts in sorted(joined.items(), key=lambda item: item[0])]
    if protocol == "chat":
        return ["".join(joined.get((0, n), ())) for n in (0, 1)] + texts[sum(k[0] == 0 for k in joined) :]
    return [t for t in texts if t]


def _arguments(protocol: str, whole: dict[str, Any]) -> list[str]:
    """The arguments of the calls in a body."""
    if protocol == "chat":
        return [c["function"]["arguments"] for c in whole["choices"][0]["message"].get("tool_calls") or ()]
    if protocol == "messages":
        return [json.dumps(b["input"], ensure_ascii=False) for b in whole["content"] if b["type"] == "tool_use"]
    return [item["arguments"] for item in whole["output"] if item["type"] == "function_call"]


def _streamed_arguments(protocol: str, frames: list[Any]) -> list[str]:
    """The same, put together from a stream."""
    joined: dict[int, str] = {}
    for p in (json.loads(f.data) for f in frames if f.data != "[DONE]"):
        if protocol == "chat":
            for piece in p["choices"][0]["delta"].get("tool_calls") or ():
                joined[piece["index"]] = joined.get(piece["index"], "") + (piece["function"].get("arguments") or "")
        elif p["type"] == "content_block_start" and p["content_block"]["type"] == "tool_use":
            joined[p["index"]] = ""
        elif p["type"] == "content_block_delta" and p["delta"]["type"] == "input_json_delta":
            joined[p["index"]] += p["delta"]["partial_json"]
        elif p["type"] == "response.function_call_arguments.done":
            joined[p["output_index"]] = p["arguments"]
    return [joined[n] or "{}" for n in sorted(joined)]


def _chat_delta(payload: dict[str, Any], put: Callable[[Any, str], None]) -> None:
    delta = payload["choices"][0]["delta"]
    put((0, 0), delta.get("reasoning_content") or "")
    put((0, 1), delta.get("content") or "")
    for piece in delta.get("tool_calls") or ():
        if "id" in piece:
            put((1 + piece["index"], 0), piece["function"]["name"])
        put((1 + piece["index"], 1), piece["function"].get("arguments") or "")


def _ended(protocol: str, frames: list[Any]) -> bool:
    if protocol == "chat":
        return frames[-1].data == "[DONE]" and json.loads(frames[-2].data)["choices"][0]["finish_reason"] is not None
    last = json.loads(frames[-1].data)["type"]
    return last in ("message_stop", "response.completed", "response.incomplete")


def main() -> None:
    """Run COUNT completions from SEED on, on the embedded model's vocabulary."""
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    fuzz, begun = Fuzz(Codec.load(WEIGHTS / "small")), time.perf_counter()
    for seed in range(first, first + count):
        fuzz.run(seed)
    seconds = time.perf_counter() - begun
    print(f"{count} completions through three protocols, streamed and whole: no leak, {seconds:.0f} s")


if __name__ == "__main__":
    main()
