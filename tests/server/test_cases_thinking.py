"""Cases 20 to 32 of reference api D.3: thinking on and off, and where it ends."""

from __future__ import annotations

from typing import Any

import pytest
from openai import APIStatusError

from tests.server.harness import (
    MODEL,
    OFF,
    PARIS,
    T1,
    Site,
    block,
    chunks,
    joined,
    leaks,
    result,
    said,
    user,
)

SAID = "Let me see.</think>It is four."


def shown(site: Site, script: str, **fields: Any) -> tuple[str | None, str, str]:
    """Reasoning (None if the field is missing), content and finish of a scripted answer, streamed and not the same."""
    site.script(script)
    whole = site.chat(**fields).json()["choices"][0]
    raw = site.chat(stream=True, **fields).text
    message = whole["message"]
    assert not leaks(message), message
    assert joined(raw, "content") == message["content"]
    assert joined(raw, "reasoning_content") == (message.get("reasoning_content") or "")
    finishes = [c["finish_reason"] for chunk in chunks(raw) for c in chunk["choices"] if c["finish_reason"]]
    assert finishes == [whole["finish_reason"]]
    return message.get("reasoning_content"), message["content"], whole["finish_reason"]


def thinks(site: Site, **fields: Any) -> bool:
    """Whether a request thinks: by its prompt, its answer and its usage, which must agree."""
    site.script(SAID, "It is four.")
    answer = site.openai().chat.completions.create(model=MODEL, messages=[user("2+2?")], **fields)
    open_prompt = site.prompt_text().endswith("<think>")
    if not open_prompt:
        answer = site.openai().chat.completions.create(model=MODEL, messages=[user("2+2?")], **fields)
    message = answer.choices[0].message.model_dump()
    assert message["content"] == "It is four."
    details = (answer.usage.model_dump().get("completion_tokens_details") or {}) if answer.usage else {}
    assert bool(message.get("reasoning_content")) == open_prompt == bool(details.get("reasoning_tokens"))
    return open_prompt


def test_case_20_thinking_is_on(site: Site) -> None:
    assert thinks(site)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"extra_body": OFF}, id="21 disabled"),
        pytest.param({"reasoning_effort": "none"}, id="22 effort none"),
        pytest.param({"extra_body": OFF, "reasoning_effort": "max"}, id="23 disabled wins over effort"),
    ],
)
def test_cases_21_to_23_thinking_off(site: Site, fields: dict[str, Any]) -> None:
    assert not thinks(site, **fields)


@pytest.mark.parametrize("value", ["bogus", "", 3, ["high"], {"level": "high"}])
def test_case_24_an_unknown_effort(site: Site, value: object) -> None:
    for answer in (
        site.chat(reasoning_effort=value),
        site.messages(output_config={"effort": value}),
        site.responses(reasoning={"effort": value}),
    ):
        assert answer.status_code in (400, 422)
        assert "error" in answer.json()


@pytest.mark.parametrize(
    "extra",
    [
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
    ],
)
def test_case_25_thinking_off_as_for_other_servers(site: Site, extra: dict[str, Any]) -> None:
    assert not thinks(site, extra_body=extra)


@pytest.mark.parametrize(
    ("script", "reasoning", "content"),
    [
        ("abc</think>xyz", "abc", "xyz"),
        ("a\n\nb c</think>x\n\n y z", "a\n\nb c", "x\n\n y z"),
        (" abc </think> xyz ", " abc ", " xyz "),
    ],
)
def test_case_26_exactly_what_was_said(site: Site, script: str, reasoning: str, content: str) -> None:
    """Outer newlines are the library's business (it trims them beside the border); all else stays."""
    assert shown(site, script) == (reasoning, content, "stop")


def test_case_27_cut_while_thinking(site: Site) -> None:
    script = "I was about to say that"
    cut = len(site.ids(script)) - 2
    reasoning, content, finish = shown(site, script, max_tokens=cut)
    assert reasoning == site.codec.tokenizer.decode(site.ids(script)[:cut])
    assert (content, finish) == ("", "length")


def test_case_28_a_stray_end_of_thinking(site: Site) -> None:
    assert shown(site, "</think>hi", **OFF) == (None, "hi", "stop")
    assert shown(site, "a</think>b</think>c") == ("a", "bc", "stop")


def test_case_29_thinking_opened_twice(site: Site) -> None:
    assert shown(site, "<think>abc</think>x") == ("abc", "x", "stop")


def test_case_30_reasoning_of_earlier_turns_is_dropped(site: Site) -> None:
    site.script("</think>4")
    turns = [
        {"role": "system", "content": "You are helpful."},
        user("1+1?"),
        said("2", reasoning_content="easy"),
        user("2+2?"),
    ]
    assert site.chat(messages=turns).status_code == 200
    assert site.prompt_text() == (
        "<｜begin▁of▁sentence｜>You are helpful.<｜User｜>1+1?<｜Assistant｜></think>2<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜><think>"
    )


def forgotten(call: str) -> list[dict[str, Any]]:
    """A tool turn that came back without its reasoning."""
    calls = [
        {
            "id": call,
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'},
        }
    ]
    return [user("What is it like outside, and who still knows why?"), said("", tool_calls=calls), result(call, "18C")]


def test_case_31_missing_reasoning_is_an_empty_block(site: Site) -> None:
    site.script("</think>ok")
    assert site.chat(messages=forgotten("call_00_unknown"), tools=[T1]).status_code == 200
    assert "<｜Assistant｜><think></think>" + block(PARIS) in site.prompt_text()


def test_case_31_strict_refuses_missing_reasoning(strict: Site) -> None:
    strict.script("</think>ok")
    with pytest.raises(APIStatusError) as refused:
        strict.openai().chat.completions.create(model=MODEL, messages=forgotten("call_00_unknown"), tools=[T1])
    assert refused.value.status_code == 400
    assert "The `reasoning_content` in the thinking mode must be passed back to the API." in str(refused.value)


def test_case_32_temperature_zero(site: Site) -> None:
    assert thinks(site, temperature=0)
    assert site.relay.inner.requests[-1].params.temperature == 0
