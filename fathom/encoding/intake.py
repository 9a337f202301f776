"""The door for bodies: each becomes the exchange of its protocol."""

from __future__ import annotations

from dataclasses import replace

from fathom.encoding.body import parse
from fathom.encoding.completion import Completions
from fathom.encoding.conversing import Conversing
from fathom.encoding.desk import Desk
from fathom.encoding.exchange import Exchange
from fathom.errors import ContextError, RequestError

_COUNTED = 1 << 22
"""Tokens up to which a prompt is counted, whatever the context: each takes memory while it is."""


def open_exchange(protocol: str, raw: bytes, desk: Desk, *, key: str = "") -> Exchange:
    """Understand a body; nothing is shared between requests of different keys. Raises RequestError, ContextError."""
    try:
        body = parse(raw)
        return Completions(body, desk, key) if protocol == "completions" else Conversing(protocol, body, desk, key)
    except RecursionError:
        raise RequestError(400, "Failed to deserialize the JSON body: it is nested too deeply") from None


def count_tokens(raw: bytes, desk: Desk, *, key: str = "") -> int:
    """Prompt tokens of a Messages body, which need not fit the context. Raises RequestError."""
    most = max(_COUNTED, desk.context)
    try:
        return len(open_exchange("messages", raw, replace(desk, context=most), key=key).prompt_ids)
    except ContextError:
        raise RequestError(400, f"the prompt has more than {most} tokens, which are not counted: shorten it") from None
