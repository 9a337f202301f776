"""Bodies as clients really send them, and what is refused by its name. Reference recipe 4; api C.4."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from fathom.encoding.body import parse
from fathom.encoding.normalise import NORMALISERS
from fathom.encoding.pairing import Mark, Names, pair
from fathom.errors import RequestError

USER = {"role": "user", "content": "Hi"}


def chat(strict: bool = False, **fields: Any) -> dict[str, Any]:
    return NORMALISERS["chat"]({"messages": [USER], **fields}, strict)


def messages(**fields: Any) -> dict[str, Any]:
    return NORMALISERS["messages"]({"messages": [USER], **fields}, False)


def responses(**fields: Any) -> dict[str, Any]:
    return NORMALISERS["responses"]({"input": "Hi", **fields}, False)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "deserialize"),
        (b'{"a": 1', "deserialize"),
        (b"[1]", "object"),
        (b'{"a": "\xff"}', "0xff at place 7"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": NaN}', "NaN"),
    ],
)
def test_case_7_what_is_no_json(raw: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        parse(raw)
    assert caught.value.status == 400


# --- calls and results


def brute_force(marks: list[Mark]) -> dict[int, int]:
    """The rule of `pair`, read off its docstring without any index."""
    answers: dict[int, int] = {}
    left = []
    for place, mark in enumerate(marks):
        if mark.is_call:
            continue
        waiting = [p for p, m in enumerate(marks[:place]) if m.is_call and m.id == mark.id and p not in answers]
        if waiting:
            latest = max(marks[p].turn for p in waiting)
            answers[min(p for p in waiting if marks[p].turn == latest)] = place
        else:
            left.append(place)
    for place, mark in enumerate(marks):
        found = (
            next((p for p in left if marks[p].id == mark.id), None) if mark.is_call and place not in answers else None
        )
        if found is not None:
            answers[place] = found
            left.remove(found)
    return answers


def test_pairs_of_calls_and_results_against_brute_force() -> None:
    draw = random.Random(3)
    for _ in range(2000):
        marks = [Mark(n // 3, draw.random() < 0.5, draw.choice("abc")) for n in range(draw.randrange(12))]
        assert pair(marks) == brute_force(marks), marks


def test_names_are_used_once() -> None:
    names = Names()
    given = ["x", "x", "x_2", "", "x", "", "call"]
    made = [names.unique(id) for id in given]
    assert made[0] == "x" and len(set(made)) == len(made)


def calling(*ids: str) -> dict[str, Any]:
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(id: str, text: Any = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": text or id.upper()}


def shown(turns: list[dict[str, Any]]) -> str:
    """Turns in short: calls as their number, results and texts as they are."""
    parts = []
    for turn in turns:
        calls = len(turn.get("tool_calls") or ())
        parts.append(f"{calls}!" if calls else f"{turn['role'][0]}:{turn['content']}")
    return " ".join(parts)


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        ([calling("a", "b"), result("b"), result("a")], "2! t:A t:B"),
        ([result("a"), calling("a")], "1! t:A"),
        ([calling("a"), USER], "1! t: u:Hi"),
        ([calling("a"), result("z"), result("a")], "1! t:A u:Z"),
        ([calling("a"), USER, result("a")], "1! t:A u:Hi"),
        ([calling("a"), result("a", "1"), calling("a"), result("a", "2")], "1! t:1 1! t:2"),
        ([calling("a", "a"), result("a", "1"), result("a", "2")], "2! t:1 t:2"),
        ([calling("a"), result("a", "1"), result("a", "again")], "1! t:1 u:again"),
        (
            [calling("a"), result("a", [{"type": "text", "text": "x"}, {"type": "image_url"}])],
            "1! t:x\n\n[Unsupported image_url]",
        ),
    ],
)
def test_cases_16_58_chat_results_find_their_calls(turns: list[Any], wanted: str) -> None:
    found = chat(messages=[USER, *turns])["messages"]
    assert shown(found[1:]) == wanted
    ids = [call["id"] for turn in found for call in turn.get("tool_calls") or ()]
    assert ids == [turn["tool_call_id"] for turn in found if turn["role"] == "tool"] and len(set(ids)) == len(ids)


def use(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "tool_use", "id": id, "name": "f", "input": {}} for id in ids]}


def gives(*ids: str, text: str = "") -> dict[str, Any]:
    blocks = [{"type": "tool_result", "tool_use_id": id, "content": id.upper(), "is_error": True} for id in ids]
    return {"role": "user", "content": ([{"type": "text", "text": text}] if text else []) + blocks}


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        ([use("a", "b"), gives("b", "a")], "a(!!) u(A B)"),
        ([use("a", "b"), gives("a"), gives("b")], "a(!!) u(A B)"),
        ([use("a"), gives("a", text="first")], "a(!) u(A first)"),
        ([use("a"), USER], "a(!) u( Hi)"),
        ([use("a"), use("b"), gives("b")], "a(!) u() a(!) u(B)"),
        ([use("a")], "a(!) u()"),
        ([gives("z")], "u(Z)"),
        ([use("a", "a"), gives("a", "a")], "a(!!) u(A A)"),
        (
            [{"role": "assistant", "content": [*use("a")["content"], {"type": "text", "text": "x"}]}, gives("a")],
            "a(x !) u(A)",
        ),
    ],
)
def test_case_75_messages_results_find_their_calls(turns: list[Any], wanted: str) -> None:
    found = messages(messages=[USER, *turns])["messages"]
    show = {"tool_use": lambda b: "!", "tool_result": lambda b: b["content"], "text": lambda b: b["text"]}
    text = " ".join(f"{t['role'][0]}({' '.join(show[b['type']](b) for b in t['content'])})" for t in found[1:])
    assert text.replace("! !", "!!") == wanted
    used = [b["id"] for t in found for b in t["content"] if b["type"] == "tool_use"]
    assert used == [b["tool_use_id"] for t in found for b in t["content"] if b["type"] == "tool_result"]


def test_case_86_outputs_of_responses_follow_their_calls() -> None:
    def item(kind: str, id: str) -> dict[str, Any]:
        rest = {"output": id.upper()} if kind.endswith("output") else {"name": "f", "arguments": "{}"}
        return {"type": kind, "call_id": id, **rest}

    def kinds(*given: tuple[str, str]) -> list[str]:
        found = responses(input=[item(kind, id) for kind, id in given])["input"]
        return [f"{i['call_id']}!" if "name" in i else i.get("output", i.get("content")) for i in found]

    call, output = "function_call", "function_call_output"
    assert kinds((call, "a"), (call, "b"), (output, "b"), (output, "a")) == ["a!", "b!", "A", "B"]
    assert kinds((call, "a"), (output, "a"), (call, "b"), (output, "b")) == ["a!", "A", "b!", "B"]
    assert kinds((output, "z"), (call, "a")) == ["Z", "a!", ""]
    assert kinds((call, "a"), (output, "a"), (call, "a"), (output, "a")) == ["a!", "A", "a_2!", "A"]


# --- content


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\n\nb"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "[Unsupported image_url]"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["a", "b"], "a\n\nb"),
        ({"type": "text", "text": "a"}, "a"),
    ],
)
def test_content_as_text(content: Any, text: str) -> None:
    assert chat(messages=[{"role": "user", "content": content}])["messages"][0]["content"] == text


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "document", "source": {"type": "text", "data": "doc"}}, "doc"),
        ({"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "d"}]}}, "d"),
        ({"type": "document", "source": {"type": "base64", "data": "Zg=="}}, "[Unsupported document]"),
        ({"type": "search_result", "content": [{"type": "text", "text": "found"}]}, "found"),
        ({"type": "server_tool_use", "id": "x"}, "[Unsupported server_tool_use]"),
        ({"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}, "citations": []}, "t"),
    ],
)
def test_case_76_blocks_as_text(block: dict[str, Any], text: str) -> None:
    assert messages(messages=[{"role": "user", "content": [block]}])["messages"][0]["content"] == [
        {"type": "text", "text": text}
    ]


def test_redacted_thinking_goes_and_foreign_signatures_do_not_matter() -> None:
    blocks = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "hm", "signature": "foreign"},
        {"type": "text", "text": "t"},
    ]
    (turn,) = messages(messages=[{"role": "assistant", "content": blocks}])["messages"]
    assert [block["type"] for block in turn["content"]] == ["thinking", "text"]


@pytest.mark.parametrize("call", [chat, messages])
@pytest.mark.parametrize("wrong", [7, [7]])
def test_content_of_the_wrong_kind(call: Any, wrong: Any) -> None:
    with pytest.raises(RequestError, match="content"):
        call(messages=[{"role": "user", "content": wrong}])


# --- roles


def test_cases_17_18_system_and_developer() -> None:
    roles = [("developer", "a"), ("system", "b"), ("user", "c"), ("system", "d"), ("developer", "e")]
    found = chat(messages=[{"role": role, "content": text} for role, text in roles])["messages"]
    assert [turn["role"] for turn in found] == ["system", "system", "user", "user", "user"]
    late = responses(input=[{"role": r, "content": "x"} for r in ("system", "user", "system")])["input"]
    assert [item["role"] for item in late] == ["system", "user", "user"]
    body = messages(system="s", messages=[{"role": "system", "content": "t"}, USER, {"role": "system", "content": "u"}])
    assert [block["text"] for block in body["system"]] == ["s", "t"]
    assert [turn["role"] for turn in body["messages"]] == ["user", "system"]


@pytest.mark.parametrize("protocol", ["chat", "messages", "messages blocks", "responses"])
def test_case_70_the_billing_header_goes(protocol: str) -> None:
    header = "x-anthropic-billing-header: cc=1; cch=abc;"
    text = f"{header}\nBe brief."
    match protocol:
        case "chat":
            found = chat(messages=[{"role": "system", "content": text}, USER])["messages"][0]["content"]
        case "messages":
            found = messages(system=text)["system"]
        case "messages blocks":
            found = messages(system=[{"type": "text", "text": t} for t in (header, "Be brief.")])["system"][0]["text"]
        case _:
            found = responses(instructions=text)["instructions"]
    assert found == "Be brief."


# --- options


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"chat_template_kwargs": {"thinking": False}}, {"thinking": {"type": "disabled"}}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"thinking": {"type": "enabled"}}),
        ({"enable_thinking": False}, {"thinking": {"type": "disabled"}}),
        ({"chat_template_kwargs": {"reasoning_effort": "max"}}, {"reasoning_effort": "max"}),
        ({"thinking": {"type": "between_tools"}}, {"thinking": {"type": "enabled"}}),
        ({"stream_options": {"include_usage": True}}, {}),
        ({"top_logprobs": 3}, {}),
        ({"n": 1, "logit_bias": {}}, {"n": 1, "logit_bias": {}}),
    ],
)
def test_cases_8_25_44_options(fields: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = chat(**fields)
    del found["messages"]
    assert found == wanted


@pytest.mark.parametrize(("field", "value"), [("n", 2), ("logit_bias", {"5": 1}), ("best_of", 2)])
def test_what_nobody_here_can_do_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        chat(**{field: value})
    assert caught.value.param == field


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def test_case_59_the_number_of_tools() -> None:
    assert len(chat(tools=[tool(f"f{n}") for n in range(128)])["tools"]) == 128
    with pytest.raises(RequestError, match="129"):
        chat(tools=[tool(f"f{n}") for n in range(129)])
    with pytest.raises(RequestError, match="129"):
        messages(tools=[{"name": f"f{n}"} for n in range(129)])


def test_schemas_are_objects_and_keep_their_order() -> None:
    given = {"properties": {"b": {}, "a": {}}, "required": ["b"]}
    found = chat(tools=[tool(parameters=given)])["tools"][0]["function"]["parameters"]
    assert json.dumps(found) == json.dumps({"type": "object", **given})
    assert messages(tools=[{"name": "f", "type": "custom"}, {"name": "s", "type": "web_search_20250305"}])["tools"] == [
        {"input_schema": {"type": "object"}, "name": "f"}
    ]
    assert "tools" not in messages(tools=[{"name": "s", "type": "web_search_20250305"}], tool_choice={"type": "any"})


@pytest.mark.parametrize("keyword", ["minLength", "maxLength", "minItems", "maxItems"])
def test_case_57_strict_schemas(keyword: str) -> None:
    schema = {"type": "object", "properties": {"minLength": {"type": "string"}, "a": {"anyOf": [{keyword: 1}]}}}
    assert chat(tools=[tool(parameters=schema)])
    with pytest.raises(RequestError, match=keyword):
        chat(tools=[tool(parameters=schema, strict=True)])


@pytest.mark.parametrize(
    ("protocol", "fields", "words"),
    [
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
            "unavailable",
        ),
        ("messages", {"tool_choice": {"type": "any"}}, "does not support this tool_choice"),
    ],
)
def test_strict_refuses_as_the_hosted_service(protocol: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        NORMALISERS[protocol]({"messages": [USER], **fields}, True)
    NORMALISERS[protocol]({"messages": [USER], **fields}, False)


def test_a_strict_schema_is_closed_and_otherwise_kept() -> None:
    """Objects inside it, too; a property may have the name of a keyword."""
    inner = {"type": "object", "properties": {"properties": {"type": "string"}, "const": {"enum": [1]}}}
    given = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"const": 5}}, "$defs": {"A": inner}}
    found = chat(tools=[tool(parameters=given, strict=True)])["tools"][0]["function"]
    assert found["strict"] is False, "the library would refuse the reference and drop the constant"
    closed = {"required": ["properties", "const"], "additionalProperties": False}
    typed = {"properties": {"type": "string"}, "const": {"type": "integer", "enum": [1]}}
    assert found["parameters"] == {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"type": "integer", "const": 5}},
        "$defs": {"A": {"type": "object", "properties": typed, **closed}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
