"""From sampled ids to what a client of one protocol sees, streamed or whole. Reference recipe 2, 5; api B.6-B.10.

The prompt library makes the shapes. Ours are the guard before it, the counts of tokens, log probabilities, and the
frames that it does not know: errors inside a stream.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fathom.api import Event, FinishReason, Logprob, Usage
from fathom.encoding.codec import Codec
from fathom.encoding.conversation import library
from fathom.encoding.guard import Guard
from fathom.encoding.tokenizer import END_OF_THINKING
from fathom.errors import RequestError

_MESSAGES_ERRORS = {402: "billing_error", 408: "timeout_error", 429: "rate_limit_error", 503: "overloaded_error"}
"""What Anthropic's clients call an error, by its status; `api_error` is any other."""

_RESPONSES = {"chat": "ChatCompletionResponse", "messages": "MessagesResponse", "responses": "ResponsesResponse"}


@dataclass(frozen=True, slots=True)
class Frame:
    """One server-sent event: its payload, and its name where the protocol has names."""

    data: str
    event: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How an answer is to be written.

    generator, options: the library's, for this request; thinking, in_block: where the prompt ends; tools: whether calls
    may be made.
    """

    protocol: str
    generator: Any
    options: Any
    identity: str
    model: str
    thinking: bool
    in_block: bool = False
    tools: bool = True
    logprobs: bool = False


class AnswerWriter:
    """Writes one answer. `start` comes first, `finish` or `error` last; `stopped` says that a stop string was found."""

    def __init__(self, codec: Codec, form: Form) -> None:
        recipe = library()
        self.form, self._codec = form, codec
        self._guard = Guard(codec.tokenizer, thinking=form.thinking, in_block=form.in_block, tools=form.tools)
        self._stream = recipe.StreamProcessor(form.generator, form.options, codec.native)
        self._kind = getattr(recipe, _RESPONSES[form.protocol])
        self._whole: Any = None
        self._prompt = Usage(0, 0)
        self._logprobs: list[tuple[bool, dict[str, Any]]] = []
        self._all_logprobs: dict[str, list[dict[str, Any]]] = {}
        self._sequence = 0
        self._control = frozenset(codec.tokenizer.added.values())
        self._end_of_thinking, self._thought = codec.tokenizer.added[END_OF_THINKING], -1
        self.ids: list[int] = []
        self.stopped = False

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far: prompt, cached, completion, and reasoning, which completion includes."""
        prompt = self._prompt
        cached, reasoning = prompt.cached_tokens, self._reasoning()
        return {
            "prompt": prompt.prompt_tokens,
            "cached": cached,
            "completion": len(self.ids),
            "reasoning": reasoning,
        }

    def start(self, prompt_tokens: int, cached_tokens: int) -> list[Frame]:
        """The frames before the first token."""
        self._prompt = Usage(prompt_tokens, 0, cached_tokens)
        created = int(time.time())
        self._whole = self._kind(self.form.identity, self.form.model, created, prompt_tokens, cached_tokens)
        recipe = library()
        counts = recipe.PromptUsage(prompt_tokens=prompt_tokens, prompt_cache_hit_tokens=cached_tokens)
        return self._frames(self._stream.push(recipe.InferenceChunk.ready(prompt_usage=counts)))

    def push(self, event: Event) -> list[Frame]:
        """The frames of one sampled token."""
        assert event.token is not None
        if self._thought < 0 and event.token == self._end_of_thinking:
            self._thought = len(self.ids)
        self.ids.append(event.token)
        if self.form.logprobs and event.logprob and event.token not in self._control:
            self._logprobs.append((self._guard.thinking, self._entry(event.token, event.logprob)))
        return self._pass(self._guard.push(event.token))

    def finish(self, event: Event) -> list[Frame]:
        """The last frames."""
        recipe = library()
        reason = FinishReason.STOP if self.stopped or event.finish is None else event.finish
        frames = self._pass(self._guard.finish(reason))
        if not self.stopped:
            ends = recipe.InferenceFinishReason
            end = ends.Length if reason is FinishReason.LENGTH else ends.Stop
            frames += self._frames(self._stream.push(recipe.InferenceChunk.finish(end)))
        frames += self._frames(self._stream.finish())
        done = self._kind.sse_done_data()
        return frames + ([Frame(done)] if done else [])

    def error(self, error: RequestError) -> list[Frame]:
        """The frames that end a stream which has begun and cannot go on, in the words of the protocol."""
        self._stream.close()
        if self.form.protocol == "messages":
            kind = _MESSAGES_ERRORS.get(error.status, "api_error")
            said = {"type": "error", "error": {"type": kind, "message": error.message}}
            return [Frame(json.dumps(said), "error")]
        if self.form.protocol == "responses":
            return [self._failed(error)]
        return [Frame(json.dumps({"error": error.body()}))]

    def body(self) -> str:
        """The whole answer as one JSON text, after `finish`."""
        whole = json.loads(self._whole.to_json())
        self._set_usage(whole.get("usage"))
        if self._all_logprobs and whole.get("choices"):
            whole["choices"][0]["logprobs"] = self._all_logprobs
        if self.form.logprobs and self.form.protocol == "responses":
            self._put_logprobs({"response": whole})
        return json.dumps(whole, ensure_ascii=False)

    def message(self) -> dict[str, Any]:
        """The answer as a chat message, whatever the protocol."""
        whole = json.loads(self._whole.to_json())
        if self.form.protocol == "chat":
            found: dict[str, Any] = whole["choices"][0]["message"]
            return found | {"content": found.get("content") or ""}
        items = whole.get("content") if self.form.protocol == "messages" else whole.get("output")
        return _as_message(items or ())

    def _pass(self, chunks: Sequence[Any]) -> list[Frame]:
        """The guard's chunks through the parser, until a stop string ends the answer."""
        frames: list[Frame] = []
        for chunk in chunks:
            if self.stopped:
                break
            frames += self._frames(self._stream.push(chunk))
            self.stopped = self._stream.finished
        return frames

    def _frames(self, chunks: Sequence[Any]) -> list[Frame]:
        frames = []
        for chunk in chunks:
            name, text = self._kind.sse_event_name(chunk), chunk.to_json()
            self._whole.accumulate(chunk)
            frames.append(Frame(self._amended(text), name))
        self._sequence += len(frames)
        return frames

    def _amended(self, text: str) -> str:
        """A payload with our own counts and log probabilities."""
        counts, waiting = '"usage":{' in text, bool(self._logprobs) and '"choices":[{' in text
        listed = self.form.logprobs and '"logprobs":[]' in text
        if not counts and not waiting and not listed:
            return text
        payload = json.loads(text)
        if counts:
            for holder in (payload, payload.get("message"), payload.get("response")):
                self._set_usage((holder or {}).get("usage"))
        if waiting:
            payload["choices"][0]["logprobs"] = self._take_logprobs()
        if listed:
            self._put_logprobs(payload)
        return json.dumps(payload, ensure_ascii=False, separators=(",", ":"))

    def _take_logprobs(self) -> dict[str, list[dict[str, Any]]]:
        taken: dict[str, list[dict[str, Any]]] = {"content": []}
        for thinking, entry in self._logprobs:
            taken.setdefault("reasoning_content" if thinking else "content", []).append(entry)
        self._logprobs = []
        for name, entries in taken.items():
            self._all_logprobs.setdefault(name, []).extend(entries)
        return taken

    def _put_logprobs(self, event: dict[str, Any]) -> None:
        """Into an event of Responses, which lists those of the answer's text: a piece its own, all else the whole."""
        kind = event.get("type", "")
        if kind == "response.output_text.delta":
            event["logprobs"] = self._take_logprobs()["content"]
        if kind.endswith((".delta", ".added")):
            return
        self._take_logprobs()
        said = self._all_logprobs["content"]
        items = [event.get("item") or {}, *(event.get("response") or {}).get("output", ())]
        parts = [event.get("part") or {}, *(part for item in items for part in item.get("content") or ())]
        for part in (event, *parts):
            if "logprobs" in part:
                part["logprobs"] = said

    def _entry(self, token: int, found: Logprob) -> dict[str, Any]:
        top = [self._named(i, value) for i, value in found.top]
        return self._named(token, found.logprob) | {"top_logprobs": top}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        raw = self._codec.tokenizer.bytes_of(token)
        # JSON has no infinity; a token that cannot be sampled gets what the hosted service shows.
        return {"token": raw.decode(errors="replace"), "logprob": max(value, -9999.0), "bytes": list(raw)}

    def _reasoning(self) -> int:
        if not self.form.thinking:
            return 0
        return len(self.ids) if self._thought < 0 else self._thought

    def _set_usage(self, usage: dict[str, Any] | None) -> None:
        """The library counts what was pushed; the ids that were sampled are what is paid for."""
        if not usage:
            return
        counts = self.usage
        for name in ("completion_tokens", "output_tokens"):
            if name in usage:
                usage[name] = counts["completion"]
        if "total_tokens" in usage:
            usage["total_tokens"] = counts["prompt"] + counts["completion"]
        for name in ("completion_tokens_details", "output_tokens_details"):
            if usage.get(name) and "reasoning_tokens" in usage[name]:
                usage[name]["reasoning_tokens"] = counts["reasoning"]

    def _failed(self, error: RequestError) -> Frame:
        whole = json.loads(self._whole.to_json())
        code = "insufficient_quota" if error.status == 402 else "server_error"
        whole |= {"status": "failed", "error": {"code": code, "message": error.message}}
        event = {"type": "response.failed", "sequence_number": self._sequence, "response": whole}
        return Frame(json.dumps(event), "response.failed")


def _as_message(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Blocks of Messages or items of Responses as one chat message."""
    text, reasoning, calls = "", "", []
    for item in items:
        kind = item.get("type")
        if kind == "tool_use":
            function = {"name": item["name"], "arguments": json.dumps(item["input"], ensure_ascii=False)}
            calls.append({"id": item["id"], "type": "function", "function": function})
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append({"id": item["call_id"], "type": "function", "function": function})
        elif kind in ("thinking", "reasoning"):
            reasoning += item.get("thinking") or _joined_text(item)
        else:
            text += item.get("text") or _joined_text(item)
    message = {"role": "assistant", "content": text, "reasoning_content": reasoning}
    return message | ({"tool_calls": calls} if calls else {})


def _joined_text(item: dict[str, Any]) -> str:
    return "".join(part.get("text") or "" for part in item.get("content") or ())
