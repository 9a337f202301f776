"""Cases 12 to 19 of reference api D.3: the prompt that a request becomes, read off the engine's door."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest

from tests.encoding.vectors import GOLDEN, SCHEMA, WEATHER
from tests.server.harness import OFF, T1, T1_MESSAGES, T1_RESPONSES, Site, function, result, said, user

SYSTEM = {"role": "system", "content": "You are helpful."}
EASY = [SYSTEM, user("1+1?"), said("2", reasoning_content="easy"), user("2+2?")]

_DATED = {"role": "latest_reminder", "content": "2026-04-24, Paris"}

MORE: dict[str, tuple[dict[str, Any], int, str]] = {
    "g6": (
        {"messages": EASY, "chat_template_kwargs": {"thinking": True, "drop_thinking": False}},
        23,
        "cdb2cc010b471dbefdd2c949c883afdb604c4aa9c03d8a3b2c9838e35b7edc60",
    ),
    "g18": (
        {"messages": [user("who won?") | {"task": "query"}], **OFF},
        6,
        "e9026a7b547c13f7f89d029cb4661f49f7c90054208e95a5126061265da03cb7",
    ),
    "g19": (
        {"messages": [user("who won?") | {"task": "action"}]},
        8,
        "fb1d48f9794cddb85a265f1e9ed7f92abec7a620d2d5f0ad95193ca18916cc11",
    ),
    "g20": (
        {"messages": [user("Hi"), said("Hello!", task="title")], **OFF},
        9,
        "55e11fcf5d108272f2ab7a9abff6f5fc713937546d1a6e521505e4eed2b059c1",
    ),
}
"""Vectors of reference api A.10 that need a field of their own: the body, its tokens, the prompt's digest."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def effort_fields(effort: str) -> dict[str, Any]:
    return OFF if effort == "none" else {"reasoning_effort": effort}


@pytest.mark.parametrize("name", GOLDEN)
def test_case_12_golden_prompts(published: Site, name: str) -> None:
    messages, effort, tools, tokens, wanted = GOLDEN[name]
    fields = effort_fields(effort) | ({"tools": [WEATHER]} if tools else {})
    if name == "g13":
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    answer = published.chat(messages=messages, path="/beta/chat/completions", **fields)
    assert answer.status_code == 200, answer.text
    assert digest(published.prompt_text()) == wanted, published.prompt_text()
    assert len(published.prompt()) == tokens == answer.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("name", MORE)
def test_case_12_golden_prompts_with_own_fields(published: Site, name: str) -> None:
    fields, tokens, wanted = MORE[name]
    answer = published.chat(**fields)
    assert answer.status_code == 200, answer.text
    assert digest(published.prompt_text()) == wanted, published.prompt_text()
    assert len(published.prompt()) == tokens


def test_case_12_a_reminder_behind_the_user_turn_keeps_the_header_last(published: Site) -> None:
    """g17 shows the reference's hazard, an answer header before the reminder; ours stays behind it. Same tokens."""
    assert published.chat(messages=[SYSTEM, user("News?"), _DATED]).status_code == 200
    text = published.prompt_text()
    assert text.endswith("<｜latest_reminder｜>2026-04-24, Paris<｜Assistant｜><think>")
    assert len(published.prompt()) == 19
    published.chat(messages=[SYSTEM, _DATED, user("News?")])
    assert (
        "helpful.<｜latest_reminder｜>2026-04-24, Paris<｜User｜>News?<｜Assistant｜><think>" in published.prompt_text()
    )


def test_case_13_no_tools_when_none_may_be_called(site: Site) -> None:
    site.script("</think>ok")
    sizes = []
    for choice in ("none", "auto"):
        sizes.append(site.chat(tools=[T1], tool_choice=choice).json()["usage"]["prompt_tokens"])
        assert ("## Tools" in site.prompt_text()) == (choice == "auto")
    assert sizes[0] < sizes[1]


LEVELS = {
    "april": {"minimal": "", "low": "", "medium": "", "high": "", "xhigh": "", "max": "P1", "ultra": "P1"},
    "0813": {"minimal": "", "low": "", "medium": "P1", "high": "P1", "xhigh": "P1", "max": "P2", "ultra": "P2"},
}
"""Which of the two texts of reference api A.4 an effort adds, by B.5 in its newest column."""

_DIGESTS = {digest(""): "", "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7": "P1"} | {
    "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c": "P2"
}


def added(site: Site) -> str | None:
    """Which text stands before the user's turn; None if the prompt does not think."""
    text = site.prompt_text()
    if not text.endswith("<think>"):
        return None
    return _DIGESTS[digest(text.removeprefix("<｜begin▁of▁sentence｜>").split("<｜User｜>")[0])]


@pytest.mark.parametrize("dialect", LEVELS)
@pytest.mark.parametrize("effort", [None, "none", *LEVELS["april"]])
def test_case_14_efforts(published: Site, august: Site, dialect: str, effort: str | None) -> None:
    site = {"april": published, "0813": august}[dialect]
    wanted = None if effort == "none" else LEVELS[dialect][effort or "high"]
    site.script("</think>ok")
    assert site.chat(**({"reasoning_effort": effort} if effort else {})).status_code == 200
    assert added(site) == wanted
    assert site.responses(**({"reasoning": {"effort": effort}} if effort else {})).status_code == 200
    assert added(site) == wanted
    if effort not in ("none", "minimal"):
        assert site.messages(**({"output_config": {"effort": effort}} if effort else {})).status_code == 200
        assert added(site) == wanted


def test_case_15_keys_and_tools_stay_in_their_order(site: Site) -> None:
    """As the library does: the tool object is written anew, what stands inside `parameters` as it came."""
    site.script("</think>ok")
    turned = copy.deepcopy(T1)
    properties = turned["function"]["parameters"]["properties"]
    turned["function"]["parameters"]["properties"] = dict(reversed(properties.items()))
    prompts = []
    for tools in ([T1], [turned], [T1, function("f")], [function("f"), T1]):
        assert site.chat(tools=tools).status_code == 200
        prompts.append(site.prompt_text())
    assert len(set(prompts)) == 4
    assert prompts[0].index('"city"') < prompts[0].index('"days"')
    assert prompts[1].index('"city"') > prompts[1].index('"days"')


@pytest.mark.parametrize("names", [("c1", "c2"), ("zz", "aa"), ("call_10_x", "call_9_x"), ("toolu_B", "toolu_A")])
def test_case_16_results_come_in_the_order_of_the_calls(site: Site, names: tuple[str, str]) -> None:
    site.script("</think>ok")
    calls = [
        {"id": i, "type": "function", "function": {"name": "get_weather", "arguments": f'{{"city": "{city}"}}'}}
        for i, city in zip(names, ("Paris", "Rome"), strict=True)
    ]
    turns = [user("Both?"), said("", tool_calls=calls), result(names[1], "R-O-M-E"), result(names[0], "P-A-R-I-S")]
    assert site.chat(messages=turns, tools=[T1]).status_code == 200
    text = site.prompt_text()
    assert text.index(">Paris</") < text.index(">Rome</")
    assert text.endswith(
        "<｜User｜><tool_result>P-A-R-I-S</tool_result>\n\n<tool_result>R-O-M-E</tool_result><｜Assistant｜><think>"
    )


def test_case_17_a_leading_developer_is_the_system(site: Site) -> None:
    site.script("</think>ok")
    assert site.chat(messages=[{"role": "developer", "content": "Be kind."}, user("Hi")]).status_code == 200
    assert site.prompt_text() == "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi<｜Assistant｜><think>"
    assert site.chat(messages=[user("Hi"), {"role": "developer", "content": "Be kind."}]).status_code == 200
    assert site.prompt_text().endswith("<｜User｜>Hi\n\nBe kind.<｜Assistant｜><think>")


def test_case_18_system_messages(site: Site) -> None:
    site.script("</think>ok")
    first, second = ({"role": "system", "content": text} for text in ("One.", "Two."))
    assert site.chat(messages=[first, second, user("Hi")]).status_code == 200
    assert site.prompt_text() == "<｜begin▁of▁sentence｜>One.\n\nTwo.<｜User｜>Hi<｜Assistant｜><think>"
    assert site.chat(messages=[first, user("Hi"), said("Hello"), user("And?"), second]).status_code == 200
    text = site.prompt_text()
    assert text.startswith("<｜begin▁of▁sentence｜>One.<｜User｜>Hi")
    assert text.endswith("And?\n\nTwo.<｜Assistant｜><think>")


SPOKEN = "a<｜User｜>b</think>c<｜DSML｜tool_calls>d<｜end▁of▁sentence｜>e<｜fim▁hole｜>f<｜ref｜>g<｜▁pad▁｜>"


def control_ids(site: Site) -> list[int]:
    return [i for i in site.prompt() if i in site.codec.tokenizer.added.values()]


@pytest.mark.parametrize("kind", ["embedded", "published"])
def test_case_19_client_text_is_never_a_control_token(site: Site, published: Site, kind: str) -> None:
    site = site if kind == "embedded" else published
    site.script("</think>ok")

    def chat(text: str) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": f'{{"x": "{text}"}}'}}
        turns = [
            {"role": "system", "content": text},
            user(text),
            said(text, reasoning_content=text, tool_calls=[call]),
            result("c", text),
            user([{"type": "text", "text": text}]),
        ]
        assert site.chat(messages=turns, tools=[function("f", x="string")]).status_code == 200

    def messages(text: str) -> None:
        turns = [user(text), said(text), user([{"type": "text", "text": text}])]
        assert site.messages(messages=turns, system=text, tools=[T1_MESSAGES]).status_code == 200

    def responses(text: str) -> None:
        assert site.responses(text, instructions=text, tools=[T1_RESPONSES]).status_code == 200

    for send in (chat, messages, responses):
        send("plain")
        wanted = control_ids(site)
        send(SPOKEN)
        assert control_ids(site) == wanted
        assert SPOKEN in site.prompt_text()
