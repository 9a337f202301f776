"""The page in a real headless Chromium, against a scripted engine and a real server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest

from fathom.encoding.codec import Codec
from fathom.engine.llm import LLM
from fathom.engine.memory import Memory
from fathom.engine.stub import ScriptedEngine
from fathom.server.books import Books
from fathom.server.database import open_database
from fathom.server.keys import Keyring, Limits
from fathom.server.metering import Meter
from fathom.server.metrics import Metrics
from fathom.server.prices import PriceBook
from fathom.server.settings import ServerSettings
from tests.server.conftest import desk
from tests.server.harness import MODEL, Site, block, invoke, serving

pytestmark = pytest.mark.external

SIZES = ("wide", "phone")

COUNTED = ("requests", "hit", "miss", "output")

SHOTS = os.environ.get("FATHOM_SCREENSHOTS")

HOSTILE = '<img src=x onerror="document.title=\'run\'"><script>document.title="run"</script><b>bold</b>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if not path:
        pytest.skip("chromium is not installed")
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with sync.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=path, args=[*quiet, "--disable-sync", "--no-first-run"])
        yield opened
        opened.close()


@contextlib.contextmanager
def opened(browser: Any, site: Site, size: str) -> Iterator[Any]:
    """The page, light and wide or dark and narrow; at its end nothing has failed and nobody else was asked."""
    viewport = {"width": 1100, "height": 760} if size == "wide" else {"width": 390, "height": 780}
    context = browser.new_context(viewport=viewport, color_scheme="light" if size == "wide" else "dark")
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda line: faults.append(line.text) if line.type == "error" and "40" not in line.text else None
    )
    foreign: list[str] = []
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((site.url, "data:")) else None)
    page.goto(site.url)
    page.set_default_timeout(8000)
    yield page
    assert not faults and not foreign
    context.close()


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Any, site: Site) -> Iterator[Any]:
    with opened(browser, site, request.param) as page:
        yield page


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def last(page: Any) -> Any:
    return page.locator("#turns > li.assistant").last


def answered(page: Any, n: int) -> None:
    """Wait for the end of the nth answer."""
    page.locator("#turns > li.assistant > .foot button").nth(n - 1).wait_for()


def shot(page: Any, name: str) -> None:
    if SHOTS:
        size = "wide" if page.viewport_size["width"] > 500 else "phone"
        page.screenshot(path=str(Path(SHOTS) / f"{name}-{size}.png"))


def test_a_turn_streams_folds_its_thinking_and_says_what_it_cost(page: Any, site: Site) -> None:
    site.script("Let me add: 17 and 25.</think>It is **42**.\n\n```python\nprint(17 + 25)\n```")
    ask(page, "What is 17 + 25?")
    last(page).locator(".foot button").wait_for()
    assert last(page).locator("summary").inner_text().startswith("Thought for")
    assert not last(page).locator("details").get_attribute("open")
    assert (
        last(page).locator("strong").inner_text() == "42" and "print(17 + 25)" in last(page).locator("pre").inner_text()
    )
    assert (
        page.locator("#turn-cost").inner_text().startswith("$0.0")
        and " of " in page.locator("#context-text").inner_text()
    )
    assert page.locator("#announce").inner_text().startswith("It is")


def test_markup_is_shown_and_never_run(page: Any, site: Site) -> None:
    site.script(f"{HOSTILE}</think>{HOSTILE}\n`{HOSTILE}`")
    ask(page, HOSTILE)
    last(page).locator(".foot button").wait_for()
    assert page.locator("#turns img, #turns script, #turns b").count() == 0
    assert page.title() == "Fathom" and HOSTILE in page.locator(".bubble").last.inner_text()


def test_stop_edit_retry_and_effort(page: Any, site: Site) -> None:
    site.script("</think>" + "word " * 400, delay=0.02)
    page.locator("label", has_text="none").click()
    ask(page, "Talk")
    last(page).locator(".text", has_text="word word word").wait_for()
    page.keyboard.press("Escape")
    last(page).get_by_text("Stopped.").wait_for()
    assert site.prompt_text().endswith("</think>")
    site.script("</think>again")
    last(page).locator("button", has_text="Retry").click()
    last(page).get_by_text("again").wait_for()
    both = page.locator("#total-cost").inner_text()
    assert both.startswith("over $0.0"), "what came before the stop was billed, too"
    page.locator("button", has_text="Edit").first.click()
    assert page.input_value("#input") == "Talk" and page.locator("#turns > li").count() == 0
    assert page.locator("#total-cost").inner_text() == both
    page.locator("#new").click()
    figures = ("#total-cost", "#turn-cost", "#hit-text", "#speed", "#context-text")
    shown = [page.locator(name).inner_text() for name in figures]
    assert shown[:4] == ["–"] * 4 and shown[4].startswith("0 of ")


def test_the_last_question_comes_back_with_the_arrow_key(page: Any, site: Site) -> None:
    site.script("</think>first", "</think>second")
    for n, text in enumerate(("One", "Two"), 1):
        ask(page, text)
        answered(page, n)
    page.keyboard.press("ArrowUp")
    assert page.input_value("#input") == "Two" and page.locator("#turns > li").count() == 2


def test_an_answer_that_failed_or_was_stopped_in_its_thoughts_is_no_part_of_what_follows(page: Any, site: Site) -> None:
    site.script("ok", context=4)
    ask(page, "too long for four tokens")
    last(page).get_by_text("the context holds 4").wait_for()
    site.script("thought " * 400, delay=0.02)
    ask(page, "Second.")
    last(page).locator(".thinking div", has_text="thought thought").wait_for(state="attached")
    page.keyboard.press("Escape")
    last(page).get_by_text("Stopped.").wait_for()
    site.script("</think>fine")
    ask(page, "Third.")
    last(page).get_by_text("fine").wait_for()
    assert "too long for four tokens\n\nSecond.\n\nThird." in site.prompt_text()


def test_a_price_is_that_of_the_moment(browser: Any, embedded: Codec) -> None:
    """The page stays open over the beginning of a peak, when prices double."""
    engine, costs = ScriptedEngine([[]]), []
    books = Books(Metrics(engine.status), PriceBook.load(), MODEL)
    with (
        serving(engine, embedded, desk(embedded), ServerSettings(), books=books) as site,
        opened(browser, site, "wide") as page,
    ):
        for at in (datetime(2026, 9, 14, 0, 59, tzinfo=UTC), datetime(2026, 9, 14, 1, tzinfo=UTC)):
            books.clock = lambda at=at: at
            site.script("</think>Hello!")
            page.locator("#new").click()
            ask(page, "hello")
            answered(page, 1)
            costs.append(float(page.locator("#turn-cost").inner_text().strip("$")))
    assert costs[1] == pytest.approx(2 * costs[0], rel=0.03)


def test_a_tool_is_called_and_its_result_given(page: Any, site: Site) -> None:
    site.script(
        "Hm.</think>Let me look." + block(invoke("get_weather", ("city", "true", "Paris <i>"))), "</think>18 degrees."
    )
    page.locator("#settings summary").click()
    page.fill("#tools", '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]')
    page.fill("#system", "Be brief.")
    page.locator("#settings summary").click()
    ask(page, "Weather?")
    field = page.get_by_label("Result of get_weather")
    field.wait_for()
    assert '"Paris <i>"' in page.locator(".call pre").first.inner_text()
    field.fill("18C")
    page.keyboard.press("Enter")
    last(page).get_by_text("18 degrees.").wait_for()
    assert "Be brief." in site.prompt_text() and "<tool_result>18C</tool_result>" in site.prompt_text()


def test_the_conversation_goes_on_without_the_result_of_a_tool(page: Any, site: Site) -> None:
    call = block(invoke("get_weather", ("city", "true", "Paris")), invoke("get_weather", ("city", "true", "Rome")))
    site.script("Hm.</think>Let me look." + call, "</think>Then not.")
    page.locator("#settings summary").click()
    page.fill("#tools", '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]')
    page.locator("#settings summary").click()
    ask(page, "Weather?")
    page.get_by_label("Result of get_weather").first.fill("18C")
    page.keyboard.press("Enter")
    ask(page, "Never mind.")
    last(page).get_by_text("Then not.").wait_for()
    assert page.locator(".call form").count() == 0
    assert "18C" in site.prompt_text() and "Never mind." in site.prompt_text()


def test_a_refusal_is_shown_in_words(page: Any, site: Site) -> None:
    site.script("ok", context=4)
    ask(page, "too long for four tokens")
    last(page).get_by_text("the context holds 4").wait_for()


LONGER = """Python keeps it short: `sorted` takes a key.

```python
words = ["pear", "fig", "banana"]
print(sorted(words, key=len))
```

It sorts by length: **fig**, **pear**, **banana**. Equal lengths keep their order, because the sort is stable."""


def test_a_conversation_is_counted(page: Any, site: Site) -> None:
    """Two turns, in a speed that can be read: what the second found in the cache, and what both cost."""
    site.script("A key function is enough.</think>" + LONGER, "Reverse it.</think>Add `reverse=True`.", delay=0.01)
    page.locator("#settings summary").click()
    page.fill("#system", "Answer briefly, with code where it helps. " * 14)
    page.locator("#settings summary").click()
    ask(page, "Sort words by their length in Python, please.")
    last(page).locator(".foot button").wait_for()
    first = page.locator("#turn-cost").inner_text()
    ask(page, "And the longest first?")
    answered(page, 2)
    hit, prompt = (int(n) for n in page.locator("#hit-text").inner_text().split(" of "))
    shared = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(site.prompt(0), site.prompt(1), strict=False))
    )
    assert 0 < hit == shared // 128 * 128 and prompt == len(site.prompt(1))
    turn, both = page.locator("#turn-cost").inner_text(), page.locator("#total-cost").inner_text()
    assert float(first.strip("$")) + float(turn.strip("$")) == pytest.approx(float(both.strip("$")), rel=0.1)
    # A hundred a second; more on a busy machine, where the first ones arrive together.
    assert 10 < int(page.locator("#speed").inner_text().split()[0]) <= 150
    last(page).locator("summary").click()
    page.locator("#input").focus()
    page.locator("#chat").evaluate("view => { view.scrollTop = view.scrollHeight; }")
    shot(page, "chat")


def test_the_second_view_by_keyboard(page: Any, site: Site) -> None:
    site.script("</think>Hello!")
    ask(page, "hello")
    last(page).locator(".foot button").wait_for()
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#now dd").first.wait_for()
    assert page.locator("#tab-load").get_attribute("aria-selected") == "true"
    assert page.locator("#now dd").nth(2).inner_text().isdigit() and page.locator("#history polyline").count() == 2


def test_axe_finds_nothing_that_a_screen_reader_would_stumble_over(page: Any, site: Site) -> None:
    """Both views by the rules of axe-core: names, roles, landmarks, contrast, reach by keyboard."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def broken() -> list[str]:
        found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
        return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]

    assert broken() == []
    site.script(f"Hm.</think>**Look**:\n```\n{'x' * 200}\n```" + block(invoke("get_weather", ("city", "true", "Rome"))))
    page.locator("#settings summary").click()
    page.fill("#tools", '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]')
    ask(page, "Weather?")
    page.get_by_label("Result of get_weather").wait_for()
    last(page).locator("summary").click()
    assert broken() == []
    page.locator("#tab-load").click()
    page.locator("#now dd").first.wait_for()
    assert broken() == []


@pytest.fixture(scope="module")
def house(embedded: Codec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, str]]:
    """The embedded model with all tiers, a ledger and keys; and one key."""
    folder = tmp_path_factory.mktemp("house")
    database = open_database(f"sqlite:///{folder}/fathom.db")
    ring, meter = Keyring(database), Meter(database, folder / "journal")
    _, secret = ring.create("ann", Limits())
    llm = LLM.load("small", memory=Memory(device=64 << 20, host=64 << 20, disk=256 << 20, folder=folder / "kv"))
    books = Books(Metrics(llm.status), PriceBook.load(), MODEL, meter, ring)
    with serving(llm, embedded, desk(embedded, llm.context), ServerSettings(), books=books) as site:
        yield site, secret
    llm.close()
    meter.close()


def chatter(site: Site, secret: str, n: int, enough: Event) -> None:
    """One answer after the other, until it is enough."""
    asked = {"model": MODEL, "reasoning_effort": "max", "messages": [{"role": "user", "content": f"What is {n} + 25?"}]}
    while not enough.is_set():
        httpx.post(f"{site.url}/chat/completions", json=asked, headers={"x-api-key": secret}, timeout=60)


@pytest.mark.parametrize("size", SIZES)
def test_the_second_view_of_a_server_with_keys(browser: Any, house: tuple[Site, str], size: str) -> None:
    """Without a key it says why nothing is shown; with one, what each tier gave back and what this key has used."""
    site, secret = house
    with opened(browser, site, size) as page:
        page.locator("#tab-load").click()
        page.locator("#load-note", has_text="Authentication Fails").wait_for()
        page.locator("#tab-chat").click()
        page.locator("#settings summary").click()
        page.fill("#key", secret)
        page.fill("#system", "Answer in one line, and only what was asked for. " * 8)
        page.locator("#settings summary").click()
        for n, question in enumerate(("What is 17 + 25?", "What is 30 + 12?", "Hello!"), 1):
            ask(page, question)
            answered(page, n)
        page.locator("#tab-load").click()
        enough = Event()
        busy = [Thread(target=chatter, args=(site, secret, n, enough)) for n in range(6)]
        try:
            for thread in busy:
                thread.start()
                page.wait_for_timeout(1000)
            page.locator("#now dd").first.filter(has_text=re.compile("[1-9]")).wait_for()
            shot(page, "load")
        finally:
            enough.set()
        for thread in busy:
            while thread.is_alive():
                page.wait_for_timeout(100)
        page.wait_for_timeout(2500)
        assert page.locator(".tier").count() == 3
        shown = page.locator("#ledger tbody tr td").all_inner_texts()
        status = httpx.get(f"{site.url}/status", headers={"authorization": f"Bearer {secret}"}).json()
        assert shown[0].startswith("ann (") and shown[1:5] == [f"{status['ledger'][0][k]:,}" for k in COUNTED]
        given = [text.split()[0] for text in page.locator(".tier span:last-child").all_inner_texts()]
        assert given == [f"{n:,}" for n in status["restored"].values()]
        assert sum(status["restored"].values()) == status["ledger"][0]["hit"] > 0
