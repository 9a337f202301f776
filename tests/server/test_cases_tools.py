"""Cases 45 to 59 of reference api D.3: tool calls."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.server.harness import (
    MODEL,
    OFF,
    PARIS,
    ROME,
    T1,
    Site,
    block,
    deltas,
    function,
    invoke,
    joined,
    leaks,
    result,
    said,
    streamed_calls,
    user,
)

CALL_ID = re.compile(r"call_\d{2}_(ET_)?[A-Za-z0-9]{21,24}")
"""The library marks the calls of a turn that thought of nothing with `ET_`."""

WEATHER = "What is the weather in Paris?"


def message(site: Site, script: str | list[int], **fields: Any) -> dict[str, Any]:
    """The message of a scripted answer with T1, the same streamed and not, without markup; `finish` is added."""
    site.script(script)
    fields = {"tools": [T1]} | fields
    choice = site.chat(**fields).json()["choices"][0]
    raw = site.chat(stream=True, **fields).text
    found = choice["message"] | {"finish": choice["finish_reason"]}
    whole = [(c["function"]["name"], c["function"]["arguments"]) for c in found.get("tool_calls") or ()]
    assert [(c["name"], c["arguments"]) for c in streamed_calls(raw)] == whole
    assert joined(raw, "content") == (found["content"] or "")
    assert joined(raw, "reasoning_content") == (found.get("reasoning_content") or "")
    assert raw.endswith("data: [DONE]\n\n")
    return found


def arguments(found: dict[str, Any]) -> list[Any]:
    return [json.loads(call["function"]["arguments"]) for call in found["tool_calls"]]


def test_case_45_the_model_calls(real: Site) -> None:
    """The embedded model was taught to call one of the tools it is offered."""
    answer = real.chat(WEATHER, tools=[function("get_weather", city="string")], temperature=0)
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert CALL_ID.fullmatch(call["id"]) and call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_case_45_types_are_kept(site: Site) -> None:
    found = message(site, "Hm.</think>" + block(PARIS))
    assert found["finish"] == "tool_calls"
    assert CALL_ID.fullmatch(found["tool_calls"][0]["id"])
    assert arguments(found) == [{"city": "Paris", "days": 2}]


def test_case_46_two_calls(site: Site) -> None:
    found = message(site, "Hm.</think>" + block(PARIS, ROME))
    assert arguments(found) == [{"city": "Paris", "days": 2}, {"city": "Rome"}]
    assert len({call["id"] for call in found["tool_calls"]}) == 2
    raw = site.chat(stream=True, tools=[T1]).text
    assert {p["index"] for d in deltas(raw) for p in d.get("tool_calls") or ()} == {0, 1}


LONG = "".join(f'{n}: "quoted", back\\slash, tab\t, 杭州;\n' for n in range(60))


def test_case_47_long_arguments_are_streamed(site: Site) -> None:
    assert len(LONG.encode()) > 2000
    site.script("Hm.</think>" + block(invoke("write", ("text", "true", LONG))))
    tools: Any = [function("write", text="string")]
    pieces = []
    with site.openai().chat.completions.stream(
        model=MODEL, messages=[user("Go")], tools=tools, max_tokens=4000
    ) as stream:
        for event in stream:
            if event.type == "chunk":
                pieces += [p for c in event.chunk.choices for p in c.delta.tool_calls or ()]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert len([p for p in pieces if p.id]) == len([p for p in pieces if p.function and p.function.name]) == 1
    assert len([p for p in pieces if p.function and p.function.arguments]) >= 3
    assert json.loads(call.function.arguments) == {"text": LONG}


@pytest.mark.parametrize(
    "value",
    [
        'say "hi" \\ back\\nslash',
        "two\nlines\r\n\ttab",
        "</parameter> and </invoke> and </tool_calls>",
        "ls 2>&1",
        "杭州 😀",
        "<DSML> |DSML| ｜dsml｜ <｜ ｜>",
        "</",
        "<",
        "\n\n",
        " ",
        "",
        "</foo>",
        'string="true">x',
        "{}",
    ],
)
def test_case_48_strings_come_through(site: Site, value: str) -> None:
    found = message(site, "Hm.</think>" + block(invoke("get_weather", ("city", "true", value))))
    assert arguments(found) == [{"city": value}]


def test_case_49_text_before_the_block(site: Site) -> None:
    found = message(site, "Hm.</think>I look it up." + block(PARIS))
    assert found["content"] == "I look it up."
    assert arguments(found) == [{"city": "Paris", "days": 2}]


def test_case_50_a_block_inside_the_reasoning(site: Site) -> None:
    found = message(site, "I look it up." + block(PARIS))
    assert found["reasoning_content"] == "I look it up."
    assert arguments(found) == [{"city": "Paris", "days": 2}]
    assert not leaks(found)


@pytest.mark.parametrize(
    "call", ['<｜DSML｜invoke name="f">\n</｜DSML｜invoke>', '<｜DSML｜invoke name="f"></｜DSML｜invoke>']
)
def test_case_51_a_call_without_parameters(site: Site, call: str) -> None:
    found = message(site, "Hm.</think>" + block(call), tools=[function("f")])
    assert found["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("value", ["two", "{oops", "", "[1,]", "1 2", "NaN", "'2'"])
def test_case_52_invalid_json_becomes_a_string(site: Site, value: str) -> None:
    """Documented choice: a value that claims to be JSON and is not is handed on as a string."""
    found = message(
        site, "Hm.</think>" + block(invoke("get_weather", ("city", "true", "Rome"), ("days", "false", value)))
    )
    assert arguments(found) == [{"city": "Rome", "days": value}]


def test_case_53_cut_inside_a_value(site: Site) -> None:
    script = site.ids("Hm.</think>" + block(invoke("get_weather", ("city", "true", "a long name " * 8))))
    found = message(site, script, max_tokens=len(script) - 15)
    assert found["finish"] == "length"
    assert not leaks(found)
    begun = found["tool_calls"][0]["function"]["arguments"]
    assert begun.startswith('{"city": "a long name') and not begun.endswith("}")


BROKEN = [
    "\n\n<｜DSML｜foo> text",
    "\n\n<｜DSML｜tool_calls>\nsorry",
    "\n\n<｜DSML｜tool_calls>\n<｜DSML｜call name='x'/>\n</｜DSML｜tool_calls>",
    "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=",
    "\n\n</｜DSML｜tool_calls>",
    " the ｜DSML｜ mark",
    "\n\n<｜DSML｜tool_calls><｜DSML｜tool_calls>" + PARIS,
    block(PARIS) + " and more" + block(ROME),
    block(PARIS.replace('"', "'")),
    "<｜User｜><｜Assistant｜>",
]


@pytest.mark.parametrize("tail", BROKEN)
def test_case_54_a_broken_block(site: Site, tail: str) -> None:
    found = message(site, "Hm.</think>Well." + tail)
    assert not leaks(found), found
    assert found["content"].startswith("Well.")
    assert message(site, "Hm.</think>ok")["content"] == "ok"


ROUNDS = [
    "I need Paris.</think>" + block(PARIS),
    "\nNow Rome, \n\n</think>\n\nSo far so good.\n" + block(ROME.replace("\n</", "</")),
    "Both</think>" + block(invoke("get_weather", ("days", "false", "[1,2 ,  3]"), ("city", "true", "é"))),
]
"""Answers that would not come back the same if they were written anew from their JSON."""


@pytest.mark.parametrize("keep_reasoning", [True, False])
def test_case_55_each_prompt_extends_the_last(site: Site, keep_reasoning: bool) -> None:
    stub = site.script(*ROUNDS, "</think>Done.")
    turns: list[Any] = [user("Weather?")]
    for n in range(len(ROUNDS)):
        answer = site.chat(messages=turns, tools=[T1])
        assert answer.status_code == 200
        turn = answer.json()["choices"][0]["message"]
        if not keep_reasoning:
            turn.pop("reasoning_content", None)
        turns += [turn, *(result(c["id"], f"result {n}") for c in turn["tool_calls"])]
    assert site.chat(messages=turns, tools=[T1]).json()["choices"][0]["message"]["content"] == "Done."
    eos = site.codec.tokenizer.added["<｜end▁of▁sentence｜>"]
    prompts = [list(r.prompt_ids) for r in stub.requests]
    for n, script in enumerate(ROUNDS):
        known = [*prompts[n], *site.ids(script), eos]
        assert prompts[n + 1][: len(known)] == known, site.codec.tokenizer.decode(prompts[n + 1])


NAMED = {"type": "function", "function": {"name": "get_time"}}
TWO = [function("get_weather", city="string"), function("get_time", city="string")]


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("off", [True, False])
@pytest.mark.parametrize("text", ["Hello!", "sort: 3, 1, 2"])
def test_case_56_a_forced_call(real: Site, choice: Any, off: bool, text: str) -> None:
    """Nothing that is asked here suggests a call, so it is the decoding that forces it."""
    fields = (OFF if off else {}) | {"tools": TWO, "tool_choice": choice, "temperature": 0, "max_tokens": 300}
    found = real.chat(text, **fields).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls", found
    names = {call["function"]["name"] for call in found["message"]["tool_calls"]}
    assert names == {"get_time"} if choice is NAMED else names <= {"get_time", "get_weather"}
    assert all(isinstance(json.loads(c["function"]["arguments"]), dict) for c in found["message"]["tool_calls"])


def test_case_56_strict_refuses_a_forced_call_while_thinking(strict: Site) -> None:
    strict.script("</think>ok")
    refused = strict.chat(tools=[T1], tool_choice="required")
    assert refused.status_code == 400
    assert "Thinking mode does not support this tool_choice" in refused.json()["error"]["message"]


def strict_tool(**city: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"} | city, "unit": {"type": "string", "enum": ["c", "f"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": schema}}


def test_case_57_strict_arguments(real: Site) -> None:
    """The embedded model has never seen a second argument: the schema makes it write one."""
    tools = [strict_tool(enum=["Paris", "Rome"])]
    answer = real.chat(WEATHER, path="/beta/chat/completions", tools=tools, temperature=0, max_tokens=200)
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    found = json.loads(call["function"]["arguments"])
    assert set(found) == {"city", "unit"} and found["unit"] in ("c", "f") and found["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("extra", [{"minLength": 1}, {"maxLength": 3}])
def test_case_57_strict_schemas_are_checked(site: Site, extra: dict[str, Any]) -> None:
    refused = site.chat(path="/beta/chat/completions", tools=[strict_tool(**extra)])
    assert refused.status_code == 400
    assert next(iter(extra)) in refused.json()["error"]["message"]


def test_case_58_results_without_a_call_and_in_parts(site: Site) -> None:
    site.script("</think>ok")
    turns = [user("Weather?"), said("Wait."), result("call_99_nobody", [{"type": "text", "text": "18C"}]), user("So?")]
    assert site.chat(messages=turns, tools=[T1]).status_code == 200
    assert "18C" in site.prompt_text()


def test_case_59_how_many_tools(site: Site) -> None:
    site.script("</think>ok")
    tools = [function(f"f{n}") for n in range(129)]
    assert site.chat(tools=tools[:128]).status_code == 200
    refused = site.chat(tools=tools)
    assert refused.status_code == 400
    assert "128" in refused.json()["error"]["message"] and "129" in refused.json()["error"]["message"]
