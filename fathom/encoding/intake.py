"""The door for bodies: each becomes the exchange of its protocol."""

from __future__ import annotations

import sys
from dataclasses import replace

from fathom.encoding.body import parse
from fathom.encoding.completion import Completions
from fathom.encoding.conversing import Conversing
from fathom.encoding.desk import Desk
from fathom.encoding.exchange import Exchange
from fathom.errors import RequestError


def open_exchange(protocol: str, raw: bytes, desk: Desk, *, key: str = "") -> Exchange:
    """Understand a body; nothing is shared between requests of different keys. Raises RequestError, ContextError."""
    try:
        body = parse(raw)
        return Completions(body, desk, key) if protocol == "completions" else Conversing(protocol, body, desk, key)
    except RecursionError:
        raise RequestError(400, "Failed to deserialize the JSON body: it is nested too deeply") from None


def count_tokens(raw: bytes, desk: Desk, *, key: str = "") -> int:
    """Prompt tokens of a Messages body, which need not fit the context. Raises RequestError."""
    return len(open_exchange("messages", raw, replace(desk, context=sys.maxsize), key=key).prompt_ids)
