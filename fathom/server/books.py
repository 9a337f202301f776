"""Who asks, what it costs, and what is counted: keys, meter, prices and metrics behind one door.

Everything is optional but the counting: without a database there are no keys, no ledger and no bill.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from fathom.errors import ConfigError, RequestError
from fathom.server.keys import Gate, Key, Keyring, used_up
from fathom.server.metering import Meter, Row, Totals
from fathom.server.metrics import Metrics
from fathom.server.prices import Price, PriceBook, Tokens

_BEARER = re.compile(r"\s*bearer(?:\s|$)", re.IGNORECASE)

_log = logging.getLogger("fathom.requests")


@dataclass(eq=False)
class Books:
    """The accounts of one server.

    bill_as: the model of the price book whose prices are charged; clock: the time of day, by which prices are chosen.
    Keys are asked for once there is one.
    """

    metrics: Metrics
    prices: PriceBook
    bill_as: str
    meter: Meter | None = None
    keyring: Keyring | None = None
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __post_init__(self) -> None:
        self.gate = Gate(self.meter.spent if self.meter else lambda _: Decimal(0))

    def identify(self, headers: Mapping[str, str]) -> Key | None:
        """Whose request it is. Raises RequestError 401 where keys are asked for. Reference api B.1."""
        if self.keyring is None or not len(self.keyring):
            return None
        given = _BEARER.sub("", headers.get("authorization", ""), count=1).strip() or headers.get("x-api-key", "")
        if not given:
            message = "Authentication Fails: send a key as 'Authorization: Bearer KEY'"
            raise RequestError(401, message, type="authentication_error")
        return self.keyring.find(given)

    def open(self, key: Key | None, identity: str, protocol: str, model: str) -> Account:
        """Begin a request. Raises RequestError: 402, 429 of its key; 503 when it could not be booked."""
        if self.meter and self.meter.full:
            message = "the ledger's database is away and its journal is full: no more can be booked"
            raise RequestError(503, message, type="server_error", code="overloaded", retry_after=10)
        at = self.clock()
        try:
            price = self.price(at)
        except ConfigError as error:
            message = f"the server's clock shows {at:%F %R} UTC: {error}"
            raise RequestError(503, message, type="server_error", code="no_price", retry_after=60) from None
        return Account(self, key, identity, protocol, model, at, price)

    def price(self, moment: datetime) -> Price:
        """What holds at this moment."""
        return self.prices.price(self.bill_as, moment)

    def balance(self, key: Key | None) -> dict[str, Any]:
        """What a key may still spend; without a budget, as much as nobody can. Reference api B.1."""
        budget = key.limits.budget if key else None
        left = Decimal(1_000_000) if budget is None or key is None else budget - self._spent(key)
        amounts = {
            "total_balance": max(left, Decimal(0)),
            "granted_balance": Decimal(0),
            "topped_up_balance": max(left, Decimal(0)),
        }
        shown = {name: f"{amount:.2f}" for name, amount in amounts.items()}
        return {"is_available": left > 0, "balance_infos": [{"currency": "USD", **shown}]}

    def ledger(self, key: Key | None) -> list[dict[str, Any]]:
        """Usage by key; who has a key sees its own."""
        if self.meter is None:
            return []
        names = {k.id: f"{k.name} ({k.id})" for k in self.keyring.known()} if self.keyring else {}
        totals: Mapping[str | None, Totals] = self.meter.totals
        return [
            {"key": names.get(id or "", id)} | total.shown()
            for id, total in totals.items()
            if key is None or id == key.id
        ]

    def _spent(self, key: Key) -> Decimal:
        return self.meter.spent(key.id) if self.meter else Decimal(0)


class Account:
    """One request's: admitted, charged while it goes on, booked once at its end."""

    def __init__(
        self, books: Books, key: Key | None, identity: str, protocol: str, model: str, at: datetime, price: Price
    ) -> None:
        self._books, self._key, self._identity = books, key, identity
        self._protocol, self._model, self._at, self._price = protocol, model, at, price
        self._begun, self._last = time.monotonic(), 0.0
        self._first: float | None = None
        self._stack = ExitStack()
        self._admission = self._stack.enter_context(books.gate.admit(key)) if key else None
        self._closed = False

    def progress(self, usage: Mapping[str, int], tokens: int) -> RequestError | None:
        """`tokens` more were said; the reason to end it here, once the key's budget is used up."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self._books.metrics.first_token(now - self._begun)
        else:
            self._books.metrics.next_token(now - self._last, tokens)
        self._last = now
        if not self._key or not self._admission or self._admission.charge(self._amount(usage), _all(usage)):
            return None
        return used_up(self._key)

    def close(self, usage: Mapping[str, int], finish: str) -> None:
        """The request has ended: booked for good when this returns. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        row = self._row(usage, finish)
        if self._admission:
            self._admission.charge(row.amount, _all(usage))
        if self._books.meter:
            self._books.meter.book(row)
        self._stack.close()
        metrics = self._books.metrics
        metrics.finished(row.protocol, finish, row.hit, row.miss, row.reasoning, row.output)
        metrics.charged(row.amount)
        _log.info(json.dumps(_logged(row)))

    def _row(self, usage: Mapping[str, int], finish: str) -> Row:
        now = time.monotonic()
        return Row(
            id=self._identity,
            at=self._at,
            key=self._key.id if self._key else None,
            protocol=self._protocol,
            model=self._model,
            hit=usage["cached"],
            miss=usage["prompt"] - usage["cached"],
            output=usage["completion"],
            reasoning=usage["reasoning"],
            first_ms=None if self._first is None else round(1000 * (self._first - self._begun)),
            total_ms=round(1000 * (now - self._begun)),
            finish=finish,
            price=self._price.version,
            amount=self._amount(usage),
        )

    def _amount(self, usage: Mapping[str, int]) -> Decimal:
        tokens = Tokens(usage["cached"], usage["prompt"] - usage["cached"], usage["completion"])
        return self._price.amount(tokens, self._at)


def _all(usage: Mapping[str, int]) -> int:
    return usage["prompt"] + usage["completion"]


def _logged(row: Row) -> dict[str, Any]:
    """A row as a line of the log: what and how much, never what was said."""
    names = ("id", "key", "protocol", "model", "hit", "miss", "output", "reasoning", "first_ms", "total_ms", "finish")
    return {"at": row.at.isoformat()} | {name: getattr(row, name) for name in names} | {"usd": f"{row.amount:f}"}
