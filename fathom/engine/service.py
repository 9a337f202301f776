"""The engine behind `api.Engine`: a thread that steps, and callers on any other."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

from fathom.api import Event, FinishReason, GenerateRequest, SamplingParams, Status, Usage
from fathom.engine.engine import Core
from fathom.engine.request import Sequence as Running

_PAUSE = 0.005  # seconds, when all that waits needs memory that others hold


class _Ticket:
    """A request on its way; `running` once the engine's thread has taken it."""

    def __init__(self, service: Service, request: GenerateRequest, sink: Callable[[Event], None]) -> None:
        self.service, self.request, self.sink = service, request, sink
        self.running: Running | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """End it within one step."""
        if not self.cancelled:
            self.cancelled = True
            self.service._post(self)


class Service:
    """A core on a thread of its own."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._news: deque[_Ticket] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fathom-engine", daemon=True)
        self._thread.start()
        atexit.register(_close, weakref.ref(self))

    @property
    def context(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.core.context

    def submit(self, request: GenerateRequest, sink: Callable[[Event], None]) -> _Ticket:
        """Begin a request. Raises PromptError, ContextError."""
        self.core.check(request)
        ticket = _Ticket(self, request, sink)
        self._post(ticket)
        return ticket

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        """Events of one request as they come; leaving the iterator early cancels it. Raises as `submit`."""
        events: SimpleQueue[Event] = SimpleQueue()
        ticket = self.submit(GenerateRequest(prompt_ids=prompt_ids, params=params), events.put)
        return _listen(ticket, events)

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        """All requests, side by side. Raises as `submit`, before any of them begins."""
        asked = [GenerateRequest(prompt_ids=ids, params=params) for ids, params in requests]
        for request in asked:
            self.core.check(request)
        queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in asked]
        tickets = [self.submit(request, queue.put) for request, queue in zip(asked, queues, strict=True)]
        return [list(_listen(ticket, queue)) for ticket, queue in zip(tickets, queues, strict=True)]

    def status(self) -> Status:
        """What it is doing now."""
        return self.core.status()

    def close(self) -> None:
        """End what runs, save the cache, stop. Any number of times."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _post(self, ticket: _Ticket) -> None:
        with self._wake:
            if not self._closing:
                self._news.append(ticket)
                self._wake.notify()
                return
        if ticket.running is None and not ticket.cancelled:
            ticket.sink(Event(finish=FinishReason.CANCELLED, usage=Usage(len(ticket.request.prompt_ids), 0)))

    def _run(self) -> None:
        idle = True
        while self._listen(idle):
            idle = not self.core.step()
            if idle and self.core.scheduler.waiting:
                idle = False
                threading.Event().wait(_PAUSE)
        for ticket in self._news:
            self._take(ticket)
        self.core.close()

    def _listen(self, idle: bool) -> bool:
        """Take what came in, waiting for it when there is nothing else to do; False when it is time to stop."""
        with self._wake:
            while idle and not self._news and not self._closing:
                self._wake.wait()
            if self._closing:
                return False
            news, self._news = self._news, deque()
        for ticket in news:
            self._take(ticket)
        return True

    def _take(self, ticket: _Ticket) -> None:
        if ticket.running is None:
            ticket.running = self.core.add(ticket.request, ticket.sink)
        elif ticket.cancelled:
            self.core.cancel(ticket.running)


def _listen(ticket: _Ticket, events: SimpleQueue[Event]) -> Iterator[Event]:
    try:
        while True:
            event = events.get()
            yield event
            if event.finish:
                return
    finally:
        ticket.cancel()


def _close(service: weakref.ref[Service]) -> None:
    """At the program's end: a thread inside the model must not meet an interpreter that is gone."""
    if found := service():
        found.close()
