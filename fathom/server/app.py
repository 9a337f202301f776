"""The HTTP server: every endpoint under every base path that a client may have been given. Reference api B.1, B.6, B.8.

A body goes as bytes to an `Exchange`, its prompt to the engine, the engine's events back through the exchange's writer.
What a protocol looks like is not known here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from fathom.api import Engine
from fathom.encoding.desk import Desk
from fathom.encoding.exchange import Exchange
from fathom.encoding.intake import count_tokens, open_exchange
from fathom.errors import RequestError
from fathom.server.books import Books
from fathom.server.metrics import Metrics
from fathom.server.openapi import bodies
from fathom.server.pages import router
from fathom.server.prices import PriceBook
from fathom.server.refusal import busy, fault, not_served, refusal, too_large
from fathom.server.reply import Reply
from fathom.server.settings import ServerSettings

T = TypeVar("T")

PREFIXES = ("", "/v1", "/beta", "/anthropic", "/anthropic/v1")

PROTOCOLS = {
    "/chat/completions": "chat",
    "/completions": "completions",
    "/responses": "responses",
    "/messages": "messages",
}

_LARGE = 4_000
"""From so many bytes on, a few milliseconds' work, a body is opened in a thread, so that the loop goes on."""

_GONE = 499
"""The status of an answer that nobody waits for any more; it is only logged."""


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
            route = server.answering(protocol)
            extra = {"requestBody": described[protocol]}
            app.add_api_route(prefix + path, route, methods=["POST"], include_in_schema=shown, openapi_extra=extra)
        app.add_api_route(
            f"{prefix}/messages/count_tokens",
            server.guarded("messages", server.count_tokens),
            methods=["POST"],
            include_in_schema=shown,
            openapi_extra={"requestBody": described["count_tokens"]},
        )
        app.add_api_route(
            f"{prefix}/models", server.guarded("chat", server.models), methods=["GET"], include_in_schema=shown
        )
        named = server.guarded("chat", server.model)
        app.add_api_route(f"{prefix}/models/{{name}}", named, methods=["GET"], include_in_schema=False)
    app.add_api_route("/user/balance", server.guarded("chat", server.balance), methods=["GET"])
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/ready", server.guarded("chat", server.ready), methods=["GET"])
    app.add_exception_handler(404, not_served)
    app.add_exception_handler(405, not_served)
    app.add_exception_handler(Exception, fault)
    app.state.hang_up = server.hang_up
    return app


class Server:
    """The endpoints."""

    def __init__(self, engine: Engine, desk: Desk, settings: ServerSettings, books: Books) -> None:
        self.engine, self.desk, self.settings, self.books = engine, desk, settings, books
        self._replies: set[Reply] = set()

    def hang_up(self, reason: str) -> None:
        """End every answer, telling its client why."""
        for reply in list(self._replies):
            reply.stop(RequestError(503, reason, type="server_error", code="shutting_down", retry_after=5))

    def answering(self, protocol: str) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint that generates, in one protocol."""

        async def generate(request: Request) -> Response:
            return await self.generate(request, protocol)

        return self.guarded(protocol, generate)

    def guarded(
        self, protocol: str, work: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """`work`, its refusals and faults as the protocol's error bodies; every answer carries the request's id."""

        async def endpoint(request: Request) -> Response:
            identity = request.state.identity = _identity(protocol)
            try:
                answer = await work(request)
            except ClientDisconnect:
                answer = Response(status_code=_GONE)
            except Exception as error:
                answer = refusal(protocol, error, identity)
                self.books.metrics.refused(answer.status_code)
            answer.headers.update({"x-request-id": identity, "request-id": identity})
            return answer

        return endpoint

    async def generate(self, request: Request, protocol: str) -> Response:
        """Open the exchange, begin the request, answer as a stream or as one body."""
        key = self.books.identify(request.headers)
        self._admit(protocol)
        body = await self._body(request)
        exchange = await self._opened(protocol, body, key.id if key else "")
        self._admit(protocol)
        identity = request.state.identity
        account = self.books.open(key, identity, protocol, exchange.model)
        reply = Reply(exchange, self.settings, identity, account)
        reply.begin(self.engine)
        self._replies.add(reply)
        if exchange.stream:
            return _Parts(reply.stream(), "text/event-stream", lambda: self._left(reply))
        return await self._whole(reply, request)

    def _admit(self, protocol: str) -> None:
        if len(self._replies) >= self.settings.max_requests:
            raise busy(protocol, len(self._replies))

    def _left(self, reply: Reply) -> None:
        reply.leave()
        self._replies.discard(reply)

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a Messages prompt has."""
        key = self.books.identify(request.headers)
        body = await self._body(request)
        count = await _worked(len(body), count_tokens, body, self.desk, key=key.id if key else "")
        return JSONResponse({"input_tokens": count})

    async def models(self, _: Request) -> Response:
        """The names that are served, in a form that both SDKs read."""
        items = [_shown(name) for name in self.desk.served]
        return JSONResponse({"object": "list", "data": items, "has_more": False})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        if name not in self.desk.served:
            known = " or ".join(self.desk.served)
            raise RequestError(404, f"model '{name}' is not served: use {known}", code="model_not_found")
        return JSONResponse(_shown(name))

    async def balance(self, request: Request) -> Response:
        """Money left."""
        return JSONResponse(self.books.balance(self.books.identify(request.headers)))

    async def health(self) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Requests are answered; `notes` is what the user should know."""
        status, meter = self.engine.status(), self.books.meter
        notes = [*status.notes, *filter(None, [self.desk.replay.trouble])]
        body: dict[str, object] = {"status": "ready", "running": status.running, "notes": notes}
        if meter:
            body["ledger"] = {"waiting": meter.waiting, "trouble": meter.trouble}
        full = meter is not None and meter.full
        return JSONResponse(body | ({"status": "full"} if full else {}), 503 if full else 200)

    async def _whole(self, reply: Reply, request: Request) -> Response:
        """One JSON body. If it takes long, the answer begins with blank lines, so that no proxy gives up."""
        task = asyncio.create_task(reply.whole())
        task.add_done_callback(lambda _: self._left(reply))
        try:
            here = await _stays(request, task, self.settings.keep_alive)
        except BaseException:
            task.cancel()
            raise
        if not here:
            task.cancel()
            return Response(status_code=_GONE)
        if not task.done():
            return _Parts(reply.patient(task), "application/json", task.cancel)
        return Response(task.result(), media_type="application/json")

    async def _opened(self, protocol: str, body: bytes, key: str) -> Exchange:
        return await _worked(len(body), open_exchange, protocol, body, self.desk, key=key)

    async def _body(self, request: Request) -> bytes:
        most, parts, size = self.settings.max_body, [], 0
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large(most)
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                async for part in request.stream():
                    parts.append(part)
                    if (size := size + len(part)) > most:
                        raise too_large(most)
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {self.settings.body_timeout:.0f} s") from None
        return b"".join(parts)


class _Parts(StreamingResponse):
    """An answer in parts. `left` is called at its end, even if the client went before the first part was asked for."""

    def __init__(self, parts: AsyncIterator[bytes], media_type: str, left: Callable[[], object]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(parts, media_type=media_type, headers=headers)
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


async def _worked(size: int, work: Callable[..., T], *arguments: object, **options: object) -> T:
    """The result of `work` on a body of `size` bytes."""
    if size < _LARGE:
        return work(*arguments, **options)
    return await asyncio.to_thread(work, *arguments, **options)


async def _stays(request: Request, task: asyncio.Task[bytes], seconds: float) -> bool:
    """Wait for the task, but not longer than that; False as soon as the client has gone."""
    end = asyncio.get_running_loop().time() + seconds
    while not task.done() and (left := end - asyncio.get_running_loop().time()) > 0:
        await asyncio.wait([task], timeout=min(left, 0.25))
        if not task.done() and await request.is_disconnected():
            return False
    return True


def _shown(name: str) -> dict[str, str]:
    return {"id": name, "object": "model", "owned_by": "fathom", "type": "model", "display_name": name}


def _identity(protocol: str) -> str:
    """An id as the protocol's own look."""
    unique = uuid.uuid4()
    return {"messages": f"msg_{unique.hex}", "responses": f"resp_{unique.hex}"}.get(protocol, str(unique))
