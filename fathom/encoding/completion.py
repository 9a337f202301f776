"""Plain continuation and fill-in-the-middle: no conversation, no thinking, text only. Reference api A.1, B.4."""

from __future__ import annotations

import json
import time
from typing import Any

from fathom.api import Event, FinishReason, GenerateRequest, Logprob, SamplingParams
from fathom.encoding import wishes
from fathom.encoding.answer import Frame
from fathom.encoding.body import refuse_unsupported, shown
from fathom.encoding.desk import Desk
from fathom.encoding.exchange import Exchange
from fathom.encoding.guide import AnswerGuide
from fathom.encoding.tokenizer import TextStream
from fathom.errors import ContextError, RequestError, SamplingError

_FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
_LONGEST = 4096
"""The most tokens of a completion, as of the hosted service."""


class Completions(Exchange):
    """A request of the completions endpoint."""

    def __init__(self, body: dict[str, Any], desk: Desk, key: str) -> None:
        self.protocol, self.desk, self.key, self.thinking = "completions", desk, key, False
        body = {name: value for name, value in body.items() if value is not None}
        self.model = desk.model(body.get("model"), "completions")
        self.stream = _flag(body, "stream")
        self.prompt = _one(body.get("prompt"))
        self.suffix = body.get("suffix", "")
        self.echo = _flag(body, "echo")
        self.stops = _stops(body.get("stop"))
        refuse_unsupported(body)
        self.namespace = json.dumps(["completions", key, wishes.user(body, self.protocol, False)])
        self.prompt_ids = self._ids()
        self.params = self._params(body)
        self.guide = AnswerGuide(desk.codec.grammars, thinking=False)

    def generate(self) -> GenerateRequest:
        """For the engine."""
        return GenerateRequest(
            prompt_ids=self.prompt_ids, params=self.params, guide=self.guide, namespace=self.namespace
        )

    def writer(self, identity: str) -> TextWriter:
        """Writes the text."""
        return TextWriter(self, identity)

    def _ids(self) -> list[int]:
        tokenizer = self.desk.codec.tokenizer
        first = [tokenizer.added["<｜begin▁of▁sentence｜>"]]
        self.desk.bounded(self.prompt)
        if not isinstance(self.suffix, str):
            raise RequestError(400, "suffix must be a string", param="suffix")
        if not self.suffix:
            return first + tokenizer.encode(self.prompt)
        if missing := [token for token in _FIM if token not in tokenizer.added]:
            raise RequestError(400, f"this model cannot fill in: its vocabulary has no {missing[0]}", param="suffix")
        self.desk.bounded(self.suffix)
        begin, hole, end = (tokenizer.added[token] for token in _FIM)
        return [*first, begin, *tokenizer.encode(self.prompt), hole, *tokenizer.encode(self.suffix), end]

    def _params(self, body: dict[str, Any]) -> SamplingParams:
        settings, left = self.desk.codec.settings, self.desk.context - len(self.prompt_ids)
        if left < 1:
            limit = f"the prompt has {len(self.prompt_ids)} tokens, but the context holds {self.desk.context}"
            raise ContextError(f"{limit} with the answer: shorten it, or allow a longer context")
        asked = body.get("max_tokens")
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
            raise RequestError(400, f"max_tokens {asked!r} is out of range: it must be at least 1", param="max_tokens")
        longest = min(_LONGEST, settings.max_tokens or _LONGEST) if asked is None else asked
        logprobs = body.get("logprobs")
        try:
            return SamplingParams(
                temperature=body.get("temperature", settings.temperature),
                top_p=body.get("top_p", settings.top_p),
                top_k=wishes.top_k(body),
                max_tokens=min(longest, left),
                seed=body.get("seed"),
                logprobs=None if logprobs is False else logprobs,
            )
        except (SamplingError, TypeError, ValueError) as error:
            raise RequestError(400, str(error)) from None


class TextWriter:
    """Writes one completion; the same methods as `AnswerWriter`."""

    def __init__(self, exchange: Completions, identity: str) -> None:
        self.exchange, self.identity = exchange, identity
        self._text = TextStream(exchange.desk.codec.tokenizer)
        self._created = int(time.time())
        self._held, self._said, self._finish = "", exchange.prompt if exchange.echo else "", "stop"
        self._prompt = (0, 0)
        self._logprobs: list[tuple[int, Logprob]] = []
        self._told = 0  # of them, in frames
        self.ids: list[int] = []
        self.stopped = False

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        prompt, cached = self._prompt
        return {"prompt": prompt, "cached": cached, "completion": len(self.ids), "reasoning": 0}

    def start(self, prompt_tokens: int, cached_tokens: int) -> list[Frame]:
        """An echo, if one was asked for."""
        self._prompt = (prompt_tokens, cached_tokens)
        return [self._frame(self._said)] if self._said else []

    def push(self, event: Event) -> list[Frame]:
        """The text that this token makes certain."""
        assert event.token is not None
        self.ids.append(event.token)
        if event.logprob:
            self._logprobs.append((event.token, event.logprob))
        if event.token in self.exchange.desk.codec.tokenizer.added.values():
            return []
        self._held += self._text.push(event.token)
        return self._release(final=False)

    def finish(self, event: Event) -> list[Frame]:
        """What was held back, the reason and the usage."""
        frames = [] if self.stopped else self._release(final=True)
        if event.finish is FinishReason.LENGTH and not self.stopped:
            self._finish = "length"
        return [*frames, self._frame("", self._finish), Frame("[DONE]")]

    def error(self, error: RequestError) -> list[Frame]:
        """The frame that ends a stream which cannot go on."""
        return [Frame(json.dumps({"error": error.body()}))]

    def body(self) -> str:
        """The whole."""
        return json.dumps(self._payload(self._said, self._finish, whole=True), ensure_ascii=False)

    def _release(self, final: bool) -> list[Frame]:
        """Everything that can no longer be the beginning of a stop string."""
        stops = self.exchange.stops
        found = min((self._held.find(s) for s in stops if s in self._held), default=-1)
        if found >= 0:
            self.stopped, text = True, self._held[:found]
        else:
            keep = 0 if final else max((_overlap(self._held, s) for s in stops), default=0)
            text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._said += text
        return [self._frame(text)] if text else []

    def _frame(self, text: str, finish: str | None = None) -> Frame:
        frame = Frame(json.dumps(self._payload(text, finish, whole=False), ensure_ascii=False))
        self._told = len(self._logprobs)
        return frame

    def _payload(self, text: str, finish: str | None, whole: bool) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": self._shown_logprobs(0 if whole else self._told)}
        payload = {
            "id": self.identity,
            "object": "text_completion",
            "created": self._created,
            "model": self.exchange.model,
            "choices": [choice | {"finish_reason": finish}],
        }
        return payload | {"usage": self._usage() if finish else None}

    def _usage(self) -> dict[str, Any]:
        prompt, cached = self._prompt
        return {
            "prompt_tokens": prompt,
            "completion_tokens": len(self.ids),
            "total_tokens": prompt + len(self.ids),
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _shown_logprobs(self, first: int) -> dict[str, Any] | None:
        """Those of the tokens from this one on."""
        shown = self._logprobs[first:]
        if not shown:
            return None
        text = self.exchange.desk.codec.tokenizer.decode
        return {
            "tokens": [text([i]) for i, _ in shown],
            "token_logprobs": [max(p.logprob, -9999.0) for _, p in shown],
            "top_logprobs": [{text([i]): max(v, -9999.0) for i, v in p.top} for _, p in shown],
        }


def _one(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RequestError(400, "prompt must be a string", param="prompt")
    return prompt


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(400, f"{name} must be true or false, not {shown(value)}", param=name)
    return value


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(400, "stop must be a string or at most 16 strings", param="stop")
    return tuple(stops)


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
