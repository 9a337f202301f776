"""What was used and what it costs: one row a request, never lost and never booked twice.

A finished request is first written to a journal, a file beside the database whose every line has a checksum, and only
then is its end told to the client. A thread moves the rows on into the database, which ignores an id that it has.
So a killed server finds the rows again, and a database that goes away is waited for while serving goes on, until the
journal has reached its bound.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Engine

from fathom.errors import ConfigError
from fathom.server.database import requests

JOURNAL_BYTES = 64 << 20
"""The most that waits for a database."""

_ROW_BYTES = 350
"""What a row takes in the journal; where that cannot be written, rows that wait in memory count as much."""

_BATCH = 500
_LONGEST_WAIT = 10.0  # seconds between two tries to reach the database
_SILENCE = 5.0  # seconds after which a database that has not answered is said to be away


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One finished request.

    key: the id of its key, if it had one; output includes reasoning; first_ms, total_ms: from its arrival to its first
    token and to its end; price: the row of the price list.
    """

    id: str
    at: datetime
    key: str | None
    protocol: str
    model: str
    hit: int
    miss: int
    output: int
    reasoning: int
    first_ms: int | None
    total_ms: int
    finish: str
    price: str
    amount: Decimal


@dataclass(slots=True)
class Totals:
    """What one key's requests come to."""

    requests: int = 0
    hit: int = 0
    miss: int = 0
    output: int = 0
    amount: Decimal = Decimal(0)

    def add(self, hit: int, miss: int, output: int, amount: Decimal) -> None:
        """One more request."""
        self.requests += 1
        self.hit, self.miss, self.output = self.hit + hit, self.miss + miss, self.output + output
        self.amount += amount

    def shown(self) -> dict[str, Any]:
        """For a page: the amount as text, exact."""
        return {**asdict(self), "amount": f"{self.amount.normalize():f}"}


class Meter:
    """Books rows and knows what every key has spent.

    database: opened by `database.open_database`; journal: a file of this meter alone; limit: the journal's bound in
    bytes. Raises ConfigError when another process holds the journal.
    """

    def __init__(self, database: Engine, journal: Path, limit: int = JOURNAL_BYTES) -> None:
        self._database, self._limit, self._path = database, limit, journal
        self._journal = _open_journal(journal)
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._waiting: dict[str, Row] = {row.id: row for row in _read_journal(self._journal)}
        self.totals = self._booked()
        self._away: str | None = None
        self._asked_at: float | None = None
        self._unwritten: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fathom-meter", daemon=True)
        self._thread.start()

    def book(self, row: Row) -> None:
        """Keep the row for good; when this returns, a killed process cannot lose it."""
        with self._lock:
            self._unwritten = self._written(_line(row))
            self._waiting[row.id] = row
            self.totals.setdefault(row.key, Totals()).add(row.hit, row.miss, row.output, row.amount)
        self._wake.set()

    def spent(self, key: str) -> Decimal:
        """USD that requests with this key have cost so far."""
        return self.totals[key].amount if key in self.totals else Decimal(0)

    @property
    def full(self) -> bool:
        """Whether what waits has reached its bound: nothing more should be served before the database is back."""
        with self._lock:
            return max(os.fstat(self._journal).st_size, len(self._waiting) * _ROW_BYTES) >= self._limit

    @property
    def waiting(self) -> int:
        """Rows that are not yet in the database."""
        return len(self._waiting)

    @property
    def trouble(self) -> str | None:
        """Why the database does not take rows, or the journal, if they do not."""
        asked = self._asked_at
        if self._away is None and asked is not None and time.monotonic() - asked > _SILENCE:
            return f"the database has not answered for {time.monotonic() - asked:.0f} s"
        return self._away or self._unwritten

    def close(self, patience: float = 5.0) -> None:
        """Move on what waits, for at most `patience` seconds; the rest stays in the journal.

        The database's connections are closed, too, so that SQLite's file is whole without its side files.
        """
        self._closing = True
        self._wake.set()
        self._thread.join(patience)
        if not self._thread.is_alive():
            os.close(self._journal)
            self._database.dispose()

    def _written(self, line: bytes) -> str | None:
        """Write to the journal; what went wrong. On a full disk the row waits in memory, the best that is left."""
        try:
            short = os.write(self._journal, line) < len(line)
        except OSError as error:
            return f"the journal cannot be written: {error.strerror}"
        return "the journal cannot be written: the disk is full" if short else None

    def _run(self) -> None:
        pause = 0.1
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._waiting:
                self._asked_at = time.monotonic()
                try:
                    self._move()
                    self._away, pause, self._asked_at = None, 0.1, None
                except (sa.exc.SQLAlchemyError, OSError) as error:
                    self._away, self._asked_at = str(getattr(error, "orig", None) or error).splitlines()[0], None
                    if self._closing:
                        return
                    time.sleep(pause)
                    pause = min(2 * pause, _LONGEST_WAIT)
            if self._closing:
                return

    def _move(self) -> None:
        with self._lock:
            rows = list(self._waiting.values())[:_BATCH]
        with self._database.begin() as connection:
            connection.execute(_insert_once(self._database), [asdict(row) for row in rows])
        with self._lock:
            for row in rows:
                del self._waiting[row.id]
            if not self._waiting:
                os.ftruncate(self._journal, 0)
                self._unwritten = None
            elif os.fstat(self._journal).st_size > max(self._limit // 2, 2 * len(self._waiting) * _ROW_BYTES):
                self._shorten()

    def _shorten(self) -> None:
        """A journal of the rows that still wait, in place of one that has become long because some always do."""
        aside = self._path.with_name(self._path.name + ".part")
        shorter = _open_journal(aside)
        try:
            os.ftruncate(shorter, 0)
            text = b"".join(map(_line, self._waiting.values()))
            if os.write(shorter, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            aside.replace(self._path)
        except OSError:
            os.close(shorter)
            raise
        os.close(self._journal)
        self._journal = shorter

    def _booked(self) -> dict[str | None, Totals]:
        """What the database and the journal hold, each request once."""
        totals: dict[str | None, Totals] = {}
        columns = [requests.c[name] for name in ("id", "key", "hit", "miss", "output", "amount")]
        with self._database.connect() as connection:
            for r in connection.execution_options(yield_per=1000).execute(sa.select(*columns)):
                if r.id not in self._waiting:
                    totals.setdefault(r.key, Totals()).add(r.hit, r.miss, r.output, r.amount)
        for row in self._waiting.values():
            totals.setdefault(row.key, Totals()).add(row.hit, row.miss, row.output, row.amount)
        return totals


def _insert_once(database: Engine) -> Any:
    """An insert that leaves out ids that the table has."""
    if database.dialect.name == "postgresql":
        return postgresql.insert(requests).on_conflict_do_nothing()
    return sqlite.insert(requests).on_conflict_do_nothing()


def read_rows(database: Engine, begin: datetime | None = None, end: datetime | None = None) -> Iterator[Row]:
    """Booked rows by time, from `begin` to before `end`."""
    query = sa.select(requests).order_by(requests.c.at, requests.c.id)
    query = query if begin is None else query.where(requests.c.at >= begin)
    query = query if end is None else query.where(requests.c.at < end)
    with database.connect() as connection:
        for found in connection.execution_options(yield_per=1000).execute(query).mappings():
            yield Row(**found)


def _open_journal(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(journal)
        raise ConfigError(
            f"the journal {path} is in use: another server keeps its ledger there; stop it, or name another --database"
        ) from None
    return journal


def _line(row: Row) -> bytes:
    values = {k: str(v) if isinstance(v, datetime | Decimal) else v for k, v in asdict(row).items()}
    text = json.dumps(values, separators=(",", ":")).encode()
    # The leading line end closes a line that a kill or a full disk has cut short.
    return b"\n%08x %s\n" % (zlib.crc32(text), text)


def _read_journal(journal: int) -> Iterator[Row]:
    """The whole lines of a journal; one that a kill has cut short was never told to a client."""
    with os.fdopen(os.dup(journal), "rb") as file:
        file.seek(0)
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text):
                yield _row(json.loads(text))


def _row(values: Mapping[str, Any]) -> Row:
    known = {f.name: values[f.name] for f in fields(Row)}
    known["at"] = datetime.fromisoformat(known["at"]).astimezone(UTC)
    return Row(**{**known, "amount": Decimal(known["amount"])})
