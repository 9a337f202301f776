"""One request under way: events of the engine in, bytes of an answer out, and its end whatever happens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from fathom.api import Engine, Event, FinishReason, Ticket, Usage
from fathom.encoding.exchange import Exchange
from fathom.errors import RequestError
from fathom.server.books import Account
from fathom.server.refusal import as_request_error, error_body, place
from fathom.server.settings import ServerSettings
from fathom.server.sse import KEEP_ALIVE, Feed, Frame, frame_bytes

_log = logging.getLogger("fathom.server")


class Reply:
    """The answer to one exchange: `begin`, then `stream` or `whole`, and `leave` in any case."""

    def __init__(self, exchange: Exchange, settings: ServerSettings, identity: str, account: Account) -> None:
        self.exchange, self.settings, self.account, self._identity = exchange, settings, account, identity
        self.writer = exchange.writer(identity)
        self._feed = Feed()
        self._ticket: Ticket | None = None
        self._stopped: RequestError | None = None
        self._begun = time.monotonic()
        self._started = self._opened = False

    def begin(self, engine: Engine) -> None:
        """Give the request to the engine. Raises PromptError, ContextError."""
        try:
            self._ticket = engine.submit(self.exchange.generate(), self._feed.put)
        except BaseException:
            self.account.close(self.writer.usage, "refused")
            raise

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; comments while nothing is to be said; an error inside the stream if it cannot go on."""
        spoken = time.monotonic()
        try:
            async for events in self._batches():
                frames = await self._all_written(events)
                if frames or time.monotonic() - spoken >= self.settings.keep_alive / 2:
                    spoken = time.monotonic()
                    yield b"".join(map(frame_bytes, frames)) or KEEP_ALIVE
        except Exception as error:
            yield b"".join(map(frame_bytes, self.writer.error(self._failed(error))))
        finally:
            self.leave()

    async def whole(self) -> bytes:
        """The whole answer as one JSON body. Raises RequestError if it cannot go on."""
        try:
            async for events in self._batches():
                await self._all_written(events)
            return (await asyncio.to_thread(self.writer.body)).encode()
        except Exception as error:
            raise self._failed(error) from None
        finally:
            self.leave()

    async def patient(self, task: asyncio.Task[bytes]) -> AsyncIterator[bytes]:
        """Blank lines until the task, `whole`, is done, then its body; an error then comes as a body as well."""
        try:
            while not task.done():
                yield b"\n"
                await asyncio.wait([task], timeout=self.settings.keep_alive)
            try:
                yield task.result()
            except RequestError as error:
                yield error_body(self.exchange.protocol, error)
        finally:
            task.cancel()

    def stop(self, error: RequestError) -> None:
        """End it, telling the client this. In the event loop."""
        self._stopped = error
        self._feed.ring()

    def leave(self, reason: str = "cancelled") -> None:
        """However it ends: nothing goes on, and what was said so far is booked. Any number of times."""
        if self._ticket:
            self._ticket.cancel()
        self.account.close(self.writer.usage, reason)

    async def _batches(self) -> AsyncIterator[list[Event]]:
        """Events as they come, an empty list for each interval without any; ends after the last one."""
        while True:
            events = await self._feed.take(self.settings.keep_alive)
            self._started = self._started or bool(events)
            if not self._started and time.monotonic() - self._begun > self.settings.start_timeout:
                limit = f"no token came within {self.settings.start_timeout:.0f} s: the server is too busy"
                raise RequestError(503, limit, type="server_error", code="overloaded")
            if self._stopped:
                raise self._stopped
            if self._feed.overflown:
                raise RequestError(408, "the answer was read too slowly", type="server_error", code="slow_client")
            yield events
            if any(event.finish for event in events):
                return

    async def _all_written(self, events: list[Event]) -> list[Frame]:
        """The frames of a batch. Its end is booked before the client hears of it; what a budget paid for is shown."""
        frames = [frame for event in events for frame in await self._written(event)]
        said = sum(event.token is not None for event in events)
        broke = self.account.progress(self.writer.usage, said) if said else None
        if end := next((event.finish for event in events if event.finish), None):
            self.account.close(self.writer.usage, "stop" if self.writer.stopped else str(end))
        elif broke:
            self.stop(broke)
        return frames

    async def _written(self, event: Event) -> list[Frame]:
        """The event's frames. What comes after a stop string is not shown; the last event comes all the same."""
        if event.finish is FinishReason.ERROR:
            raise RequestError(500, event.error or "the engine failed", type="server_error", code="internal_error")
        frames = self._opening(event)
        if event.finish:
            # The end recounts a long thinking text: not in the loop.
            return frames + await asyncio.to_thread(self._ended, event)
        if event.token is not None and not self.writer.stopped:
            frames += self.writer.push(event)
        if self.writer.stopped and self._ticket:
            self._ticket.cancel()
        return frames

    def _opening(self, event: Event) -> list[Frame]:
        """What comes before the first token; the engine's first event says how much of the prompt it had."""
        if self._opened:
            return []
        self._opened = True
        usage = event.usage or Usage(len(self.exchange.prompt_ids), 0)
        return list(self.writer.start(usage.prompt_tokens, usage.cached_tokens))

    def _ended(self, event: Event) -> list[Frame]:
        frames = list(self.writer.finish(event))
        if event.finish is FinishReason.STOP:
            try:
                self.exchange.remember(self.writer)
            except Exception as error:  # who asked gets the answer all the same
                _log.error("%s could not be kept: %s", self._identity, place(error))
        return frames

    def _failed(self, error: Exception) -> RequestError:
        """What the client is told."""
        known = as_request_error(error, self._identity)
        self.leave(known.code or "error")
        return known
