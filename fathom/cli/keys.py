"""`fathom keys`: make, list and revoke the keys of a server."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fathom.errors import ConfigError

if TYPE_CHECKING:
    from fathom.server.keys import Key, Keyring

keys = typer.Typer(help="The keys of a server: create, list, revoke.", rich_markup_mode=None)

Database = Annotated[
    str | None, typer.Option(envvar="FATHOM_DATABASE", help="Where keys and ledger are; SQLite in the user's data.")
]


def default_database() -> str:
    """A file in the user's data folder."""
    return f"sqlite:///{Path.home() / '.local' / 'share' / 'fathom' / 'fathom.db'}"


@keys.command()
def create(
    name: Annotated[str, typer.Option(help="Whose key it is.")],
    concurrency: Annotated[int | None, typer.Option(help="The most requests at once.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="The most tokens a minute, prompts included.")] = None,
    budget: Annotated[str | None, typer.Option(help="USD in all; then requests are refused.")] = None,
    database: Database = None,
) -> None:
    """Make a key. It is shown this once."""
    from fathom.server.keys import Limits

    limits = Limits(concurrency=concurrency, tokens_per_minute=tokens_per_minute, budget=_dollars(budget))
    key, secret = _ring(database).create(name, limits)
    print(secret)
    typer.echo(f"key {key.id} for {name}: keep it now, it is not shown again", err=True)


@keys.command("list")
def show(database: Database = None) -> None:
    """All keys, without their secrets."""
    print("| id | name | ends in | created | concurrency | tokens a minute | budget | state |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | --- |")
    for key in _ring(database).list():
        print(_line(key))


@keys.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The id that `keys list` shows.")], database: Database = None
) -> None:
    """End a key; running requests finish."""
    _ring(database).revoke(id)
    typer.echo(f"key {id} is revoked", err=True)


def _ring(database: str | None) -> Keyring:
    from fathom.server.database import open_database
    from fathom.server.keys import Keyring

    return Keyring(open_database(database or default_database()))


def _line(key: Key) -> str:
    limits = key.limits
    state = f"revoked {key.revoked:%F}" if key.revoked else "valid"
    shown = ("" if v is None else str(v) for v in (limits.concurrency, limits.tokens_per_minute, limits.budget))
    name = key.name.replace("|", "\\|")
    return f"| {key.id} | {name} | {key.tail} | {key.created:%F} | {' | '.join(shown)} | {state} |"


def _dollars(text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text)
    except InvalidOperation:
        raise ConfigError(f"--budget '{text}' is no number of dollars") from None
