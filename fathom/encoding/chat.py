"""A chat model: any engine behind a checkpoint's prompt format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fathom.api import ChatRequest, Completion, Delta, Engine, Event, FinishReason, Usage
from fathom.encoding.codec import AnswerReader, Codec
from fathom.errors import FathomError


class Chat:
    """Messages in, answers out. An answer without its own `max_tokens` is bounded by the checkpoint's settings."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self.engine = engine
        self.codec = codec

    def stream(self, request: ChatRequest) -> Iterator[Delta | Completion]:
        """The answer in pieces as they are sampled; the last item is the whole.

        Raises PromptError, ContextError; FathomError with the engine's own line when it fails in the middle.
        """
        prompt, request = self._prepare(request)
        reading = _Reading(self.codec.reader(prompt))
        for event in self.engine.generate(prompt, request.params):
            delta = reading.push(event)
            if delta.text or delta.thinking:
                yield delta
        yield reading.completion()

    def chat(self, request: ChatRequest) -> Completion:
        """The whole answer."""
        return self.chat_batch([request])[0]

    def chat_batch(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """The answers to many requests, computed side by side."""
        prepared = [self._prepare(r) for r in requests]
        answers = self.engine.generate_batch([(prompt, r.params) for prompt, r in prepared])
        return [self._read(prompt, events) for (prompt, _), events in zip(prepared, answers, strict=True)]

    def _prepare(self, request: ChatRequest) -> tuple[list[int], ChatRequest]:
        params = request.params
        if params.max_tokens is None:
            params = replace(params, max_tokens=self.codec.settings.max_tokens)
        return self.codec.prompt(request), replace(request, params=params)

    def _read(self, prompt: list[int], events: Sequence[Event]) -> Completion:
        reading = _Reading(self.codec.reader(prompt))
        for event in events:
            reading.push(event)
        return reading.completion()


class _Reading:
    """Events of one answer, gathered."""

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self.ids: list[int] = []
        self.finish = FinishReason.STOP
        self.usage = Usage(0, 0)

    def push(self, event: Event) -> Delta:
        if event.error:
            raise FathomError(event.error)
        if event.token is not None:
            self.ids.append(event.token)
            return self.reader.push(event.token)
        self.finish, self.usage = event.finish or self.finish, event.usage or self.usage
        return self.reader.finish(self.finish)

    def completion(self) -> Completion:
        calls, finish = self.reader.tool_calls, self.finish
        if calls and finish is FinishReason.STOP:
            finish = FinishReason.TOOL_CALLS
        read = self.reader
        return Completion(
            text=read.text,
            thinking=read.thinking,
            tool_calls=calls,
            finish=finish,
            usage=self.usage,
            token_ids=tuple(self.ids),
        )
