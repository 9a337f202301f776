"""The JSON of a request: read, and refused where nobody could read it. Reference api B.8."""

from __future__ import annotations

import json
import re
from typing import Any

from fathom.errors import RequestError

Body = dict[str, Any]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(raw: bytes) -> Body:
    """The JSON object of a request. Raises RequestError for anything else."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        if _SURROGATE.search(raw):
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(400, "Failed to deserialize the JSON body: half of a surrogate pair is no text") from None
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at place {error.start}"
        raise RequestError(400, f"Failed to deserialize the JSON body: it is not UTF-8 ({place})") from None
    except ValueError as error:
        raise RequestError(400, f"Failed to deserialize the JSON body: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "Failed to deserialize the JSON body: it must be an object")
    return body


def refuse_unsupported(body: Body) -> None:
    """Wishes that nobody here can grant. Raises RequestError, naming the field."""
    for name in ("n", "best_of"):
        if body.get(name, 1) != 1:
            raise RequestError(
                400, f"{name}={shown(body[name])} is not supported: ask once for each answer", param=name
            )
    if body.get("logit_bias"):
        raise RequestError(400, "logit_bias is not supported: leave it out", param="logit_bias")


def without_nulls(body: Body) -> Body:
    return {key: value for key, value in body.items() if value is not None}


def identity(holder: Body, key: str) -> str:
    """The id of a call, or of the call that a result belongs to."""
    value = holder.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RequestError(400, f"{key} must be a string, not {shown(value)}", param=key)
    return value


def shown(value: Any) -> str:
    """A wrong value, as JSON and not too long."""
    return json.dumps(value)[:60]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
