"""The events of a request as an iterator, over any `submit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

from fathom.api import Event, GenerateRequest, SamplingParams, Ticket

Sink = Callable[[Event], None]


class Stream(Iterator[Event]):
    """Begins a request at once and gives its events as they come. Whoever leaves early, or forgets it, cancels it."""

    def __init__(self, submit: Callable[[GenerateRequest, Sink], Ticket], request: GenerateRequest) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._ticket: Ticket | None = None
        self._ticket = submit(request, self._events.put)

    def __next__(self) -> Event:
        if self._ticket is None:
            raise StopIteration
        try:
            event = self._events.get()
        except BaseException:  # Ctrl-C while waiting
            self.close()
            raise
        if event.finish:
            self._ticket = None
        return event

    def close(self) -> None:
        """No more events; the request ends if it has not."""
        if self._ticket:
            self._ticket.cancel()
        self._ticket = None

    def __del__(self) -> None:
        self.close()


class Blocking:
    """`generate` and `generate_batch` of `api.Engine`, made of its `submit`."""

    def submit(self, request: GenerateRequest, sink: Sink) -> Ticket:
        """Begin a request."""
        raise NotImplementedError

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        """Events of one request as they come. Raises as `submit`, at once; closing the iterator cancels."""
        return Stream(self.submit, GenerateRequest(prompt_ids=prompt_ids, params=params))

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        """All events of many requests, computed side by side. Raises as `submit`; then none of them goes on."""
        return [list(stream) for stream in [self.generate(ids, params) for ids, params in requests]]
