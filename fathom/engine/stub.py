"""An engine that says what it is told to, for tests of everything in front of one. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile

from fathom.api import Event, FinishReason, GenerateRequest, Logprob, Status, Usage
from fathom.engine.request import PAGE
from fathom.engine.stream import Blocking, Sink
from fathom.errors import ContextError, PromptError


@dataclass(frozen=True, slots=True)
class Script:
    """What to say, and how it ends when nothing else ends it; error: the line that comes with `FinishReason.ERROR`."""

    ids: Sequence[int]
    finish: FinishReason = FinishReason.STOP
    error: str | None = None


Line = Sequence[int] | Script | Callable[[Sequence[int]], "Sequence[int] | Script"]
"""Token ids, or a script, or either as a function of the prompt's ids."""


class ScriptedEngine(Blocking):
    """An `api.Engine` that answers its requests with `scripts` in turn, and with the last one from then on.

    Obeys max_tokens, the context, stop_ids and cancellation as the real one does; counts cached tokens as if everything
    was kept that it ever saw in a namespace; ignores guides. A thread of its own says each answer.

    delay: seconds before each token; gate: nothing is said until it is set; requests: all that were begun, in order.
    """

    def __init__(
        self,
        scripts: Sequence[Line],
        context: int = 1_048_576,
        *,
        delay: float = 0.0,
        gate: threading.Event | None = None,
    ) -> None:
        self.context, self.requests = context, list[GenerateRequest]()
        self._scripts, self._delay, self._gate = list(scripts), delay, gate
        self._seen: list[tuple[str, list[int]]] = []
        self._live: list[_Answer] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, request: GenerateRequest, sink: Sink) -> _Answer:
        """Begin a request. Raises PromptError, ContextError."""
        ids = list(request.prompt_ids)
        if not ids:
            raise PromptError("the prompt is empty: it needs at least one token")
        if len(ids) >= self.context:
            limit = f"the prompt has {len(ids)} tokens, but the context holds {self.context} with the answer"
            raise ContextError(f"{limit}: shorten it")
        with self._lock:
            line = self._scripts[min(len(self.requests), len(self._scripts) - 1)]
            self.requests.append(request)
            answer = _Answer(self, request, self._cached(request.namespace, ids), sink)
            self._live.append(answer)
            if self._closed:
                answer.cancel()
        said = line(ids) if callable(line) else line
        answer.begin(said if isinstance(said, Script) else Script(said))
        return answer

    def status(self) -> Status:
        """Answers behind the gate wait, others run."""
        with self._lock:
            waiting = sum(not answer.begun for answer in self._live)
            return Status(waiting=waiting, running=len(self._live) - waiting)

    def close(self) -> None:
        """End every answer."""
        with self._lock:
            self._closed, live = True, list(self._live)
        for answer in live:
            answer.cancel()
            answer.join()

    def _cached(self, namespace: str, ids: Sequence[int]) -> int:
        """Tokens in whole blocks, below the last one, with which something known begins as well."""
        known = max((_common(ids, seen) for name, seen in self._seen if name == namespace), default=0)
        return min(known, len(ids) - 1) // PAGE * PAGE

    def _ended(self, answer: _Answer, ids: list[int]) -> None:
        with self._lock:
            self._seen.append((answer.request.namespace, ids))
            self._live.remove(answer)


class _Answer:
    """One request under way, and its `api.Ticket`."""

    def __init__(self, engine: ScriptedEngine, request: GenerateRequest, cached: int, sink: Sink) -> None:
        self.request, self.begun = request, False
        self._engine, self._cached, self._sink = engine, cached, sink
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._say, name="fathom-stub", daemon=True)

    def begin(self, script: Script) -> None:
        """Say it."""
        self._script = script
        self._thread.start()

    def cancel(self) -> None:
        """End it before the next token."""
        self._cancelled.set()

    def join(self) -> None:
        """Wait for its end."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _say(self) -> None:
        while self._engine._gate and not self._engine._gate.wait(0.01) and not self._cancelled.is_set():
            pass
        self.begun = True
        ids = list(self.request.prompt_ids)
        reason = self._tokens(ids)
        usage = Usage(len(self.request.prompt_ids), len(ids) - len(self.request.prompt_ids), self._cached)
        self._engine._ended(self, ids)
        error = self._script.error if reason is FinishReason.ERROR else None
        self._tell(Event(finish=reason, usage=usage, error=error))

    def _tokens(self, ids: list[int]) -> FinishReason:
        """Tell the tokens, adding them to `ids`; the reason why they ended."""
        params, room = self.request.params, self._engine.context - len(ids)
        end = len(ids) + min(room, params.max_tokens or room)
        for token in self._script.ids:
            if self._cancelled.wait(self._engine._delay) if self._engine._delay else self._cancelled.is_set():
                return FinishReason.CANCELLED
            if token in params.stop_ids:
                return FinishReason.STOP
            ids.append(token)
            self._tell(Event(token=token, logprob=_logprob(token, params.logprobs), usage=self._first(ids)))
            if len(ids) == end:
                return FinishReason.LENGTH
        return FinishReason.CANCELLED if self._cancelled.is_set() else self._script.finish

    def _first(self, ids: list[int]) -> Usage | None:
        """The usage, which comes with the first token."""
        prompt = len(self.request.prompt_ids)
        return Usage(prompt, 1, self._cached) if len(ids) == prompt + 1 else None

    def _tell(self, event: Event) -> None:
        with suppress(RuntimeError):  # the listener's event loop may be gone before the answer is
            self._sink(event)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _logprob(token: int, alternatives: int | None) -> Logprob | None:
    """A token of probability one half, the ids after it with ever half of the one before."""
    if alternatives is None:
        return None
    return Logprob(-0.6931471805599453, tuple(_halves(token, alternatives)))


def _halves(token: int, count: int) -> Iterator[tuple[int, float]]:
    for n in range(count):
        yield token + n, -0.6931471805599453 * (n + 1)
