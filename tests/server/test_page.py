"""The page in a real headless Chromium, against a scripted engine and a real server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import Site, block, invoke

pytestmark = pytest.mark.external

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


@pytest.fixture(params=["wide", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, site: Site) -> Iterator[Any]:
    wide = request.param == "wide"
    size = {"width": 1100, "height": 760} if wide else {"width": 390, "height": 780}
    context = browser.new_context(viewport=size, color_scheme="light" if wide else "dark")
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on(
        "console", lambda line: faults.append(line.text) if line.type == "error" and "400" not in line.text else None
    )
    foreign: list[str] = []
    opened.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((site.url, "data:")) else None)
    opened.goto(site.url)
    opened.set_default_timeout(8000)
    yield opened
    assert not faults and not foreign
    context.close()


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def last(page: Any) -> Any:
    return page.locator("#turns > li.assistant").last


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


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
    shot(page, "chat-wide" if page.viewport_size["width"] > 500 else "chat-phone")


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
    page.locator("button", has_text="Edit").first.click()
    assert page.input_value("#input") == "Talk" and page.locator("#turns > li").count() == 0


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


def test_a_refusal_is_shown_in_words(page: Any, site: Site) -> None:
    site.script("ok", context=4)
    ask(page, "too long for four tokens")
    last(page).get_by_text("the context holds 4").wait_for()


def test_the_second_view_by_keyboard(page: Any, site: Site) -> None:
    site.script("</think>Hello!")
    ask(page, "hello")
    last(page).locator(".foot button").wait_for()
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#now dd").first.wait_for()
    assert page.locator("#tab-load").get_attribute("aria-selected") == "true"
    assert page.locator("#now dd").nth(2).inner_text().isdigit() and page.locator("#history polyline").count() == 2
    shot(page, "load-wide" if page.viewport_size["width"] > 500 else "load-phone")
