"""`fathom cost`: the project's example, the parts of a bill, wrong flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fathom.cli.main import run
from fathom.server.database import open_database
from fathom.server.metering import Meter, Row

Bills = Callable[..., dict[str, dict[str, str]]]


@pytest.fixture
def bills(capsys: pytest.CaptureFixture[str]) -> Bills:
    def ask(*arguments: str) -> dict[str, dict[str, str]]:
        assert run(["cost", *arguments, "--json"]) == 0
        models: dict[str, dict[str, str]] = json.loads(capsys.readouterr().out)["models"]
        return models

    return ask


def test_the_projects_example(bills: Bills) -> None:
    found = bills("--output-tokens", "100M")
    wanted = {"opus-4.7": 2500, "deepseek-v4-pro": 348, "gpt-5.5": 3000}
    assert {model: Decimal(found[model]["total"]) for model in wanted} == wanted


def test_a_bill_by_hand_at_a_peak_hour(bills: Bills) -> None:
    flags = ("--input-tokens", "10M", "--hit-rate", "0.9", "--output-tokens", "1M", "--prices", "2026-09-14T07:00")
    pro = bills(*flags)["deepseek-v4-pro"]
    # A Monday, 07:00 UTC: twice 0.022 / 0.66 / 1.98 for 9, 1 and 1 million tokens.
    assert [Decimal(pro[k]) for k in ("hit", "miss", "output", "total")] == [
        Decimal(x) for x in ("0.396", "1.32", "3.96", "5.676")
    ]


def test_the_table_says_where_a_hit_has_no_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cost", "--input-tokens", "1M"]) == 0
    said = capsys.readouterr().out
    assert "| opus-4.7 | 0.00 | 5.00 | 2,500.00 | 2,505.00 |" in said
    assert "opus-4.7: no price of a cache hit is known: charged as a miss" in said


def test_the_picture_has_a_bar_for_every_model(tmp_path: Path) -> None:
    assert run(["cost", "--plot", str(tmp_path / "c.svg")]) == 0
    tree = ElementTree.parse(tmp_path / "c.svg")
    texts = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "gpt-5.5" in texts and "$3,000.00" in texts


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output-tokens", "ten"), "--output-tokens 'ten' is no number of tokens"),
        (("--hit-rate", "1.5"), "--hit-rate 1.5 is out of range"),
        (("--since", "2026-09-01"), "--since means nothing without --ledger"),
        (("--ledger", "sqlite:///no.db", "--output-tokens", "5M"), "--output-tokens cannot go with --ledger"),
        (("--ledger", "sqlite:///no.db", "--hit-rate", "0"), "--hit-rate cannot go with --ledger"),
        (("--ledger", "mysql://me:secret@host/name"), "mysql://me:***@host/name is neither"),
        (("--prices", "soon"), "--prices 'soon' is no day"),
        (("--prices", "2020-01-01"), "no model has a price at 2020-01-01"),
        (("--list", "missing.csv"), "price list missing.csv cannot be read"),
    ],
)
def test_wrong_flags_are_one_line(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cost", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and words in said.err and said.err.count("\n") == 1


def test_a_ledger_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cost", "--ledger", f"sqlite:///{tmp_path}/typo.db"]) == 2
    assert f"there is no database {tmp_path}/typo.db" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_ledger_says_what_it_would_have_cost_elsewhere(
    tmp_path: Path, bills: Bills, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    database = open_database(url)
    meter = Meter(database, tmp_path / "journal")
    for n, day in enumerate((1, 20, 21)):
        use = {"hit": 10**6, "miss": 2 * 10**6, "output": 10**6, "reasoning": 0, "first_ms": 1, "total_ms": 2}
        names = {"id": str(n), "protocol": "chat", "model": "m", "finish": "stop", "price": "p"}
        at = datetime(2026, 9, day, 12, tzinfo=UTC)
        meter.book(Row(at=at, key=None, amount=Decimal("0.1") * n, **use, **names))  # type: ignore[arg-type]
    meter.close()
    database.dispose()
    flash = bills("--ledger", url)["deepseek-v4-flash"]
    # Off-peak: 0.007 / 0.22 / 0.66 on the first, 0.003 / 0.15 / 0.60 on the others.
    assert Decimal(flash["total"]) == Decimal("1.107") + 2 * Decimal("0.903")
    assert Decimal(bills("--ledger", url, "--since", "2026-09-21")["opus-4.7"]["total"]) == 3 * 5 + 25
    mine = tmp_path / "mine.csv"
    mine.write_text("model,from,until,hit,miss,output,peak_factor,peak_hours,note\nmine,2026-09-21T00:00Z,,1,1,1,,,\n")
    assert run(["cost", "--ledger", url, "--list", str(mine)]) == 0
    said = capsys.readouterr().out
    assert "left out: no price for 'mine' at 2026-09-01 12:00 UTC" in said and "| mine |" not in said
    assert said.splitlines()[-1] == "booked: 3 requests, 0.30 USD"
    assert run(["cost", "--ledger", url, "--since", "2027-01-01"]) == 2
