"""The HTTP server: every endpoint under every base path that a client may have been given. Reference api B.1, B.6, B.8.

A body goes as bytes to an `Exchange`, its prompt to the engine, the engine's events back through the exchange's writer.
What a protocol looks like is not known here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse

from fathom.api import Engine
from fathom.encoding.exchange import Desk, Exchange
from fathom.errors import ContextError, FathomError, RequestError
from fathom.server.books import Books
from fathom.server.metrics import Metrics
from fathom.server.openapi import bodies
from fathom.server.pages import router
from fathom.server.prices import PriceBook
from fathom.server.reply import Reply

PREFIXES = ("", "/v1", "/beta", "/anthropic", "/anthropic/v1")

PROTOCOLS = {
    "/chat/completions": "chat",
    "/completions": "completions",
    "/responses": "responses",
    "/messages": "messages",
}

_LARGE = 50_000
"""From so many bytes on a body is opened in a thread, so that the loop goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server behaves; times in seconds, sizes in bytes.

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


def create_app(
    engine: Engine, desk: Desk, *, settings: ServerSettings | None = None, books: Books | None = None
) -> FastAPI:
    """The application over one engine and one prompt format; without books nothing is asked for or kept."""
    app = FastAPI(title="Fathom", version="1", docs_url=None, redoc_url=None)
    settings = settings or ServerSettings()
    books = books or Books(Metrics(engine.status), PriceBook.load(), "deepseek-v4-flash")
    server = Server(engine, desk, settings, books)
    app.include_router(router(engine, desk, books))
    if settings.cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["*"], allow_headers=["*"])
    described = bodies(desk.served)
    for prefix in PREFIXES:
        shown = prefix == "/v1"
        for path, protocol in PROTOCOLS.items():
            route = server.answering(protocol, beta=prefix == "/beta")
            extra = {"requestBody": described[protocol]}
            app.add_api_route(prefix + path, route, methods=["POST"], include_in_schema=shown, openapi_extra=extra)
        app.add_api_route(
            f"{prefix}/messages/count_tokens",
            server.guarded("messages", server.count_tokens),
            methods=["POST"],
            include_in_schema=shown,
            openapi_extra={"requestBody": described["count_tokens"]},
        )
        app.add_api_route(f"{prefix}/models", server.models, methods=["GET"], include_in_schema=shown)
    app.add_api_route("/user/balance", server.guarded("chat", server.balance), methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/ready", server.ready, methods=["GET"])
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_found)
    return app


class Server:
    """The endpoints."""

    def __init__(self, engine: Engine, desk: Desk, settings: ServerSettings, books: Books) -> None:
        self.engine, self.desk, self.settings, self.books = engine, desk, settings, books
        self.open = 0

    def answering(self, protocol: str, beta: bool) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint that generates, in one protocol."""

        async def generate(request: Request) -> Response:
            return await self.generate(request, protocol, beta)

        return self.guarded(protocol, generate)

    def guarded(
        self, protocol: str, work: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """`work`, its refusals as the protocol's error bodies."""

        async def endpoint(request: Request) -> Response:
            try:
                return await work(request)
            except FathomError as error:
                answer = refusal(protocol, error)
                self.books.metrics.refused(answer.status_code)
                return answer

        return endpoint

    async def generate(self, request: Request, protocol: str, beta: bool) -> Response:
        """Open the exchange, begin the request, answer as a stream or as one body."""
        key = self.books.identify(request.headers)
        body = await self._body(request)
        exchange = await self._opened(protocol, body, beta, key.id if key else "")
        if self.open >= self.settings.max_requests:
            raise _busy(protocol, self.open)
        identity = _identity(protocol)
        account = self.books.open(key, identity, protocol, exchange.model)
        reply = Reply(exchange, self.settings, identity, account)
        reply.begin(self.engine)
        self.open += 1
        if exchange.stream:
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(self._counted(reply.stream()), media_type="text/event-stream", headers=headers)
        return await self._whole(reply, request)

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a Messages prompt has."""
        key = self.books.identify(request.headers)
        exchange = await self._opened("messages", await self._body(request), False, key.id if key else "")
        return JSONResponse({"input_tokens": len(exchange.prompt_ids)})

    async def models(self) -> Response:
        """The names that are served, in a form that both SDKs read."""
        items = [
            {"id": name, "object": "model", "owned_by": "fathom", "type": "model", "display_name": name}
            for name in self.desk.served
        ]
        return JSONResponse({"object": "list", "data": items, "has_more": False})

    async def balance(self, request: Request) -> Response:
        """Money left."""
        return JSONResponse(self.books.balance(self.books.identify(request.headers)))

    async def health(self) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Requests are answered; `notes` is what the user should know."""
        status, meter = self.engine.status(), self.books.meter
        body: dict[str, object] = {"status": "ready", "running": status.running, "notes": status.notes}
        if meter:
            body["ledger"] = {"waiting": meter.waiting, "trouble": meter.trouble}
        full = meter is not None and meter.full
        return JSONResponse(body | ({"status": "full"} if full else {}), 503 if full else 200)

    async def _whole(self, reply: Reply, request: Request) -> Response:
        """One JSON body. If it takes long, the answer begins with blank lines, so that no proxy gives up."""
        task = asyncio.create_task(reply.whole())
        try:
            done = await _finished(task, self.settings.keep_alive, request)
        except asyncio.CancelledError:
            task.cancel()
            self.open -= 1
            raise
        if not done:
            patient = self._counted(reply.patient(task))
            return StreamingResponse(patient, media_type="application/json")
        self.open -= 1
        return Response(task.result(), media_type="application/json")

    async def _counted(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield part
        finally:
            self.open -= 1

    async def _opened(self, protocol: str, body: bytes, beta: bool, key: str) -> Exchange:
        if len(body) < _LARGE:
            return Exchange.open(protocol, body, self.desk, beta=beta, key=key)
        return await asyncio.to_thread(Exchange.open, protocol, body, self.desk, beta=beta, key=key)

    async def _body(self, request: Request) -> bytes:
        most, parts, size = self.settings.max_body, [], 0
        if int(request.headers.get("content-length") or 0) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for part in request.stream():
                    parts.append(part)
                    if (size := size + len(part)) > most:
                        raise _too_large(most)
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {self.settings.body_timeout:.0f} s") from None
        return b"".join(parts)


async def _finished(task: asyncio.Task[bytes], seconds: float, request: Request) -> bool:
    """Wait for the task, but not longer than that; gives up, and cancels it, when the client has gone."""
    end = asyncio.get_running_loop().time() + seconds
    while not task.done() and asyncio.get_running_loop().time() < end:
        await asyncio.wait([task], timeout=0.25)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            raise asyncio.CancelledError
    return task.done()


def refusal(protocol: str, error: FathomError) -> Response:
    """An error as the body that the protocol's clients expect. Reference api B.8."""
    known = error if isinstance(error, RequestError) else _as_request_error(error)
    inner = {"message": known.message, "type": known.type, "param": known.param, "code": known.code}
    body = {"error": inner} | ({"type": "error"} if protocol == "messages" else {})
    headers = {"retry-after": str(known.retry_after)} if known.retry_after else {}
    return JSONResponse(body, known.status, headers)


def _as_request_error(error: FathomError) -> RequestError:
    code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_request_error"
    return RequestError(400, str(error), code=code)


def _busy(protocol: str, count: int) -> RequestError:
    message = f"{count} requests are running or waiting, as many as this server takes: try again later"
    if protocol == "messages":
        return RequestError(529, message, type="overloaded_error", code="overloaded", retry_after=2)
    return RequestError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after=2)


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"the body has more than {most} bytes: send less", type="request_too_large")


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    known = ", ".join(f"/v1{path}" for path in PROTOCOLS)
    text = f"{request.method} {request.url.path} is not served: use POST {known} or GET /v1/models"
    protocol = "messages" if "messages" in request.url.path else "chat"
    return refusal(protocol, RequestError(status, text, code="not_found"))


def _identity(protocol: str) -> str:
    """An id as the protocol's own look."""
    unique = uuid.uuid4()
    return {"messages": f"msg_{unique.hex}", "responses": f"resp_{unique.hex}"}.get(protocol, str(unique))
