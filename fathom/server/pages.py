"""What a person or a machine looks at: the chat page, the state of the server, the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fathom.api import Engine
from fathom.encoding.desk import Desk
from fathom.errors import ConfigError, RequestError
from fathom.server.books import Books
from fathom.server.metrics import CONTENT_TYPE
from fathom.server.refusal import refusal

WEB = Path(__file__).parent / "web"

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

_POLICY = "; ".join(
    ("default-src 'self'", "img-src 'self' data:", "style-src 'self' 'unsafe-inline'", "frame-ancestors 'none'")
)
"""The page asks nobody but its own server, and nothing that it shows can run."""


def router(engine: Engine, desk: Desk, books: Books) -> APIRouter:
    """The routes; nothing of them is part of the API."""
    routes = APIRouter(include_in_schema=False)
    for file in sorted(WEB.iterdir()):
        served = _file(file)
        routes.add_api_route(f"/{file.name}", served, methods=["GET"])
        if file.name == "index.html":
            routes.add_api_route("/", served, methods=["GET"])

    @routes.get("/metrics")
    async def metrics() -> Response:
        waiting = books.meter.waiting if books.meter else 0
        return Response(books.metrics.text(waiting), media_type=CONTENT_TYPE)

    @routes.get("/status")
    async def status(request: Request) -> Response:
        try:
            key = books.identify(request.headers)
        except RequestError as error:
            return refusal("chat", error)
        return JSONResponse(_state(engine, desk, books) | {"ledger": books.ledger(key)})

    return routes


def _file(path: Path) -> Any:
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}

    async def served() -> Response:
        return Response(path.read_bytes(), media_type=_TYPES[path.suffix[1:]], headers=headers)

    return served


def _state(engine: Engine, desk: Desk, books: Books) -> dict[str, Any]:
    """What the page shows; prices are those of this moment, in USD per million tokens."""
    status, metrics, trouble = engine.status(), books.metrics, books.meter.trouble if books.meter else None
    return {
        "model": desk.served[-1],
        "context": desk.context,
        "price": _rates(books),
        "running": status.running,
        "waiting": status.waiting,
        "requests": metrics.requests,
        "hit_rate": metrics.hit_rate,
        "tokens_per_second": metrics.tokens_per_second,
        "tiers": dict(status.tiers),
        "restored": dict(status.restored),
        "notes": [*status.notes, *filter(None, [desk.replay.trouble]), *([f"ledger: {trouble}"] if trouble else [])],
    }


def _rates(books: Books) -> dict[str, Any] | None:
    """USD per million tokens now; None where the clock shows a time without a price."""
    now = books.clock()
    try:
        price = books.price(now)
    except ConfigError:
        return None
    factor = price.peak.factor if price.peak and price.peak.at(now) else 1
    rates = {"hit": price.miss if price.hit is None else price.hit, "miss": price.miss, "output": price.output}
    return {name: float(rate * factor) for name, rate in rates.items()} | {"as": books.bill_as}
