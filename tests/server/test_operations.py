"""What can go wrong around a server: budgets that end in a stream, full disks, jumping clocks, forged keys; metrics."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import sqlalchemy as sa

from fathom.encoding.codec import Codec
from fathom.engine.stub import ScriptedEngine
from fathom.server import metering
from fathom.server.books import Books
from fathom.server.database import open_database
from fathom.server.keys import Keyring, Limits
from fathom.server.metering import Meter, Row, read_rows
from fathom.server.metrics import Metrics
from fathom.server.prices import Price, PriceBook
from fathom.server.settings import ServerSettings
from tests.server.conftest import Opener, desk
from tests.server.harness import MODEL, OFF, Site, eventually, serving, user
from tests.server.test_prices import published

DOLLAR_A_TOKEN = Price(MODEL, datetime(2026, 1, 1, tzinfo=UTC), None, None, Decimal(0), Decimal(10**6), None, "", "")


@dataclass
class House:
    """A server with keys and a ledger; `now` is its time of day, if set."""

    site: Site
    books: Books
    database: sa.Engine
    secret: str
    now: datetime | None = None

    def rows(self) -> list[Row]:
        """What is booked, once all is."""
        assert self.books.meter is not None
        assert eventually(lambda: self.books.meter.waiting == 0)
        return list(read_rows(self.database))

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [user("Hi")]} | OFF | fields
        return self.site.raw.post("/v1/chat/completions", json=body, headers=self.headers())


@contextlib.contextmanager
def opened(codec: Codec, folder: Path, prices: PriceBook | None = None, **limits: Any) -> Iterator[House]:
    database = open_database(f"sqlite:///{folder}/fathom.db")
    ring, engine = Keyring(database), ScriptedEngine([[]])
    _, secret = ring.create("ann", Limits(**limits))
    meter = Meter(database, folder / "journal")
    books = Books(Metrics(engine.status), prices or PriceBook.load(), MODEL, meter, ring)
    with serving(engine, codec, desk(codec), ServerSettings(), books=books) as site:
        house = House(site, books, database, secret)
        books.clock = lambda: house.now or datetime.now(UTC)
        yield house
    meter.close()
    database.dispose()


@pytest.fixture
def house(embedded: Codec, tmp_path: Path) -> Iterator[House]:
    with opened(embedded, tmp_path) as house:
        yield house


# --- a budget that ends in the middle of a stream


def by_chat(url: str, key: str) -> tuple[str, str]:
    """What came, and the reason of the end as the client knows it."""
    said = ""
    client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
    try:
        for chunk in client.chat.completions.create(
            model=MODEL, messages=[user("Hi")], stream=True, extra_body={**OFF, "max_tokens": 500}
        ):
            said += chunk.choices[0].delta.content or "" if chunk.choices else ""
    except openai.APIError as error:
        return said, str(error.code)
    return said, "no error"


def by_completions(url: str, key: str) -> tuple[str, str]:
    said = ""
    client = openai.OpenAI(base_url=url + "/beta", api_key=key, max_retries=0)
    try:
        for chunk in client.completions.create(model=MODEL, prompt="Hi", stream=True, max_tokens=500):
            said += chunk.choices[0].text
    except openai.APIError as error:
        return said, str(error.code)
    return said, "no error"


def by_responses(url: str, key: str) -> tuple[str, str]:
    said, reason = "", "no error"
    client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
    for event in client.responses.create(model=MODEL, input="Hi", stream=True, reasoning={"effort": "none"}):
        if event.type == "response.output_text.delta":
            said += event.delta
        if event.type == "response.failed":
            reason = str(event.response.error.code)
    return said, reason


def by_messages(url: str, key: str) -> tuple[str, str]:
    said = ""
    client = anthropic.Anthropic(base_url=url + "/anthropic", api_key=key, max_retries=0)
    asked: Any = {"model": MODEL, "max_tokens": 500, "messages": [user("Hi")], **OFF}
    try:
        for event in client.messages.create(**asked, stream=True):
            said += event.delta.text if event.type == "content_block_delta" else ""
    except anthropic.APIStatusError as error:
        return said, error.body["error"]["type"]
    return said, "no error"


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (by_chat, "insufficient_quota"),
        (by_completions, "insufficient_quota"),
        (by_responses, "insufficient_quota"),
        (by_messages, "billing_error"),
    ],
)
def test_a_budget_ends_a_stream_which_is_billed_for_what_it_gave(
    embedded: Codec, tmp_path: Path, ask: Callable[[str, str], tuple[str, str]], reason: str
) -> None:
    """A dollar a token and ten dollars: the answer of 200 digits ends at once after the eleventh, or a few later."""
    with opened(embedded, tmp_path, PriceBook([DOLLAR_A_TOKEN]), budget=Decimal(10)) as house:
        house.site.script(house.site.ids("7") * 200, delay=0.01)
        said, told = ask(house.site.url, house.secret)
        assert told == reason and set(said) == {"7"} and 11 <= len(said) < 20
        (row,) = house.rows()
        assert (row.output, row.amount, row.finish) == (len(said), len(said), "insufficient_quota")
        assert eventually(lambda: house.site.relay.status().running == 0)
        refused = house.chat()
        assert refused.status_code == 402 and refused.json()["error"]["code"] == "insufficient_quota"
        balance = httpx.get(house.site.url + "/user/balance", headers=house.headers()).json()
        assert balance["is_available"] is False and balance["balance_infos"][0]["total_balance"] == "0.00"
        assert len(house.rows()) == 1


def test_a_budget_that_ends_in_an_answer_which_is_not_streamed(embedded: Codec, tmp_path: Path) -> None:
    with opened(embedded, tmp_path, PriceBook([DOLLAR_A_TOKEN]), budget=Decimal(10)) as house:
        house.site.script(house.site.ids("7") * 200, delay=0.01)
        refused = house.chat(max_tokens=500)
        assert refused.status_code == 402 and "Insufficient Balance" in refused.json()["error"]["message"]
        assert [row.finish for row in house.rows()] == ["insufficient_quota"]


def test_case_11_the_balance_of_a_key_with_a_budget(embedded: Codec, tmp_path: Path) -> None:
    with opened(embedded, tmp_path, PriceBook([DOLLAR_A_TOKEN]), budget=Decimal("12.50")) as house:
        house.site.script("777")
        client = openai.OpenAI(base_url=house.site.url, api_key=house.secret)
        client.chat.completions.create(model=MODEL, messages=[user("Hi")], extra_body=OFF)
        balance: Any = client.get("/user/balance", cast_to=object)
        info = {"currency": "USD", "granted_balance": "0.00", "total_balance": "9.50", "topped_up_balance": "9.50"}
        assert balance == {"is_available": True, "balance_infos": [info]}


# --- a full disk


def test_a_full_disk_under_database_and_journal_does_not_stop_serving(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite may not grow, and the journal's file takes half a line and then nothing."""
    write, room = os.write, [100]

    def full(file: int, data: bytes) -> int:
        if file != house.books.meter._journal:
            return write(file, data)
        taken, room[0] = min(room[0], len(data)), 0
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:taken])

    assert house.chat().status_code == 200 and len(house.rows()) == 1
    freeze = sa.text("PRAGMA max_page_count = 1")
    sa.event.listen(house.database, "connect", lambda raw, _: raw.execute(freeze.text))
    house.database.dispose()
    fill = [metering.Row(**{f: getattr(house.rows()[0], f) for f in Row.__slots__} | {"id": "x" * 9000})]
    monkeypatch.setattr(metering.os, "write", full)
    house.books.meter.book(fill[0])
    answers = [house.chat() for _ in range(3)]
    assert [a.status_code for a in answers] == [200] * 3
    assert eventually(lambda: "full" in str(house.books.meter.trouble))
    ready = house.site.raw.get("/ready")
    assert ready.status_code == 200 and ready.json()["ledger"]["waiting"] == 4
    assert "full" in ready.json()["ledger"]["trouble"]
    assert "fathom_ledger_waiting_rows 4.0" in house.site.raw.get("/metrics").text
    assert "ledger: " in house.site.raw.get("/status", headers=house.headers()).json()["notes"][0]
    monkeypatch.setattr(metering.os, "write", write)
    sa.event.listen(house.database, "connect", lambda raw, _: raw.execute("PRAGMA max_page_count = 1073741823"))
    house.database.dispose()
    assert eventually(lambda: house.books.meter.waiting == 0, 20)
    assert house.site.raw.get("/ready").json()["ledger"] == {"waiting": 0, "trouble": None}
    assert house.chat().status_code == 200
    assert len(house.rows()) == 6 and house.site.raw.get("/ready").json()["ledger"]["trouble"] is None
    assert "fathom_ledger_waiting_rows 0.0" in house.site.raw.get("/metrics").text


def test_what_waits_in_memory_has_a_bound_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metering.os, "write", full)
    with house.database.begin() as connection:
        connection.execute(sa.text("ALTER TABLE requests RENAME TO elsewhere"))
    house.books.meter._limit = 3 * 350
    assert [house.chat().status_code for _ in range(5)] == [200, 200, 200, 503, 503]
    ready = house.site.raw.get("/ready")
    assert ready.status_code == 503 and ready.json()["status"] == "full"
    with house.database.begin() as connection:
        connection.execute(sa.text("ALTER TABLE elsewhere RENAME TO requests"))
    assert eventually(lambda: house.chat().status_code == 200, 20)
    assert len(house.rows()) == 4


def test_keys_that_are_known_are_served_and_shown_while_the_database_is_away(house: House) -> None:
    assert house.chat().status_code == 200 and len(house.rows()) == 1
    with house.database.begin() as connection:
        connection.execute(sa.text("ALTER TABLE keys RENAME TO elsewhere"))
    house.books.keyring._read_at = float("-inf")
    assert house.chat().status_code == 200
    shown = house.site.raw.get("/status", headers=house.headers())
    assert shown.status_code == 200
    assert [(row["key"].split()[0], row["requests"]) for row in shown.json()["ledger"]] == [("ann", 2)]


# --- a clock that jumps


def test_a_request_has_the_price_of_its_beginning_however_the_clock_jumps(house: House) -> None:
    """Around a change of prices that is also the end of a peak: forwards, backwards, forwards."""
    change = datetime(2026, 9, 10, 4, tzinfo=UTC)
    for at in (
        change - timedelta(seconds=1),
        change,
        change - timedelta(seconds=1),
        change + timedelta(days=2, hours=3),
    ):
        house.site.script(house.site.ids("7") * 20, delay=0.005)
        house.now = at
        with house.site.raw.stream(
            "POST", "/v1/chat/completions", headers=house.headers(),
            json={"model": MODEL, "messages": [user("Hi")], "stream": True, **OFF},
        ) as answer:  # fmt: skip
            parts = answer.iter_bytes()
            assert next(parts)
            house.now = change + (change - at) * 7
            assert b"[DONE]" in b"".join(parts)
    rows = house.rows()
    assert len(rows) == 4 and len({row.price for row in rows}) == 2
    for row in rows:
        assert row.total_ms >= row.first_ms >= 0
        _, miss, output = map(Fraction, published(row.model, row.at))
        assert row.price.endswith("04:00Z") == (row.at >= change)
        assert Fraction(row.amount) == (row.miss * miss + row.output * output) / 10**6


def test_a_clock_without_a_price_is_said_and_nothing_is_given_away(house: House) -> None:
    """A machine that has lost its time begins in 1970."""
    house.now = datetime(1970, 1, 1, tzinfo=UTC)
    refused = house.chat()
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert "the server's clock shows 1970-01-01 00:00 UTC" in refused.json()["error"]["message"]
    assert house.site.raw.get("/status", headers=house.headers()).json()["price"] is None
    house.now = None
    assert house.chat().status_code == 200 and len(house.rows()) == 1


# --- keys over HTTP


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Basic YW5uOg==", b"Bearer fk-\xff\xfe", b"Bearer ' OR 1=1 --", b"Bearer " + b"a" * 9000],
)
def test_forged_and_malformed_keys(house: House, value: bytes) -> None:
    body = {"model": MODEL, "messages": [user("Hi")]}
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
        refused = house.site.raw.post(path, json=body, headers={"authorization": value})
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
    for path in ("/status", "/user/balance"):
        assert house.site.raw.get(path, headers={"authorization": value}).status_code == 401
    assert house.rows() == []


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
def test_the_scheme_has_no_case(house: House, scheme: str) -> None:
    answer = house.site.raw.get("/user/balance", headers={"authorization": scheme + house.secret})
    assert answer.status_code == 200


def test_no_log_line_has_a_key_or_what_was_said(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.site.script("the answer")
    with caplog.at_level("INFO", logger="fathom.requests"):
        house.chat(messages=[user("a secret question")])
        house.site.raw.post("/v1/chat/completions", json={}, headers={"authorization": "Bearer fk-forged"})
    said = caplog.text
    assert '"protocol": "chat"' in said and '"output": ' in said
    assert not any(word in said for word in (house.secret, "fk-forged", "secret question", "the answer"))


# --- what Prometheus reads


def test_restored_tokens_by_tier(open_real: Opener, tmp_path: Path) -> None:
    """From the device while it lives, from the disk after a restart: as many as the clients were told."""
    ask = {"text": "7," * 300, "max_tokens": 1}
    told, counted = [], []
    for _ in range(2):
        with open_real(tmp_path) as site:
            hits = [site.chat(**ask).json()["usage"]["prompt_cache_hit_tokens"] for _ in range(2)]
            lines = [
                line for line in site.raw.get("/metrics").text.splitlines() if "fathom_restored_tokens_total{" in line
            ]
            counted.append({line.split('"')[1]: float(line.split()[-1]) for line in lines})
            told.append(hits)
            assert site.raw.get("/status").json()["restored"] == counted[-1]
    assert told[0][0] == 0 and told[0][1] == told[1][0] == told[1][1] > 0
    assert counted[0] == {"device": told[0][1], "host": 0, "disk": 0}
    assert counted[1] == {"device": told[1][1], "host": 0, "disk": told[1][0]}


@pytest.mark.external
def test_promtool_finds_nothing_wrong(open_real: Opener, house: House) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed")
    with open_real() as site:
        site.chat(max_tokens=2)
        house.chat()
        for text in (site.raw.get("/metrics").text, house.site.raw.get("/metrics").text):
            checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
            assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_dashboard_asks_for_metrics_that_exist(open_real: Opener) -> None:
    board = (Path(__file__).parents[2] / "deploy" / "grafana" / "fathom.json").read_text()
    with open_real() as site:
        site.chat(max_tokens=2)
        site.raw.post("/v1/chat/completions", content=b"{")
        text = site.raw.get("/metrics").text
    asked = set(re.findall(r"fathom_[a-z_]+", board)) - {"fathom_"}
    assert asked and not {name for name in asked if f"\n{name}" not in text}


# --- browsers of other origins


def preflight(site: Site, origin: str) -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    return site.raw.options("/v1/chat/completions", headers=headers)


def test_browsers_may_ask_from_the_origins_that_were_named_and_no_others(embedded: Codec, site: Site) -> None:
    mine, other = "https://chat.example", "https://other.example"
    with serving(ScriptedEngine([[]]), embedded, desk(embedded), ServerSettings(cors=(mine,))) as shared:
        assert preflight(shared, mine).headers["access-control-allow-origin"] == mine
        assert "x-api-key" in preflight(shared, mine).headers["access-control-allow-headers"]
        assert "access-control-allow-origin" not in preflight(shared, other).headers
        answer = shared.raw.get("/v1/models", headers={"origin": mine})
        assert answer.headers["access-control-allow-origin"] == mine
    assert "access-control-allow-origin" not in preflight(site, mine).headers
    assert "access-control-allow-origin" not in site.raw.get("/v1/models", headers={"origin": mine}).headers
