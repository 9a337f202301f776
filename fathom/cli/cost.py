"""`fathom cost`: what a workload costs on each model that has prices."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.errors import ConfigError

if TYPE_CHECKING:
    from fathom.server.prices import PriceBook, Tokens

    Use = tuple[datetime, Tokens]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMB]?)")


def cost(
    input_tokens: Annotated[
        str | None, typer.Option(help="Prompt tokens: 500, 20K, 10M, 1.5B; none if absent.")
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help="Generated tokens, thinking included; 100M if absent.")
    ] = None,
    hit_rate: Annotated[
        float | None, typer.Option(help="Part of the prompt tokens found in a cache, 0 to 1; 0 if absent.")
    ] = None,
    prices: Annotated[
        str | None, typer.Option(help="Prices of this day or moment (UTC); the launch if absent.")
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="A server's ledger (database URL) in place of token counts.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="With --ledger: from this day or moment (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="With --ledger: to before this day or moment (UTC).")] = None,
    list_file: Annotated[
        list[Path] | None, typer.Option("--list", help="A price list of your own; repeatable.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison to this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a workload costs on each model, in USD; with --ledger, what a server's requests would have cost."""
    from fathom.server.prices import LAUNCH, LISTS, PriceBook, Tokens

    book = PriceBook.load([*sorted(LISTS.glob("*.csv")), *(list_file or ())])
    moment = _moment("--prices", prices)
    booked = None
    if ledger:
        _refuse("cannot go with --ledger, which has the tokens", input_tokens=input_tokens, output_tokens=output_tokens)
        _refuse("cannot go with --ledger, which has the hits", hit_rate=hit_rate)
        uses, booked = _booked(ledger, _moment("--since", since), _moment("--until", until))
        uses = uses if moment is None else [(moment, tokens) for _, tokens in uses]
    else:
        _refuse("means nothing without --ledger", since=since, until=until)
        given, written = count("--input-tokens", input_tokens or "0"), count("--output-tokens", output_tokens or "100M")
        hit_rate = hit_rate or 0.0
        if not 0 <= hit_rate <= 1:
            raise ConfigError(f"--hit-rate {hit_rate} is out of range: it must be from 0 to 1")
        hit = int(given * Decimal(repr(hit_rate)))
        uses = [(moment or LAUNCH, Tokens(hit, given - hit, written))]
    bills, unpriced = compare(book, uses)
    if plot:
        _write(plot, bars(bills))
    said = _as_json(bills, unpriced, booked) if as_json else None
    print(json.dumps(said, indent=2) if said else "\n".join(table(bills, unpriced, booked)))


def _refuse(why: str, **flags: object) -> None:
    """Raises ConfigError if one of these was given: it would change nothing."""
    for name, value in flags.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


@dataclass(frozen=True, slots=True)
class Booked:
    """What a ledger has: how many requests, and what they were charged, in USD."""

    requests: int
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Bill:
    """What one model would charge for the workload, by class of tokens, in USD."""

    model: str
    hit: Decimal
    miss: Decimal
    output: Decimal
    note: str

    @property
    def total(self) -> Decimal:
        """All of it."""
        return self.hit + self.miss + self.output


def count(flag: str, text: str) -> int:
    """A number of tokens with an optional K, M or B. Raises ConfigError."""
    found = _COUNT.fullmatch(text.strip().upper())
    if not found:
        raise ConfigError(f"{flag} '{text}' is no number of tokens: write 500, 20K, 10M or 1.5B")
    return int(Decimal(found[1]) * _UNITS[found[2]])


def compare(book: PriceBook, uses: Sequence[Use]) -> tuple[list[Bill], list[str]]:
    """The bill of every model that has a price at all these moments, cheapest first, and why the others have none.

    Raises ConfigError if none has a price.
    """
    bills, unpriced = [], []
    for model in book.models:
        try:
            bills.append(_bill(book, model, uses))
        except ConfigError as error:
            unpriced.append(str(error))
    if not bills:
        raise ConfigError(f"no model has a price at {uses[0][0]:%F %R} UTC: the first lists are of 2026-04-24")
    return sorted(bills, key=lambda bill: (bill.total, bill.model)), unpriced


def _bill(book: PriceBook, model: str, uses: Sequence[Use]) -> Bill:
    from fathom.server.prices import Tokens

    hit = miss = output = Decimal(0)
    notes: dict[str, None] = {}
    for moment, tokens in uses:
        price = book.price(model, moment)
        hit += price.amount(Tokens(hit=tokens.hit), moment)
        miss += price.amount(Tokens(miss=tokens.miss), moment)
        output += price.amount(Tokens(output=tokens.output), moment)
        notes[price.note] = None
    return Bill(model, hit, miss, output, "; ".join(filter(None, notes)))


def _booked(url: str, since: datetime | None, until: datetime | None) -> tuple[list[Use], Booked]:
    from fathom.server.database import open_database
    from fathom.server.metering import read_rows
    from fathom.server.prices import Tokens

    database = open_database(url, create=False)
    uses, amount = [], Decimal(0)
    for row in read_rows(database, since, until):
        uses.append((row.at, Tokens(row.hit, row.miss, row.output)))
        amount += row.amount
    database.dispose()
    if not uses:
        raise ConfigError("the ledger has no requests in this period")
    return uses, Booked(len(uses), amount)


def table(bills: Sequence[Bill], unpriced: Sequence[str] = (), booked: Booked | None = None) -> list[str]:
    """A Markdown table, the notes of its rows, what is missing, and what was charged."""
    lines = ["| model | cached prompt | new prompt | output | USD |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {b.model} | {_usd(b.hit)} | {_usd(b.miss)} | {_usd(b.output)} | {_usd(b.total)} |" for b in bills]
    notes = [f"{b.model}: {b.note}" for b in bills if b.note] + [f"left out: {why}" for why in unpriced]
    charged = [f"booked: {booked.requests:,} requests, {_usd(booked.amount)} USD"] if booked else []
    return [*lines, "", *notes, *charged]


def bars(bills: Sequence[Bill]) -> str:
    """The totals as horizontal bars on a linear scale: an SVG document with a light background."""
    row, left, wide = 34, 170, 420
    height, most = row * len(bills) + 20, max(b.total for b in bills) or Decimal(1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 130} {height}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        "<title>What the workload costs on each model, in USD</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for n, bill in enumerate(bills):
        y, length = 10 + n * row, float(bill.total / most) * wide
        colour = "#2563eb" if bill.model.startswith("deepseek") else "#9ca3af"
        parts.append(f'<text x="{left - 10}" y="{y + 19}" text-anchor="end" fill="#111827">{escape(bill.model)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 4}" width="{max(length, 1):.1f}" height="22" fill="{colour}"/>')
        parts.append(f'<text x="{left + length + 8:.1f}" y="{y + 19}" fill="#111827">${_usd(bill.total)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _usd(amount: Decimal) -> str:
    """Two decimals, more where the first two say nothing."""
    return f"{amount:,.2f}" if amount == 0 or amount >= Decimal("0.1") else f"{amount:.2g}"


def _moment(flag: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{flag} '{text}' is no day: write 2026-09-10 or 2026-09-10T06:00") from None
    return moment.replace(tzinfo=moment.tzinfo or UTC)


def _as_json(bills: Sequence[Bill], unpriced: Sequence[str], booked: Booked | None) -> dict[str, Any]:
    keys = ("hit", "miss", "output", "total")
    return {
        "currency": "USD",
        "models": {b.model: {k: str(getattr(b, k)) for k in keys} | {"note": b.note} for b in bills},
        "left_out": list(unpriced),
    } | ({"booked": {"requests": booked.requests, "total": str(booked.amount)}} if booked else {})


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
