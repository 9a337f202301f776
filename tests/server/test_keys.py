"""Keys: shown once, kept as a hash, ended at will; limits with an injected clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from hashlib import sha256
from pathlib import Path

import pytest
import sqlalchemy as sa

from fathom.cli.main import run
from fathom.errors import ConfigError, RequestError
from fathom.server.database import open_database
from fathom.server.keys import Gate, Key, Keyring, Limits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = open_database(f"sqlite:///{tmp_path}/keys.db")
    yield engine
    engine.dispose()


def make(database: sa.Engine, **limits: object) -> Key:
    return Keyring(database).create("ann", Limits(**limits))[0]  # type: ignore[arg-type]


def test_a_key_opens_until_it_is_revoked_and_its_secret_is_nowhere(tmp_path: Path, database: sa.Engine) -> None:
    clock = Clock()
    ring, server = Keyring(database), Keyring(database, clock)
    key, secret = ring.create("ann", Limits(budget=Decimal("1.50"), concurrency=2))
    assert server.find(secret) == key and len(server) == 1 and key.limits.budget == Decimal("1.50")
    database.dispose()
    stored = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert secret.encode() not in stored and sha256(secret.encode()).hexdigest().encode() in stored
    ring.revoke(key.id)
    clock.now += 3
    with pytest.raises(RequestError, match=f"api key: \\*{{4}}{secret[-4:]} is invalid") as refused:
        server.find(secret)
    assert (refused.value.status, refused.value.type) == (401, "authentication_error")
    assert len(server) == 0 and [k.revoked is not None for k in ring.list()] == [True]


@pytest.mark.parametrize(
    "secret", ["", "x", "fk-", "fk-" + "a" * 43, "' OR 1=1 --", "\udcff", "ключ" * 9, "a" * 100_000]
)
def test_forged_and_malformed_keys_are_refused_alike(database: sa.Engine, secret: str) -> None:
    make(database)
    with pytest.raises(RequestError) as refused:
        Keyring(database).find(secret)
    assert refused.value.status == 401 and len(refused.value.message) < 80


def test_concurrency_and_budget(database: sa.Engine) -> None:
    spent = {"all": Decimal(0)}
    gate = Gate(lambda _: spent["all"], Clock())
    key = make(database, concurrency=2, budget=Decimal("1"))
    with gate.admit(key) as first, gate.admit(key):
        with pytest.raises(RequestError) as refused:
            gate.admit(key)
        assert refused.value.status == 429 and refused.value.retry_after == 1
        assert first.charge(Decimal("0.999"), 10) and first.charge(Decimal("1"), 11)
        assert not first.charge(Decimal("1.000001"), 12)
        spent["all"] += Decimal("1.000001")
    with pytest.raises(RequestError) as refused:
        gate.admit(key)
    assert refused.value.status == 402


def test_two_streams_share_one_budget(database: sa.Engine) -> None:
    gate = Gate(lambda _: Decimal("0.5"), Clock())
    key = make(database, budget=Decimal("1"))
    with gate.admit(key) as one, gate.admit(key) as two:
        assert one.charge(Decimal("0.3"), 1) and two.charge(Decimal("0.2"), 1)
        assert not two.charge(Decimal("0.21"), 1)


def test_tokens_a_minute_come_back_after_a_minute(database: sa.Engine) -> None:
    clock = Clock()
    gate = Gate(lambda _: Decimal(0), clock)
    key = make(database, tokens_per_minute=100)
    for tokens in (60, 60):
        with gate.admit(key) as use:
            use.charge(Decimal(0), tokens)
        clock.now += 10
    with pytest.raises(RequestError) as refused:
        gate.admit(key)
    assert refused.value.status == 429 and refused.value.retry_after == 40
    clock.now += 40
    gate.admit(key)


def test_the_wait_is_as_long_as_it_must_be(database: sa.Engine) -> None:
    """A small request, then a large one: when the small one is a minute old, the large one still fills the limit."""
    clock = Clock()
    gate = Gate(lambda _: Decimal(0), clock)
    key = make(database, tokens_per_minute=100)
    for tokens in (10, 200):
        with gate.admit(key) as use:
            use.charge(Decimal(0), tokens)
        clock.now += 30
    for wait in (30, 29):
        with pytest.raises(RequestError) as refused:
            gate.admit(key)
        assert refused.value.retry_after == wait
        clock.now += 1
    clock.now += 28
    gate.admit(key)


def test_tokens_count_in_the_minute_in_which_they_come(database: sa.Engine) -> None:
    """An answer of two hours, 50 tokens a minute: it fills no minute of 100, neither while it runs nor at its end."""
    clock = Clock()
    gate = Gate(lambda _: Decimal(0), clock)
    key = make(database, tokens_per_minute=100)
    with gate.admit(key) as long:
        for second in range(7200):
            clock.now += 1
            long.charge(Decimal(0), second * 50 // 60)
            if second % 600 == 0:
                with gate.admit(key):
                    pass
    gate.admit(key)
    with gate.admit(key) as burst, pytest.raises(RequestError) as refused:
        burst.charge(Decimal(0), 100)
        gate.admit(key)
    assert refused.value.status == 429 and refused.value.retry_after == 60


@pytest.mark.parametrize("name", ["concurrency", "tokens_per_minute", "budget"])
@pytest.mark.parametrize("value", ["0", "-1", "1e30", "NaN", "-Infinity", "Infinity", "1e-400"])
def test_limits_out_of_range(name: str, value: str) -> None:
    if name != "budget" and not Decimal(value).is_finite():
        return
    number = Decimal(value) if name == "budget" else int(Decimal(value))
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .* is out of range"):
        Limits(**{name: number})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "\x1b[2J", "x" * 101])
def test_a_name_is_one_line_of_text(database: sa.Engine, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        Keyring(database).create(name, Limits())


def test_a_watching_ring_never_waits_for_the_database(database: sa.Engine) -> None:
    """A database that hangs: keys that are known open, at once; when it answers again, a new key is found."""
    frozen, thawed = threading.Event(), threading.Event()
    ring = Keyring(database)
    _, known = ring.create("ann", Limits())
    ring.watch()

    def hang(*_: object) -> None:
        if threading.current_thread().name == "fathom-keys":
            frozen.set()
            thawed.wait(20)

    sa.event.listen(database, "before_cursor_execute", hang)
    assert frozen.wait(5)
    _, later = Keyring(database).create("bob", Limits())
    begun = time.monotonic()
    assert ring.find(known).name == "ann" and len(ring) == 1 and time.monotonic() - begun < 10
    with pytest.raises(RequestError):
        ring.find(later)
    thawed.set()
    end = time.monotonic() + 10
    while len(ring) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert ring.find(later).name == "bob"
    ring.close()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--database", f"sqlite:///{tmp_path}/k.db"]
    assert run(["keys", "create", "--name", "bob", "--budget", "2.50", *flags]) == 0
    secret = capsys.readouterr().out.strip()
    assert run(["keys", "list", *flags]) == 0
    listed = capsys.readouterr().out
    assert "| bob |" in listed and "2.50" in listed and secret not in listed and secret[-4:] in listed
    id = listed.splitlines()[-1].split(" | ")[0].strip("| ")
    assert run(["keys", "revoke", id, *flags]) == 0 and run(["keys", "revoke", id, *flags]) == 2
    assert f"no valid key has the id '{id}'" in capsys.readouterr().err
    assert run(["keys", "create", "--name", "bob", "--budget", "much", *flags]) == 2
    assert run(["keys", "create", "--name", "a|b", *flags]) == 0
    capsys.readouterr()
    assert run(["keys", "list", *flags]) == 0 and "| a\\|b |" in capsys.readouterr().out
