"""The ledger: no finished request is lost or booked twice, whatever is killed, away or damaged."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import sqlalchemy as sa

from fathom.errors import ConfigError
from fathom.server import metering
from fathom.server.database import open_database, place, requests, sqlite_file
from fathom.server.keys import Keyring, Limits
from fathom.server.metering import Meter, Row, read_rows
from fathom.server.prices import PriceBook, Tokens
from tests.server.postgres import postgres
from tests.server.test_prices import published

AT = datetime(2026, 9, 14, 7, tzinfo=UTC)


def row(n: int, key: str | None = "k1", amount: str = "0.000000000123") -> Row:
    return Row(
        id=f"r{n:06d}",
        at=AT + timedelta(seconds=n),
        key=key,
        protocol="chat",
        model="deepseek-v4-flash",
        hit=128 * n,
        miss=7,
        output=5,
        reasoning=3,
        first_ms=None if n % 3 else 12,
        total_ms=40,
        finish="stop",
        price="deepseek-v4-flash@2026-09-10T04:00Z",
        amount=Decimal(amount) * n,
    )


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/ledger.db"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = open_database(url(tmp_path))
    yield engine
    engine.dispose()


def test_rows_come_back_as_they_were_booked(tmp_path: Path, database: sa.Engine) -> None:
    rows = [row(n, key=None if n % 5 == 0 else f"k{n % 2}") for n in range(1200)]
    meter = Meter(database, tmp_path / "journal")
    for r in rows:
        meter.book(r)
    meter.close()
    assert list(read_rows(database)) == rows
    assert list(read_rows(database, AT + timedelta(seconds=10), AT + timedelta(seconds=20))) == rows[10:20]
    again = Meter(database, tmp_path / "journal")
    assert again.spent("k1") == sum(r.amount for r in rows if r.key == "k1") == meter.spent("k1")
    again.close()


def test_after_the_end_the_file_alone_has_everything(tmp_path: Path, database: sa.Engine) -> None:
    meter = Meter(database, tmp_path / "journal")
    for n in range(20):
        meter.book(row(n))
    meter.close()
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "ledger.db").write_bytes((tmp_path / "ledger.db").read_bytes())
    assert [r.id for r in read_rows(open_database(url(tmp_path / "backup")))] == [row(n).id for n in range(20)]


def test_an_audit_of_the_ledger_finds_no_difference(tmp_path: Path, database: sa.Engine) -> None:
    """10,000 requests around price changes and peak hours, booked, read back, and recomputed with fractions."""
    rng, book = random.Random(11), PriceBook.load()
    borders = [datetime(2026, 4, 26, 12, 15), datetime(2026, 8, 16, 16), datetime(2026, 9, 10, 4)]
    borders += [datetime(2026, 9, day, hour) for day in range(7, 15) for hour in (1, 4, 6, 10)]
    meter = Meter(database, tmp_path / "journal")
    for n in range(10_000):
        at = rng.choice(borders).replace(tzinfo=UTC) + timedelta(
            microseconds=rng.randint(-5, 5) * 10 ** rng.randrange(9)
        )
        model = rng.choice(("deepseek-v4-pro", "deepseek-v4-flash"))
        used = Tokens(rng.randrange(10**6), rng.randrange(10**6), rng.randrange(10**6))
        price = book.price(model, at)
        meter.book(
            replace(
                row(n), at=at, model=model, hit=used.hit, miss=used.miss, output=used.output, price=price.version,
                amount=price.amount(used, at),
            )
        )  # fmt: skip
    meter.close()
    rows = list(read_rows(database))
    assert len(rows) == 10_000
    for r in rows:
        hit, miss, output = map(Fraction, published(r.model, r.at))
        assert Fraction(r.amount) == (r.hit * hit + r.miss * miss + r.output * output) / 10**6


def test_files_are_readable_by_their_owner_only(tmp_path: Path, database: sa.Engine) -> None:
    Meter(database, tmp_path / "journal").close()
    assert [(tmp_path / f).stat().st_mode & 0o777 for f in ("ledger.db", "journal")] == [0o600, 0o600]


def test_a_database_that_goes_away_is_waited_for(tmp_path: Path, database: sa.Engine) -> None:
    meter = Meter(database, tmp_path / "journal", limit=2000)
    meter.book(row(1))
    _until(lambda: meter.waiting == 0)
    other = sqlite3.connect(tmp_path / "ledger.db")
    other.execute("ALTER TABLE requests RENAME TO elsewhere")
    other.commit()
    for n in range(2, 10):
        meter.book(row(n))
    _until(lambda: meter.trouble is not None)
    assert "no such table" in str(meter.trouble) and meter.waiting == 8 and meter.full
    assert meter.spent("k1") == sum(row(n).amount for n in range(1, 10))
    other.execute("ALTER TABLE elsewhere RENAME TO requests")
    other.commit()
    other.close()
    _until(lambda: meter.waiting == 0)
    assert meter.trouble is None and not meter.full
    meter.close()
    assert [r.id for r in read_rows(database)] == [row(n).id for n in range(1, 10)]


def test_a_damaged_journal_gives_its_whole_lines(tmp_path: Path, database: sa.Engine) -> None:
    journal = tmp_path / "journal"
    away = Meter(database, journal)
    away._database = sa.create_engine(f"sqlite:///{tmp_path}/empty.db")
    for n in range(4):
        away.book(row(n))
    _until(lambda: away.trouble is not None)
    away.close(patience=0.0)
    text = journal.read_bytes()
    for damage in (
        text[:-1],
        text + b"00000000 {}\n",
        text + b"\xff\xfe garbage",
        text.replace(b"r000003", b"r0000x3"),
    ):
        whole = 4 - (damage == text[:-1]) - (b"x3" in damage)
        copy = tmp_path / f"copy{len(damage)}{whole}"
        copy.write_bytes(damage)
        again = open_database(f"sqlite:///{copy}.db")
        meter = Meter(again, copy)
        meter.book(row(9))
        meter.close()
        assert [r.id for r in read_rows(again)] == [row(n).id for n in [*range(whole), 9]]


def test_a_journal_stays_short_while_something_always_waits(
    tmp_path: Path, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bookings come faster than a slow database takes them in: serving never stops for it, and no row is lost."""
    begin, chosen, turn = database.begin, threading.Semaphore(0), threading.Semaphore(0)

    def slow() -> object:
        chosen.release()
        turn.acquire()
        return begin()

    monkeypatch.setattr(database, "begin", slow)
    meter, least = Meter(database, tmp_path / "journal", limit=60_000), 10
    for n in range(1500):
        if n % 25 == 24:
            assert chosen.acquire(timeout=60)  # which rows it moves next: row n is not one of them
        meter.book(row(n))
        if n % 25 == 24:
            turn.release()
        least = min(least, meter.waiting) if n else least
        assert not meter.full
    assert least > 0
    kept = tmp_path / "kept"
    kept.write_bytes((tmp_path / "journal").read_bytes())
    rest = Meter(open_database(f"sqlite:///{tmp_path}/other.db"), kept)
    rest.close(60)
    turn.release(1500)
    meter.close(60)
    assert list(read_rows(database)) == [row(n) for n in range(1500)]
    assert rest.totals["k1"].requests < 300


def test_a_database_that_hangs_is_said(tmp_path: Path, database: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "_SILENCE", 0.1)
    thawed = threading.Event()
    sa.event.listen(database, "before_cursor_execute", lambda *_: thawed.wait(20))
    thawed.set()
    meter = Meter(database, tmp_path / "journal")
    thawed.clear()
    meter.book(row(1))
    _until(lambda: meter.trouble is not None)
    assert str(meter.trouble).startswith("the database has not answered for ") and not meter.full
    thawed.set()
    _until(lambda: meter.waiting == 0 and meter.trouble is None)
    meter.close()


def test_what_kind_of_database_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sqlite_file("sqlite:///~/a/b.db") == tmp_path / "a" / "b.db"
    open_database("sqlite:///~/a/b.db").dispose()
    assert (tmp_path / "a" / "b.db").exists() and sqlite_file("sqlite://") is None
    assert place("postgresql://me:old@host/name") == place("postgres://me:new@host/name?connect_timeout=3")
    with pytest.raises(ConfigError, match="neither sqlite:///FILE nor postgresql://") as refused:
        open_database("mysql://me:secret@host/name")
    assert "secret" not in str(refused.value)


def test_two_servers_cannot_share_a_journal(tmp_path: Path, database: sa.Engine) -> None:
    meter = Meter(database, tmp_path / "journal")
    with pytest.raises(ConfigError, match="another server keeps its ledger there"):
        Meter(database, tmp_path / "journal")
    meter.close()


def test_a_newer_or_unreachable_database_is_refused_in_one_line(tmp_path: Path, database: sa.Engine) -> None:
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="was made by a newer fathom"):
        open_database(url(tmp_path))
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_database("postgresql://nobody:secret@127.0.0.1:1/none")
    with pytest.raises(ConfigError, match="cannot be opened") as refused:
        open_database("nonsense")
    assert "secret" not in str(refused.value)


WRITER = """
import sys
from pathlib import Path
from fathom.server.database import open_database
from fathom.server.metering import Meter
from tests.server.test_metering import row, url
folder, first = Path(sys.argv[1]), int(sys.argv[2])
meter = Meter(open_database(url(folder)), folder / "journal")
for n in range(first, 10**6):
    meter.book(row(n))
    print(n, flush=True)
"""


def kill_and_count(folder: Path, kills: int) -> None:
    """Kill a booking process again and again: what it had said is booked is there, once."""
    rng, told = random.Random(kills), 0
    for _ in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(told + 1)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]
        time.sleep(rng.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
        writer.wait()
        told = max(int(line) for line in lines if line.strip().isdigit() and line.endswith("\n"))
    database = open_database(url(folder))
    Meter(database, folder / "journal").close()
    booked = [r.id for r in read_rows(database)]
    assert len(booked) == len(set(booked)) and set(booked) >= {row(n).id for n in range(1, told + 1)}
    assert all(r == row(int(r.id[1:])) for r in read_rows(database))


def test_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    kill_and_count(tmp_path, 3)


@pytest.mark.external
def test_fifty_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    kill_and_count(tmp_path, 50)


@pytest.mark.external
def test_a_postgresql_that_freezes_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are stopped: connections stay open and nothing answers any more."""
    monkeypatch.setattr(metering, "_SILENCE", 1.0)
    with postgres() as server:
        database = open_database(server.url)
        meter, ring = Meter(database, tmp_path / "journal"), Keyring(database)
        _, secret = ring.create("ann", Limits())
        ring.watch()
        meter.book(row(1))
        _until(lambda: meter.waiting == 0)
        with server.frozen():
            longest, end, n = 0.0, time.monotonic() + 4, 2
            while time.monotonic() < end:
                begun = time.monotonic()
                assert ring.find(secret).name == "ann"
                meter.book(row(n))
                longest, n = max(longest, time.monotonic() - begun), n + 1
                time.sleep(0.05)
            assert longest < 0.5 and "has not answered" in str(meter.trouble) and meter.waiting == n - 2
        _until(lambda: meter.waiting == 0)
        ring.close()
        meter.close()
        assert list(read_rows(database)) == [row(k) for k in range(1, n)]
        database.dispose()


@pytest.mark.external
def test_the_same_on_postgresql_which_may_go_away(tmp_path: Path) -> None:
    with postgres() as server:
        database = open_database(server.url)
        meter = Meter(database, tmp_path / "journal")
        rows = [row(n) for n in range(1, 700)]
        for n, r in enumerate(rows):
            if n == 300:
                server.stop("immediate")
            meter.book(r)
        _until(lambda: meter.trouble is not None)
        server.start()
        _until(lambda: meter.waiting == 0)
        meter.close()
        assert list(read_rows(database)) == rows
        assert Meter(database, tmp_path / "journal").spent("k1") == sum(r.amount for r in rows)
        database.dispose()


def test_the_first_migration_makes_the_declared_tables(database: sa.Engine) -> None:
    found = sa.inspect(database)
    assert {c["name"] for c in found.get_columns("requests")} == set(requests.c.keys())


def _until(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
