"""How a server behaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Times in seconds, sizes in bytes.

    keep_alive: between signs of life while nothing is to be said; start_timeout: from a request to its first token;
    max_requests: at once, the queue included; max_body: of a request; body_timeout: to receive it; cors: origins that
    a browser may ask from.
    """

    keep_alive: float = 10.0
    start_timeout: float = 600.0
    max_requests: int = 1024
    max_body: int = 64 << 20
    body_timeout: float = 60.0
    cors: tuple[str, ...] = ()
