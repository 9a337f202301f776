"""The database of keys and of the ledger: SQLite by default, PostgreSQL by URL. Tables, migrations, opening.

Amounts are exact decimals: NUMERIC in PostgreSQL, text in SQLite, which has no exact fractions.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy.engine import URL, Connection, Dialect, Engine, make_url

from fathom.errors import ConfigError

MIGRATIONS = Path(__file__).parent / "migrations"

_POSTGRES = {
    "client_encoding": "utf8",
    "connect_timeout": 5,
    "tcp_user_timeout": 20_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""libpq's options: a server that has vanished from the network is given up within half a minute, not half an hour."""


class Amount(sa.TypeDecorator[Decimal]):
    """An exact number of dollars."""

    impl = sa.Numeric(asdecimal=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        """Text where fractions would be binary."""
        return dialect.type_descriptor(sa.String() if dialect.name == "sqlite" else sa.Numeric(asdecimal=True))

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        """Stored without an exponent."""
        return format(value, "f") if value is not None and dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Read back exactly."""
        return None if value is None else Decimal(value)


class Moment(sa.TypeDecorator[datetime]):
    """A moment in UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Stored in UTC whatever its zone."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """SQLite forgets the zone: it is UTC."""
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


metadata = sa.MetaData()

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("hash", sa.String, nullable=False, unique=True),
    sa.Column("tail", sa.String, nullable=False),
    sa.Column("created", Moment, nullable=False),
    sa.Column("revoked", Moment),
    sa.Column("concurrency", sa.Integer),
    sa.Column("tokens_per_minute", sa.Integer),
    sa.Column("budget", Amount),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("at", Moment, nullable=False, index=True),
    sa.Column("key", sa.String, index=True),
    sa.Column("protocol", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("hit", sa.Integer, nullable=False),
    sa.Column("miss", sa.Integer, nullable=False),
    sa.Column("output", sa.Integer, nullable=False),
    sa.Column("reasoning", sa.Integer, nullable=False),
    sa.Column("first_ms", sa.Integer),
    sa.Column("total_ms", sa.Integer, nullable=False),
    sa.Column("finish", sa.String, nullable=False),
    sa.Column("price", sa.String, nullable=False),
    sa.Column("amount", Amount, nullable=False),
)


def open_database(url: str, *, create: bool = True) -> Engine:
    """Connect, and bring the tables to this version.

    create: make an SQLite file that is not there. Raises ConfigError: bad URL, no driver, away, or newer than we.
    """
    try:
        parsed = _parsed(url)
        if not create and (file := sqlite_file(url)) and not file.exists():
            raise ConfigError(f"there is no database {file}")
        engine = _engine(parsed)
        with engine.connect() as connection:
            _migrate(connection)
    except CommandError:
        raise ConfigError(f"the database {_shown(url)} was made by a newer fathom: update this one") from None
    except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ConfigError(f"the database {_shown(url)} cannot be opened: {reason}") from None
    return engine


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database; None for another one, or one in memory."""
    parsed = _parsed(url)
    on_disk = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
    return Path(str(parsed.database)) if on_disk else None


def place(url: str) -> str:
    """Where a database is: its URL without user, password and options, which may change."""
    parsed = _parsed(url)
    return f"{parsed.get_backend_name()}://{parsed.host}:{parsed.port}/{parsed.database}"


def _parsed(url: str) -> URL:
    """Raises ConfigError for what is neither SQLite nor PostgreSQL; `~` is the user's home."""
    parsed = make_url("postgresql" + url.removeprefix("postgres") if url.startswith("postgres://") else url)
    if parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"the database {_shown(url)} is neither sqlite:///FILE nor postgresql://USER:PASSWORD@HOST/NAME"
        )
    if parsed.get_backend_name() == "sqlite" and (parsed.database or "").startswith("~"):
        return parsed.set(database=str(Path(str(parsed.database)).expanduser()))
    return parsed


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        arguments = {name: value for name, value in _POSTGRES.items() if name not in url.query}
        return sa.create_engine(url, pool_pre_ping=True, connect_args=arguments)
    if url.database and url.database != ":memory:":
        _private_file(Path(url.database))
    engine = sa.create_engine(url, connect_args={"timeout": 10})
    sa.event.listen(engine, "connect", _tune_sqlite)
    return engine


def _private_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)


def _tune_sqlite(connection: Any, _: Any) -> None:
    # A committed row survives a killed process with either setting of synchronous; FULL also survives a power cut.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _shown(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return f"'{url}'"
