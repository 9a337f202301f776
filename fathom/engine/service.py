"""The engine behind `api.Engine`: a thread that steps, and callers on any other."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import replace

from fathom.api import Event, FinishReason, GenerateRequest, Status, Usage
from fathom.engine.engine import Core
from fathom.engine.request import Sequence
from fathom.engine.stream import Blocking, Sink

_LAST = 20.0
"""Seconds that a thread has to end when a rank was lost: where torch sums, its GPU waits for that for ever."""
_PAUSE = 0.005  # seconds, when all that waits needs memory that others hold


class Service(Blocking):
    """A core on a thread of its own. It ends with `close`, with the program, or when nobody holds it any more."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._worker = _Worker(core)
        self._stop = weakref.finalize(self, self._worker.stop)

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.core.context

    def submit(self, request: GenerateRequest, sink: Sink) -> _Ticket:
        """Begin a request. Raises PromptError, ContextError. Of a closed service it is cancelled at once."""
        self.core.check(request)
        ticket = _Ticket(self, request, sink)
        if not self._worker.post(ticket):
            sink(Event(finish=FinishReason.CANCELLED, usage=Usage(len(request.prompt_ids), 0)))
        return ticket

    def status(self) -> Status:
        """What it is doing now."""
        status = self.core.status()
        return replace(status, waiting=status.waiting + self._worker.untaken)

    def close(self) -> None:
        """End what runs, save the cache, stop. Any number of times."""
        self._stop()


class _Ticket:
    """A request on its way; `sequence` once the engine's thread has taken it."""

    def __init__(self, service: Service, request: GenerateRequest, sink: Sink) -> None:
        self.request, self.sink, self.cancelled = request, sink, False
        self.sequence: Sequence | None = None
        self._service = service

    def cancel(self) -> None:
        """End it within one step."""
        if not self.cancelled:
            self.cancelled = True
            self._service._worker.post(self)


class _Worker:
    """The thread. It does not hold the service, nor a ticket that it has taken, so that a service can be forgotten."""

    def __init__(self, core: Core) -> None:
        self._core, self._closing = core, False
        self._news: deque[_Ticket] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fathom-engine", daemon=True)
        self._thread.start()

    @property
    def untaken(self) -> int:
        """Requests that the core does not know yet."""
        with self._wake:
            return sum(ticket.sequence is None for ticket in self._news)

    def post(self, ticket: _Ticket) -> bool:
        """A ticket is new, or cancelled. False when nobody will look at it."""
        with self._wake:
            if not self._closing:
                self._news.append(ticket)
                self._wake.notify()
            return not self._closing

    def stop(self) -> None:
        """End everything, and wait for it."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        while threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(_LAST)
            if self._core.lost:
                return

    def _run(self) -> None:
        patience: float | None = None
        try:
            while self._listen(patience):
                patience = 0.0 if self._core.step() else _PAUSE if self._core.scheduler.waiting else None
        finally:
            with self._wake:
                self._closing = True
            self._take_all()
            self._core.close()

    def _listen(self, patience: float | None) -> bool:
        """Take what came in, waiting so many seconds for it (None: for ever); False when it is time to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._news or self._closing, patience)
        if not self._closing:
            self._take_all()
        return not self._closing

    def _take_all(self) -> None:
        with self._wake:
            news, self._news = self._news, deque()
        for ticket in news:
            if ticket.sequence is None:
                ticket.sequence = self._core.add(ticket.request, ticket.sink)
            if ticket.cancelled:
                self._core.cancel(ticket.sequence)
