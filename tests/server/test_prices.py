"""Price lists: the published figures, an audit by an independent reading, and refusals with the line."""

from __future__ import annotations

import csv
import random
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import pytest

from fathom.errors import ConfigError
from fathom.server.prices import LAUNCH, LISTS, PriceBook, Tokens

HEADER = "model,from,until,hit,miss,output,peak_factor,peak_hours,note\n"


@pytest.mark.parametrize(
    ("model", "usd"),
    [("opus-4.7", 2500), ("deepseek-v4-pro", 348), ("gpt-5.5", 3000), ("gpt-5.4", 1500), ("deepseek-v4-flash", 28)],
)
def test_a_hundred_million_output_tokens_cost_what_was_announced(model: str, usd: int) -> None:
    assert PriceBook.load().amount(model, Tokens(output=100_000_000), LAUNCH) == usd


def published(model: str, at: datetime) -> tuple[str, str, str]:
    """Reference api B.12, written down a second time as conditions; peak doubling included."""
    pro = model == "deepseek-v4-pro"
    if at < datetime(2026, 4, 26, 12, 15, tzinfo=UTC):
        return ("0.145", "1.74", "3.48") if pro else ("0.028", "0.14", "0.28")
    if at < datetime(2026, 8, 16, 16, tzinfo=UTC):
        return ("0.003625", "0.435", "0.87") if pro else ("0.0028", "0.14", "0.28")
    double = at.isoweekday() <= 5 and (at.hour in (1, 2, 3) or at.hour in (6, 7, 8, 9))
    if pro:
        row = ("0.022", "0.66", "1.98")
    else:
        row = ("0.007", "0.22", "0.66") if at < datetime(2026, 9, 10, 4, tzinfo=UTC) else ("0.003", "0.15", "0.60")
    return tuple(str(Fraction(x) * (2 if double else 1)) for x in row)  # type: ignore[return-value]


def test_an_audit_of_random_requests_finds_no_difference() -> None:
    rng, book = random.Random(4), PriceBook.load()
    changes = [datetime(2026, 4, 26, 12, 15), datetime(2026, 8, 16, 16), datetime(2026, 9, 10, 4)]
    for n in range(10_000):
        model = rng.choice(("deepseek-v4-pro", "deepseek-v4-flash"))
        if n % 2:
            at = rng.choice(changes).replace(tzinfo=UTC) + timedelta(seconds=rng.randint(-2, 2))
        else:
            at = LAUNCH + timedelta(seconds=rng.randrange(250 * 86_400))
        if n % 4 == 0:
            at = at.replace(hour=rng.choice((1, 4, 6, 10)), minute=0, second=0) - timedelta(microseconds=n % 8 // 4)
        tokens = Tokens(rng.randrange(10**6), rng.randrange(10**6), rng.randrange(10**5))
        hit, miss, output = map(Fraction, published(model, at))
        wanted = (tokens.hit * hit + tokens.miss * miss + tokens.output * output) / 10**6
        assert Fraction(book.amount(model, tokens, at)) == wanted, (model, at, tokens)


def test_a_hit_without_a_price_costs_what_a_miss_does_and_the_list_says_so() -> None:
    book = PriceBook.load()
    for model in ("opus-4.7", "gpt-5.5", "gpt-5.4"):
        assert book.amount(model, Tokens(hit=7), LAUNCH) == book.amount(model, Tokens(miss=7), LAUNCH)
        assert "charged as a miss" in book.price(model, LAUNCH).note


def test_every_row_that_is_not_certain_says_so() -> None:
    rows = [line for line in (LISTS / "deepseek.csv").read_text().splitlines() if not line.startswith("#")]
    notes = {(r["model"], r["from"]): r["note"] for r in csv.DictReader(rows)}
    assert "inferred" in notes["deepseek-v4-flash", "2026-08-16T16:00Z"]


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        (
            "m,2026-01-01T00:00Z,2026-02-01T00:00Z,1,2,3,,,\nm,2026-02-02T00:00Z,,1,2,3,,,",
            3,
            "no price from 2026-02-01",
        ),
        ("m,2026-01-01T00:00Z,2026-02-01T00:00Z,1,2,3,,,\nm,2026-01-31T00:00Z,,1,2,3,,,", 3, "overlaps"),
        ("m,2026-01-01T00:00Z,,1,2,3,,,\nm,2026-01-31T00:00Z,,1,2,3,,,", 3, "overlaps"),
        ("m,2026-02-01T00:00Z,2026-01-01T00:00Z,1,2,3,,,", 2, "ends before it begins"),
        ("m,2026-01-01T00:00Z,,1,two,3,,,", 2, "'two' is no number"),
        ("m,2026-01-01T00:00Z,,1,-2,3,,,", 2, "-2 is no price"),
        ("m,2026-01-01T00:00Z,,1,NaN,3,,,", 2, "no price"),
        ("m,yesterday,,1,2,3,,,", 2, "'yesterday' is no time"),
        ("m,2026-01-01T00:00,,1,2,3,,,", 2, "no time zone"),
        ("m,2026-01-01T00:00Z,,1,2,3,2,at noon,", 2, "peak hours 'at noon'"),
        ("m,2026-01-01T00:00Z,,1,2,3,2,Mon-Fri 04:00-01:00,", 2, "ends before it begins"),
        ("m,2026-01-01T00:00Z,,1,2,3,2,Mon-Fri 22:00-24:30,", 2, "no time of a day"),
        ("m,2026-01-01T00:00Z,,1,2,3,2,Mon-Fri 01:60-02:00,", 2, "no time of a day"),
        ("m,2026-01-01T00:00Z,,1,2,3,1000,Mon-Fri 01:00-02:00,", 2, "too large: below 100"),
        ("m,2026-01-01T00:00Z,,1,2,1e999999999,,,", 2, "too large: below 1000000"),
        ("m,2026-01-01T00:00Z,,1,2,0.1234567890123,,,", 2, "too fine"),
        ("m,0001-01-01T00:00+05:00,,1,2,3,,,", 2, "before the first"),
        ('m,2026-01-01T00:00Z,,1,2,3,,,"one\nand two"', 2, "one line of CSV"),
        ("m,2026-01-01T00:00Z,,1,2", 2, "5 columns where 9 are wanted"),
        (",2026-01-01T00:00Z,,1,2,3,,,", 2, "no name"),
    ],
)
def test_a_broken_list_is_refused_with_its_line(tmp_path: Path, rows: str, line: int, words: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + rows + "\n")
    with pytest.raises(ConfigError, match=f"mine.csv, line {line}: .*{words}"):
        PriceBook.load([path])


def test_peaks_over_a_weekend_and_to_midnight(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("\ufeff" + HEADER + "m,2026-01-01T00:00Z,,1,2,3,2.5,Fri-Mon 22:00-24:00,\n", encoding="utf-8")
    book, used = PriceBook.load([path]), Tokens(1, 10, 100)
    for hour in range(24 * 14):
        at = datetime(2026, 9, 14, 0, 59, 59, 999_999, tzinfo=UTC) + timedelta(hours=hour)
        double = at.strftime("%a") in ("Fri", "Sat", "Sun", "Mon") and at.hour >= 22
        assert Fraction(book.amount("m", used, at)) == Fraction(321, 10**6) * (Fraction(5, 2) if double else 1)


def test_no_price_that_a_list_may_have_is_ever_rounded(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    price, factor, tokens = "987654.123456789", "99.99", 9_999_999
    path.write_text(f"{HEADER}m,2026-01-01T00:00Z,,{price},{price},{price},{factor},Mon-Sun 00:00-24:00,\n")
    amount = PriceBook.load([path]).amount("m", Tokens(0, 0, tokens), LAUNCH)
    assert Fraction(amount) == Fraction(price) * Fraction(factor) * tokens / 10**6


def test_a_model_or_a_time_without_a_price_is_named() -> None:
    book = PriceBook.load()
    with pytest.raises(ConfigError, match="no prices for 'gpt-2': there are deepseek-v4-pro"):
        book.price("gpt-2", LAUNCH)
    with pytest.raises(ConfigError, match=r"no price for 'opus-4\.7' at 2026-04-23 23:59 UTC"):
        book.price("opus-4.7", LAUNCH - timedelta(minutes=1))
