"""Keys: who may ask, how much at once, how much a minute and for how much money. Reference api B.1, B.8.

A key is shown once, when it is made; the database keeps its SHA-256, which is enough for 256 random bits.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from math import ceil
from types import TracebackType

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from fathom.errors import ConfigError, RequestError
from fathom.server.database import keys as table

PREFIX = "fk-"

_MINUTE = 60.0
_SLICE = 1.0  # seconds; tokens that come within so long are counted as one
_REFRESH = 2.0  # seconds after which a revoked or new key is noticed

_MOST = 2**31 - 1
"""What an integer of either database holds."""

_LEAST_BUDGET, _MOST_BUDGET = Decimal("0.000001"), Decimal(10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a key may do; None is no limit. budget: USD in all. Raises ConfigError for what is out of range."""

    concurrency: int | None = None
    tokens_per_minute: int | None = None
    budget: Decimal | None = None

    def __post_init__(self) -> None:
        for flag, count in (("concurrency", self.concurrency), ("tokens-per-minute", self.tokens_per_minute)):
            if count is not None and not 1 <= count <= _MOST:
                raise ConfigError(f"--{flag} {count} is out of range: it must be from 1 to {_MOST}")
        budget = self.budget
        if budget is not None and not (budget.is_finite() and _LEAST_BUDGET <= budget <= _MOST_BUDGET):
            raise ConfigError(f"--budget {budget} is out of range: it must be from {_LEAST_BUDGET} to {_MOST_BUDGET}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key without its secret, of which `tail` are the last four characters."""

    id: str
    name: str
    tail: str
    created: datetime
    revoked: datetime | None
    limits: Limits


class Keyring:
    """The keys of a database."""

    def __init__(self, database: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._database, self._clock = database, clock
        self._by_hash: dict[str, Key] = {}
        self._read_at = float("-inf")
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def watch(self) -> None:
        """From now on keys are read by a thread: a database that does not answer holds nobody up."""
        self._refresh()
        self._watcher = threading.Thread(target=self._watch, name="fathom-keys", daemon=True)
        self._watcher.start()

    def close(self, patience: float = 2.0) -> None:
        """Read no more, waiting at most so long for the database."""
        self._ended.set()
        if self._watcher:
            self._watcher.join(patience)

    def create(self, name: str, limits: Limits) -> tuple[Key, str]:
        """A new key and its secret, which is nowhere kept. Raises ConfigError for a name that is no line of text."""
        if not (0 < len(name.strip()) <= 100 and name.isprintable()):
            raise ConfigError(f"--name {name!r} is no name: it must be one line of 1 to 100 characters")
        secret = PREFIX + secrets.token_urlsafe(32)
        key = Key(
            id=secrets.token_hex(4), name=name, tail=secret[-4:], created=datetime.now(UTC), revoked=None, limits=limits
        )
        values = {f: getattr(key, f) for f in ("id", "name", "tail", "created")}
        values |= {f: getattr(limits, f) for f in ("concurrency", "tokens_per_minute", "budget")}
        with self._database.begin() as connection:
            connection.execute(sa.insert(table).values(hash=_hash(secret), **values))
        self._read_at = float("-inf")
        return key, secret

    def revoke(self, id: str) -> None:
        """End a key. Raises ConfigError if there is none with this id, or it has ended."""
        ending = sa.update(table).where(table.c.id == id, table.c.revoked.is_(None)).values(revoked=datetime.now(UTC))
        with self._database.begin() as connection:
            if connection.execute(ending).rowcount != 1:
                raise ConfigError(f"no valid key has the id '{id}': fathom keys list shows them")
        self._read_at = float("-inf")

    def list(self) -> Sequence[Key]:
        """All keys, revoked ones too, oldest first."""
        with self._database.connect() as connection:
            return [_key(row) for row in connection.execute(sa.select(table).order_by(table.c.created))]

    def known(self) -> Sequence[Key]:
        """All keys as they were last read: what a page may ask for while the database is away."""
        self._refresh()
        return tuple(self._by_hash.values())

    def find(self, secret: str) -> Key:
        """The valid key with this secret. Raises RequestError 401, which shows the last four characters and no more."""
        self._refresh()
        key = self._by_hash.get(_hash(secret))
        if key is None or key.revoked is not None:
            shown = f"****{secret[-4:]}" if len(secret) >= 12 and secret.isascii() else "****"
            message = f"Authentication Fails, Your api key: {shown} is invalid"
            raise RequestError(401, message, type="authentication_error")
        return key

    def __len__(self) -> int:
        """How many keys are valid."""
        self._refresh()
        return sum(key.revoked is None for key in self._by_hash.values())

    def _watch(self) -> None:
        while not self._ended.wait(_REFRESH / 2):
            self._read()

    def _refresh(self) -> None:
        """Read the keys again now and then, where no thread does."""
        now = self._clock()
        if self._watcher or now - self._read_at < _REFRESH:
            return
        self._read_at = now
        self._read()

    def _read(self) -> None:
        """While the database is away, the keys that are known go on."""
        try:
            with self._database.connect() as connection:
                rows = connection.execute(sa.select(table)).all()
        except sa.exc.SQLAlchemyError:
            return
        self._by_hash = {row.hash: _key(row) for row in rows}


@dataclass
class _Use:
    """What one key is doing; recent: when tokens came, and how many, slice by slice."""

    running: int = 0
    open_amount: Decimal = Decimal(0)
    recent: deque[tuple[float, int]] = field(default_factory=deque)

    def count(self, tokens: int, now: float) -> None:
        """So many more have come."""
        if self.recent and now - self.recent[-1][0] < _SLICE:
            begun, before = self.recent.pop()
            self.recent.append((begun, before + tokens))
        else:
            self.recent.append((now, tokens))
        self._forget(now)

    def wait(self, most: int, now: float) -> float:
        """Seconds until the tokens of the last minute are fewer than `most`; 0 if they are."""
        self._forget(now)
        left, wait = sum(tokens for _, tokens in self.recent), 0.0
        for begun, tokens in self.recent:
            if left < most:
                break
            left, wait = left - tokens, begun + _MINUTE - now
        return wait

    def _forget(self, now: float) -> None:
        while self.recent and self.recent[0][0] <= now - _MINUTE:
            self.recent.popleft()


class Gate:
    """Lets requests of a key in while its limits allow it.

    spent: USD that a key's finished requests have cost, by the key's id.
    """

    def __init__(self, spent: Callable[[str], Decimal], clock: Callable[[], float] = time.monotonic) -> None:
        self._spent, self._clock = spent, clock
        self._lock = threading.Lock()
        self._uses: dict[str, _Use] = {}

    def admit(self, key: Key) -> Admission:
        """Begin a request. Raises RequestError 402 (budget) and 429 (concurrency, tokens a minute)."""
        with self._lock:
            use = self._uses.setdefault(key.id, _Use())
            self._check(key, use)
            use.running += 1
        return Admission(self, key)

    def _check(self, key: Key, use: _Use) -> None:
        limits, now = key.limits, self._clock()
        if limits.budget is not None and self._spent(key.id) + use.open_amount >= limits.budget:
            raise used_up(key)
        if limits.concurrency is not None and use.running >= limits.concurrency:
            raise _too_many(f"key {key.id} has {use.running} requests running, as many as it may", 1.0)
        if limits.tokens_per_minute is not None and (wait := use.wait(limits.tokens_per_minute, now)):
            raise _too_many(f"key {key.id} has used its {limits.tokens_per_minute} tokens of this minute", wait)

    def _charge(self, key: Key, amount: Decimal, tokens: int) -> bool:
        """So much more."""
        with self._lock:
            use = self._uses[key.id]
            use.open_amount += amount
            use.count(tokens, self._clock())
            return key.limits.budget is None or self._spent(key.id) + use.open_amount <= key.limits.budget

    def _leave(self, key: Key, amount: Decimal) -> None:
        with self._lock:
            use = self._uses[key.id]
            use.running -= 1
            use.open_amount -= amount


class Admission:
    """One request of a key, between its admission and its end; a context manager."""

    def __init__(self, gate: Gate, key: Key) -> None:
        self._gate, self._key = gate, key
        self._amount, self._tokens = Decimal(0), 0

    def charge(self, amount: Decimal, tokens: int) -> bool:
        """The request has cost `amount` for `tokens` so far; whether the budget still allows going on."""
        more = amount - self._amount, tokens - self._tokens
        self._amount, self._tokens = amount, tokens
        return self._gate._charge(self._key, *more)

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate._leave(self._key, self._amount)


def used_up(key: Key) -> RequestError:
    """Its budget is: said at the door, and in a stream that it ends."""
    message = f"Insufficient Balance: the budget of key {key.id} is used up"
    return RequestError(402, message, type="insufficient_quota", code="insufficient_quota")


def _too_many(what: str, wait: float) -> RequestError:
    message, seconds = f"Rate limit reached: {what}", max(1, ceil(wait))
    return RequestError(429, message, type="rate_limit_error", code="rate_limit_exceeded", retry_after=seconds)


def _hash(secret: str) -> str:
    return sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _key(row: sa.Row[tuple[object, ...]]) -> Key:
    found = row._mapping
    limits = Limits(**{f: found[f] for f in ("concurrency", "tokens_per_minute", "budget")})
    return Key(limits=limits, **{f: found[f] for f in ("id", "name", "tail", "created", "revoked")})
