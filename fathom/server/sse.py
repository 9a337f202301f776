"""Between the engine's thread and the event loop, and from events to the bytes of a stream."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from fathom.api import Event

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which every client of server-sent events skips."""

MOST_EVENTS = 20_000
"""Events that may wait for a client that reads slowly; then its request ends."""


class Frame(Protocol):
    """One event of a stream: its payload, and its name where the dialect has names."""

    @property
    def data(self) -> str: ...

    @property
    def event(self) -> str | None: ...


def frame_bytes(frame: Frame) -> bytes:
    """The frame as it goes over the wire; payloads are single lines of JSON or `[DONE]`."""
    name = f"event: {frame.event}\n" if frame.event else ""
    return f"{name}data: {frame.data}\n\n".encode()


class Feed:
    """A request's events: put by the engine's thread, taken by the event loop in batches, at most `limit` waiting."""

    def __init__(self, limit: int = MOST_EVENTS) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[Event] = deque()
        self._limit, self._told, self._rung = limit, False, False
        self.overflown = False

    def put(self, event: Event) -> None:
        """From the engine's thread. Wakes the loop once a batch, however many events come meanwhile."""
        if len(self._events) >= self._limit and not event.finish:
            self.overflown = True
            return
        self._events.append(event)
        if not self._told:
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop has ended before the request
                self._events.clear()

    def ring(self) -> None:
        """Wake whoever waits, from the event loop, with no event or whatever has come."""
        self._rung = True
        self._ready.set()

    async def take(self, seconds: float) -> list[Event]:
        """All events that have come, waiting for the first one at most so long; empty if none did."""
        try:
            await asyncio.wait_for(self._ready.wait(), seconds)
        except TimeoutError:
            return []
        self._ready.clear()
        self._told = False
        taken = list(self._events)
        for _ in taken:
            self._events.popleft()
        return taken if taken or self._rung else await self.take(seconds)
