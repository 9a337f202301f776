"""What a client sees of answers that are well formed and of those broken in every way that was reported.

Wanted values are written by hand from reference api A.6, A.8, C.4 and recipe 5. Every answer comes token by token: in
the vocabulary's own tokens, one character a token, and cut at random.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass
from typing import Any

import pytest

from fathom.api import Event, FinishReason, Usage
from fathom.config import WEIGHTS
from fathom.encoding.codec import Codec
from fathom.encoding.desk import Desk
from fathom.encoding.intake import open_exchange

M = "｜DSML｜"
OPEN, SHUT = f"<{M}tool_calls>\n", f"</{M}tool_calls>"
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"q": {}}}}


def param(value: str, head: str = 'name="q" string="true"', end: str = f"</{M}parameter>\n") -> str:
    return f"<{M}parameter {head}>{value}{end}"


def invoke(inner: str, head: str = 'name="f"', end: str = f"</{M}invoke>\n") -> str:
    return f"<{M}invoke {head}>\n{inner}{end}"


def block(inner: str) -> str:
    return OPEN + inner + SHUT


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk(Codec.load(WEIGHTS / "small"), ("m",), 1 << 20)


@dataclass
class Seen:
    """An answer as a client of Chat Completions puts it together; deltas: what each token made visible, as JSON."""

    reasoning: str | None
    content: str
    calls: list[tuple[str, str]]
    finish: str
    deltas: list[list[dict[str, Any]]]


def ask(desk: Desk, protocol: str, thinking: bool, tools: bool) -> Any:
    body: dict[str, Any] = {"model": "m", "reasoning_effort": "high" if thinking else "none"}
    body |= {"messages": [{"role": "user", "content": "x"}]} if protocol != "responses" else {"input": "x"}
    if protocol == "messages":
        body |= {"max_tokens": 5000, "thinking": {"type": "enabled" if thinking else "disabled"}}
        tool: dict[str, Any] = {"name": "f", "input_schema": TOOL["parameters"]}
    elif protocol == "responses":
        body |= {"reasoning": {"effort": "high" if thinking else "none"}}
        tool = {"type": "function", **TOOL}
    else:
        tool = {"type": "function", "function": TOOL}
    return open_exchange(protocol, json.dumps(body | ({"tools": [tool]} if tools else {})).encode(), desk).writer("id")


def ids(desk: Desk, text: str, cuts: random.Random | None = None, alone: bool = False) -> list[int]:
    """Token ids; control tokens are themselves, other text is cut at random, or into single characters."""
    added, out = desk.codec.tokenizer.added, []
    for piece in re.split("(" + "|".join(map(re.escape, added)) + ")", text):
        if piece in added:
            out.append(added[piece])
            continue
        places = range(1, len(piece)) if alone else [n for n in range(1, len(piece)) if cuts and cuts.random() < 0.3]
        for a, b in zip([0, *places], [*places, len(piece)], strict=True):
            out += desk.codec.tokenizer.encode(piece[a:b])
    return out


def read(desk: Desk, tokens: list[int], thinking: bool = True, tools: bool = True, finish: FinishReason = STOP) -> Seen:
    writer = ask(desk, "chat", thinking, tools)
    steps = [writer.start(1, 0), *(writer.push(Event(token=t)) for t in tokens)]
    steps.append(writer.finish(Event(finish=finish, usage=Usage(1, len(tokens)))))
    deltas = [[json.loads(f.data)["choices"][0]["delta"] for f in step if f.data != "[DONE]"] for step in steps]
    choice = json.loads(writer.body())["choices"][0]
    message = choice["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
    seen = Seen(message.get("reasoning_content"), message["content"] or "", calls, choice["finish_reason"], deltas)
    joined = ["".join(d.get(k) or "" for step in deltas for d in step) for k in ("reasoning_content", "content")]
    assert joined == [seen.reasoning or "", seen.content], "the stream says what the body says"
    return seen


def every_way(desk: Desk, text: str, **options: Any) -> Seen:
    """The answer, the same in every division into tokens."""
    seen = read(desk, ids(desk, text), **options)
    others = [ids(desk, text, alone=True), *(ids(desk, text, cuts=random.Random(n)) for n in range(4))]
    for tokens in others:
        other = read(desk, tokens, **options)
        assert (other.reasoning, other.content, other.calls, other.finish) == (
            seen.reasoning,
            seen.content,
            seen.calls,
            seen.finish,
        )
    return seen


# --- thinking and text


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("abc</think>xyz", True, "abc", "xyz"),
        ("<think>abc</think>x", True, "abc", "x"),  # case 29
        ("a<think>b</think>c", True, "ab", "c"),
        ("a</think>b</think>c", True, "a", "bc"),  # a stray end
        ("a</think>b<think>c", True, "a", "bc"),
        ("</think>hi", False, None, "hi"),  # case 28
        ("<think>hi", False, None, "hi"),
        ("</think>only", True, "", "only"),
        ("never ends", True, "never ends", ""),
        ("\nabc\n\n</think>\n\nxyz", True, "abc", "xyz"),  # case 26: the borders' newlines go
        ("a</think>xyz\n\n", True, "a", "xyz\n\n"),
        ("a</think>one\n\n\ntwo", True, "a", "one\n\n\ntwo"),
        ("a</think>what is 2 <", True, "a", "what is 2 <"),  # case 35
        ("a</think>x</", True, "a", "x</"),
        ("a</think>if a < b and c </ d", True, "a", "if a < b and c </ d"),
        ("x</think>👩‍🚀 杭州 é", True, "x", "👩‍🚀 杭州 é"),  # case 36
        (f"a</think>The {M} is", True, "a", "The  is"),
        (f"The {M} is</think>b", True, "The  is", "b"),
        (f"a</think>one {SHUT} two", True, "a", "one  two"),
        (f"a</think>one </{M}invoke> two </{M}parameter> three", True, "a", "one  two  three"),
        (f"a</think>ok\n\n{OPEN}sorry", True, "a", "ok\n\n\nsorry"),
        (f"a</think>ok <{M}foo> text", True, "a", "ok <foo> text"),
        ("a</think>b<｜User｜>c<｜▁pad▁｜>d<｜begin▁of▁sentence｜>e", True, "a", "bcde"),
        ("a<｜Assistant｜>b<｜latest_reminder｜></think>c", True, "ab", "c"),
        ("a</think>b<｜end▁of▁sentence｜>c", True, "a", "bc"),
    ],
)
def test_thinking_and_text(desk: Desk, text: str, thinking: bool, reasoning: str | None, content: str) -> None:
    seen = every_way(desk, text, thinking=thinking)
    assert (seen.reasoning, seen.content, seen.calls, seen.finish) == (reasoning, content, [], "stop")


@pytest.mark.parametrize(
    ("text", "thinking", "content"),
    [
        ("R</think>ok\n\n" + block(invoke(param("v"))), True, "ok"),
        ("ok\n\n" + block(invoke(param("v"))), False, "ok"),
        ("ok\n\n" + block(invoke(param("v"))) + "\n\nafter", False, "ok\n\nafter"),
        ("ok " + invoke(param("v")) + SHUT + "after", False, "ok after"),
        ("R " + block(invoke(param("v"))) + "</think>ok", True, "ok"),
    ],
)
def test_a_block_that_nobody_asked_for_goes(desk: Desk, text: str, thinking: bool, content: str) -> None:
    """C.4 no. 6, A.8 rule 7: without tools the markup is stripped, the layout before it as well."""
    seen = every_way(desk, text, thinking=thinking, tools=False)
    assert (seen.content, seen.calls, seen.finish) == (content, [], "stop")
    assert (seen.reasoning or "").strip() == ("R" if thinking else "")


# --- calls


def one(**arguments: Any) -> list[tuple[str, dict[str, Any]]]:
    return [("f", arguments)]


FALSE = 'name="q" string="false"'
HARD = 'a "b" \\ \n</parameter> 2>&1 </foo> 杭州 🙂 < </ \t x'

CALLS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "a string": (block(invoke(param("v"))), one(q="v")),
    "an empty string": (block(invoke(param(""))), one(q="")),
    "any text in a string": (block(invoke(param(HARD))), one(q=HARD)),
    "a shell's redirection at the end": (block(invoke(param("ls 2>&1"))), one(q="ls 2>&1")),
    "line ends around": (block(invoke(param("\n\nx\n\n"))), one(q="\n\nx\n\n")),
    "json": (block(invoke(param('[1, 2.5, {"a": null}]', FALSE))), one(q=[1, 2.5, {"a": None}])),
    "a number": (block(invoke(param("2", FALSE))), one(q=2)),
    "a json string": (block(invoke(param('"x"', FALSE))), one(q="x")),
    "two calls": (block(invoke(param("1")) + invoke(param("2"))), one(q="1") + one(q="2")),
    "two parameters": (block(invoke(param("1") + param("2", 'name="r" string="true"'))), one(q="1", r="2")),
    "no parameter": (block(invoke("")), one()),
    "no parameter, an empty line": (block(invoke("\n")), one()),
    "an unknown function": (block(invoke(param("v"), 'name="g"')), [("g", {"q": "v"})]),
    "text behind": (block(invoke(param("v"))) + " That was it.", one(q="v")),
    "single quotes": (block(invoke(param("v", "name='q' string='true'"), "name='f'")), one(q="v")),
    "no json though it says so": (block(invoke(param("hello", FALSE))), one(q="hello")),
    "NaN": (block(invoke(param("NaN", FALSE))), one(q="NaN")),
    "nothing for json": (block(invoke(param("", FALSE))), one(q="")),
    "half of json": (block(invoke(param('{"a": [1', FALSE))), one(q='{"a": [1')),
    "no string= and text": (block(invoke(param("one", 'name="q"'))), one(q="one")),
    "no string= and json": (block(invoke(param("1", 'name="q"'))), one(q=1)),
    "a parameter not closed before the next": (
        block(invoke(param("1", end="\n") + param("2", 'name="r" string="true"'))),
        one(q="1", r="2"),
    ),
    "a parameter not closed before the end of its call": (block(invoke(param("1", end="\n"))), one(q="1")),
    "a json parameter not closed": (block(invoke(param("[1]", FALSE, end="\n"))), one(q=[1])),
    "a foreign closing tag": (block(invoke(param("1", end="</parameter>\n"))), one(q="1</parameter>")),
    "a call not closed before the next": (
        block(invoke(param("1"), end="") + invoke(param("2"))),
        one(q="1") + one(q="2"),
    ),
    "a call not closed before the end of the block": (block(invoke(param("1"), end="")), one(q="1")),
    "a block not closed": (OPEN + invoke(param("1")), one(q="1")),
    "a block not opened": (invoke(param("1")) + SHUT, one(q="1")),
    "a call alone": (invoke(param("1")), one(q="1")),
    "a block opened twice": (OPEN + block(invoke(param("1"))), one(q="1")),
    "a second block": (block(invoke(param("1"))) + "\n\n" + block(invoke(param("2"))), one(q="1") + one(q="2")),
    "a key with a space": (block(invoke(param("v", 'name="my key" string="true"'))), one(**{"my key": "v"})),
    "a key with a closing bracket": (block(invoke(param("v", 'name="k>" string="true"'))), one(**{"k>": "v"})),
    "a key with a quote": (block(invoke(param("v", 'name="a"b" string="true"'))), one(**{'a"b': "v"})),
    "a key with a backslash": (block(invoke(param("v", 'name="a\\b" string="true"'))), one(**{"a\\b": "v"})),
    "a key that ends in a backslash": (block(invoke(param("v", 'name="a\\" string="true"'))), one(**{"a\\": "v"})),
    "a key in Cyrillic": (block(invoke(param("v", 'name="ключ" string="true"'))), one(ключ="v")),
    "a key with a bracket": (block(invoke(param("v", 'name="a<b" string="true"'))), one(**{"a<b": "v"})),
    "an object instead of parameters": (block(invoke('{"a": 1, "b": "x", "c": [2]}\n')), one(a=1, b="x", c=[2])),
    "text instead of parameters": (block(invoke("just text\n")), one(arguments="just text")),
    "a list instead of parameters": (block(invoke("[1]\n")), one(arguments="[1]")),
    "text before the parameters": (block(invoke("Calling:\n" + param("v"))), one(q="v")),
    "text after the parameters": (block(invoke(param("v") + "Done.\n")), one(q="v")),
    "an unknown tag in a call": (block(invoke(f"<{M}foo>\n" + param("v") + f"</{M}foo>\n")), one(q="v")),
    "only an unknown tag in a call": (block(invoke(f"</{M}foo>\n")), one()),
    "more attributes": (block(invoke(param("v"), 'name="f" id="3"')), one(q="v")),
    "a wrapper": (block(invoke(param('{"q": 1}', 'name="arguments" string="false"'))), one(arguments={"q": 1})),
    "marks in a string": (block(invoke(param(f"a{M}b<{M}c</{M}d"))), one(q="ab<c</d")),
    "control tokens in a string": (block(invoke(param("</think>a<｜User｜>b<think>c"))), one(q="abc")),
    "look-alikes in a string": (block(invoke(param("<|DSML|invoke> ｜ DSML ｜"))), one(q="<|DSML|invoke> ｜ DSML ｜")),
    "control tokens between tags": (OPEN + "</think><｜User｜>" + invoke(param("1")) + SHUT, one(q="1")),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(desk: Desk, name: str) -> None:
    text, wanted = CALLS[name]
    seen = every_way(desk, "Look.</think>ok\n\n" + text)
    assert (seen.reasoning, seen.content, seen.finish) == ("Look.", "ok", "tool_calls")
    assert [(n, json.loads(a)) for n, a in seen.calls] == wanted


@pytest.mark.parametrize("protocol", ["messages", "responses"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_in_the_other_protocols(desk: Desk, protocol: str, name: str) -> None:
    text, wanted = CALLS[name]
    writer = ask(desk, protocol, thinking=True, tools=True)
    tokens = ids(desk, "Look.</think>ok\n\n" + text)
    for frames in (
        writer.start(1, 0),
        *(writer.push(Event(token=t)) for t in tokens),
        writer.finish(Event(finish=STOP)),
    ):
        assert all(f.event == json.loads(f.data)["type"] for f in frames)
    whole = json.loads(writer.body())
    items = whole["content"] if protocol == "messages" else whole["output"]
    calls = [i for i in items if i["type"] in ("tool_use", "function_call")]
    assert [(c["name"], c["input"] if protocol == "messages" else json.loads(c["arguments"])) for c in calls] == wanted
    assert [i["type"] for i in items[:2]] == (
        ["thinking", "text"] if protocol == "messages" else ["reasoning", "message"]
    )


def test_a_call_inside_the_thinking_is_recovered(desk: Desk) -> None:
    """C.4 no. 4, case 50: the model forgot to end its thinking."""
    seen = every_way(desk, "Look it up.\n\n" + block(invoke(param("v"))))
    assert (seen.reasoning, seen.content, seen.calls) == ("Look it up.", "", [("f", '{"q": "v"}')])


def test_a_repeated_key_is_passed_on(desk: Desk) -> None:
    seen = every_way(desk, "</think>" + block(invoke(param("1") + param("2"))))
    assert seen.calls == [("f", '{"q": "1", "q": "2"}')]


# --- an answer that is cut


WHOLE = "</think>ok\n\n" + block(invoke(param("one") + param("[1, 2]", 'name="r" string="false"')))


@pytest.mark.parametrize(
    ("said", "calls", "content"),
    [
        (f'<{M}parameter name="q" string="true">one', '{"q": "one', "ok"),
        (f'<{M}parameter name="q" string="true">one</{M}', '{"q": "one', "ok"),
        (f'<{M}parameter name="q" string="true">one</{M}para', '{"q": "one', "ok"),
        (f'<{M}parameter name="r" string="false">[1, ', '{"q": "one", "r": [1, ', "ok"),
    ],
)
def test_cut_by_its_length_a_call_stays_open(desk: Desk, said: str, calls: str, content: str) -> None:
    """A.8 rule 6: nothing is invented; no part of a closing tag is shown."""
    text = WHOLE[: WHOLE.index(said.split(">")[0])] + said
    seen = every_way(desk, text, finish=LENGTH)
    assert (seen.content, seen.calls, seen.finish) == (content, [("f", calls)], "length")


@pytest.mark.parametrize(
    ("end", "calls", "content"),
    [
        (f'<{M}parameter name="q" string="true">on', {"q": "on"}, "ok"),
        (f"one</{M}para", {"q": "one"}, "ok"),
        ('name="r" string="false">[1, 2', {"q": "one", "r": "[1, 2"}, "ok"),
        ('name="r" string="false">[1, 2]', {"q": "one", "r": [1, 2]}, "ok"),
        (f"[1, 2]</{M}parameter>\n", {"q": "one", "r": [1, 2]}, "ok"),
        (f'<{M}invoke name="f">\n', {}, "ok"),
    ],
)
def test_ended_in_the_middle_a_call_is_closed(desk: Desk, end: str, calls: dict[str, Any], content: str) -> None:
    """Recipe 5: the end of sentence inside a call."""
    seen = every_way(desk, WHOLE[: WHOLE.index(end) + len(end)])
    assert [json.loads(a) for _, a in seen.calls] == [calls]
    assert (seen.content, seen.finish) == (content, "tool_calls")


def test_cut_anywhere_nothing_leaks_and_what_was_seen_stays(desk: Desk) -> None:
    """C.4 no. 1: at every token, for both ends; a longer answer begins with what the shorter one showed."""
    text = "Think</think>ok\n\n" + block(invoke(param(HARD) + param("[1]", FALSE)) + invoke(param("x")))
    tokens, before = ids(desk, text, alone=True), ("", "", "")
    for end in range(0, len(tokens) + 1, 3):
        for finish in (STOP, LENGTH):
            seen = read(desk, tokens[:end], finish=finish)
            shown = (seen.reasoning or "", seen.content.rstrip("\n"), "".join(n + a for n, a in seen.calls))
            assert not any(mark in part for part in shown for mark in (M, "\ufffd", "\udc01", "\udc02", "tool_calls"))
            if finish is STOP:
                assert all(isinstance(json.loads(a), dict) for _, a in seen.calls)
        assert all(b.startswith(a.rstrip("<")) for a, b in zip(before[:2], shown[:2], strict=True))
        before = shown


# --- what comes when


def test_text_is_shown_with_its_token(desk: Desk) -> None:
    """Only what may become markup waits: nothing of plain prose does."""
    tokens = ids(desk, "abc def ghi</think>one two three")
    seen = read(desk, tokens)
    end = tokens.index(desk.codec.tokenizer.added["</think>"])
    shown = ["".join((d.get("reasoning_content") or "") + (d.get("content") or "") for d in s) for s in seen.deltas[1:]]
    wanted = [desk.codec.tokenizer.decode([t]) for t in tokens]
    wanted[end] = ""
    assert shown[: len(tokens)] == wanted


def test_long_strings_are_sent_as_they_come(desk: Desk) -> None:
    """C.4 no. 3: not in one lump at the closing tag."""
    said = "The quick brown fox. " * 100
    head, tail = "</think>" + OPEN + f'<{M}invoke name="f">\n<{M}parameter name="q" string="true">', f"</{M}parameter>"
    before, tokens = len(ids(desk, head)), ids(desk, head + said + tail)
    seen = read(desk, tokens)
    pieces = [
        "".join(c["function"].get("arguments", "") for d in s for c in d.get("tool_calls") or ()) for s in seen.deltas
    ]
    late = 8
    for n in range(late, len(ids(desk, said)), 50):
        assert len("".join(pieces[: before + n])) > len(desk.codec.tokenizer.decode(ids(desk, said)[: n - late]))
    assert json.loads(seen.calls[0][1]) == {"q": said}


def test_id_and_name_come_once(desk: Desk) -> None:
    """D.1: the SDK's helper joins what is repeated."""
    seen = every_way(desk, "</think>" + block(invoke(param("v" * 50)) + invoke(param("w"))))
    pieces = [c for s in seen.deltas for d in s for c in d.get("tool_calls") or ()]
    assert (
        [p["index"] for p in pieces if "id" in p] == [0, 1] == [p["index"] for p in pieces if "name" in p["function"]]
    )


@pytest.mark.parametrize(
    "text",
    [
        "</think>" + OPEN + invoke("word " * 8_000),
        "</think>" + OPEN + invoke(param("[1, " * 4_000, FALSE)),
        "<" * 8_000,
    ],
    ids=["text in a call", "json without an end", "brackets"],
)
def test_nonsense_costs_what_prose_costs(desk: Desk, text: str) -> None:
    """In one of some tries; who reads all that is held again with every token needs far more."""

    def seconds(tokens: list[int]) -> float:
        begun = time.process_time()
        read(desk, tokens)
        return (time.process_time() - begun) / len(tokens)

    tokens, prose = ids(desk, text), ids(desk, "</think>" + "word " * 4_000)
    assert any(seconds(tokens) < 3 * seconds(prose) for _ in range(3))


def test_every_cut_point_gives_the_same_answer(desk: Desk) -> None:
    """Case 34, C.4 no. 1: the text cut in two anywhere, each part in tokens of its own."""
    calls = block(invoke(param("Paris 2>&1") + param("2", 'name="r" string="false"')) + invoke(param("Rome")))
    text = "Let me look\n\n</think>Two calls:\n\n" + calls
    for cut in range(1, len(text)):
        if M not in text[cut - len(M) + 1 : cut + len(M) - 1] and "</think>" not in text[cut - 7 : cut + 7]:
            seen = read(desk, ids(desk, text[:cut]) + ids(desk, text[cut:]))
            assert (seen.reasoning, seen.content, seen.finish) == ("Let me look", "Two calls:", "tool_calls")
            assert [json.loads(a) for _, a in seen.calls] == [{"q": "Paris 2>&1", "r": 2}, {"q": "Rome"}]
