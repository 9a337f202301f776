"""What is said when a request is refused or cannot go on. Reference api B.8, D.1."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path

from fastapi import Request, Response

from fathom.errors import ContextError, FathomError, RequestError

_log = logging.getLogger("fathom.server")


def refusal(protocol: str, error: Exception, identity: str = "") -> Response:
    """An error as the response that the protocol's clients expect; `identity` is the request's, for the log."""
    known = as_request_error(error, identity)
    headers = {"retry-after": str(known.retry_after)} if known.retry_after else {}
    return Response(error_body(protocol, known), known.status, headers, media_type="application/json")


def error_body(protocol: str, error: RequestError) -> bytes:
    """The JSON of an error; Messages marks it as its own clients know it."""
    return json.dumps({"error": error.body()} | ({"type": "error"} if protocol == "messages" else {})).encode()


def as_request_error(error: Exception, identity: str = "") -> RequestError:
    """Any error as one of HTTP; what is no user's error is the server's fault, of which the log has the place."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, FathomError):
        code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_request_error"
        return RequestError(400, str(error), code=code)
    _log.error("%s: %s", identity or "a request", place(error))
    message = f"the server made an error: see its log{f' for {identity}' if identity else ''}"
    return RequestError(500, message, type="server_error", code="internal_error")


def place(error: BaseException) -> str:
    """What an error is and where it came from, innermost first. Its own text may quote a prompt, and is left out."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    shown = " < ".join(f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{type(error).__name__} in {shown}{f', after {place(cause)}' if cause else ''}"


def busy(protocol: str, count: int) -> RequestError:
    """Too many at once."""
    message = f"{count} requests are running or waiting, as many as this server takes: try again later"
    if protocol == "messages":
        return RequestError(529, message, type="overloaded_error", code="overloaded", retry_after=2)
    return RequestError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after=2)


def too_large(most: int) -> RequestError:
    """A body over the limit."""
    return RequestError(413, f"the body has more than {most} bytes: send less", type="request_too_large")


def protocol_of(request: Request) -> str:
    """Whose shape an error takes where no endpoint is responsible."""
    return "messages" if "messages" in request.url.path or "/anthropic" in request.url.path else "chat"


async def not_served(request: Request, error: Exception) -> Response:
    """A path or method that does not exist."""
    status = getattr(error, "status_code", 404)
    known = "/v1/chat/completions, /v1/completions, /v1/responses, /v1/messages"
    text = f"{request.method} {request.url.path} is not served: use POST {known} or GET /v1/models"
    return refusal(protocol_of(request), RequestError(status, text, code="not_found"))


async def fault(request: Request, error: Exception) -> Response:
    """A page that failed; the connection ends, and the client is told so."""
    body = error_body(protocol_of(request), as_request_error(error))
    return Response(body, 500, {"connection": "close"}, media_type="application/json")
