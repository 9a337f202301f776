"""Keys: shown once, kept as a hash, ended at will; limits with an injected clock."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", ["concurrency", "tokens_per_minute", "budget"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        Limits(**{name: 0})  # type: ignore[arg-type]


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
