"""The socket side of the server: connections that cost nothing for long, and an end that tells everybody why."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fathom.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a client may take, in seconds, and how much it may say, in bytes.

    head: to send a request's head, from its first byte or from the connection on; idle: between requests; unread: to
    read what waits for it; end: to finish when the server is asked to stop; most_head: of a head.
    """

    head: float = 30.0
    idle: int = 75
    unread: float = 60.0
    end: float = 20.0
    most_head: int = 65_536


class Listener(uvicorn.Server):
    """The server's loop. Ctrl-C or SIGTERM ends it: running answers may finish for a while, then are told why not."""

    def __init__(self, app: FastAPI, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self._app, self._ending, self.reason = app, 0, "the server is shutting down"
        self._loop: asyncio.AbstractEventLoop | None = None
        protocol: Any = functools.partial(Connection, patience=self.patience)
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            h11_max_incomplete_event_size=self.patience.most_head,
            timeout_keep_alive=self.patience.idle,
            timeout_graceful_shutdown=round(self.patience.end) + 5,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, let what runs finish, and after `patience.end` end it with a reason."""
        asyncio.get_running_loop().call_later(self.patience.end, self._hang_up)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Both signals end the loop; they are not raised again, so that the caller closes what it opened."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._loop = asyncio.get_running_loop()
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks, the second ends all answers at once, the third does not wait for who reads them."""
        if self._ending and self._loop:
            self._loop.call_soon_threadsafe(self._hang_up)
        self.force_exit = self._ending > 1
        self.should_exit = True
        self._ending += 1

    def _hang_up(self) -> None:
        self._app.state.hang_up(self.reason)


class Connection(H11Protocol):
    """A client's connection: cut when a request does not arrive, or an answer is not read, in time."""

    def __init__(self, *arguments: Any, patience: Patience, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._arrival = Deadline(self, patience.head)
        self._reading = Deadline(self, patience.unread)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client: its first request is due."""
        super().connection_made(transport)
        self._arrival.begin()

    def data_received(self, data: bytes) -> None:
        """Something of a request; a head that has begun is due."""
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:
            self._arrival.end()
        elif not self._arrival.running:
            self._arrival.begin()

    def on_response_complete(self) -> None:
        """The answer is handed to the system; what the client still sends, or has not read, is due."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._reading.begin()
        elif self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY:
            self._arrival.begin()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        super().pause_writing()
        self._reading.begin()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._reading.end()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._reading.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was sent away."""
        self._arrival.end()
        self._reading.end()
        super().connection_lost(exc)


class Deadline:
    """Cuts a connection after so many seconds, unless it ends before."""

    def __init__(self, connection: H11Protocol, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return self._timer is not None

    def begin(self) -> None:
        """From now on, and from the full time again."""
        self.end()
        connection = self._connection
        self._timer = connection.loop.call_later(self._seconds, connection.transport.abort)

    def end(self) -> None:
        """What was due has come."""
        if self._timer:
            self._timer.cancel()
        self._timer = None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError for a busy port or an address that is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, because asyncio sends small parts at once (TCP_NODELAY) only on sockets whose protocol it is told.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another with --port") from None
    return listening


def loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
