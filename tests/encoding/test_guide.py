"""Masks against brute force: of the whole vocabulary, exactly the tokens that keep what was said the beginning of
something allowed.

What is allowed is written by hand: all texts of a small schema, or a function that judges beginnings. The tool mark is
the byte FF in them, which no text has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from fathom.config import WEIGHTS
from fathom.encoding.codec import Codec
from fathom.encoding.desk import Desk
from fathom.encoding.grammar import Function, Grammars
from fathom.encoding.guide import AnswerGuide
from fathom.encoding.intake import open_exchange
from fathom.encoding.schemas import forms_of
from fathom.encoding.tokenizer import Tokenizer
from fathom.errors import RequestError

Judge = Callable[[bytes], tuple[bool, bool]]
"""What was said -> whether it begins something allowed, and whether it is allowed as it stands."""

CLOSED = {"required": ["n"], "additionalProperties": False}

MARK = b"\xff"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS / "small")


@pytest.fixture(scope="module")
def grammars(codec: Codec) -> Grammars:
    return codec.grammars


def allowed(guide: AnswerGuide, tokenizer: Tokenizer) -> set[int]:
    mask = guide.allowed()
    return {i for i in range(tokenizer.size) if mask is None or mask[i // 8] >> i % 8 & 1}


def plain(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The tokens that are text."""
    controls = set(tokenizer.added.values())
    return {i: tokenizer.bytes_of(i) for i in range(tokenizer.size) if i not in controls and tokenizer.bytes_of(i)}


def one_of(*texts: str) -> Judge:
    wanted = [text.encode().replace("｜DSML｜".encode(), MARK) for text in texts]
    return lambda said: (any(w.startswith(said) for w in wanted), said in wanted)


def compare(grammars: Grammars, guide: AnswerGuide, judge: Judge, seed: int, most: int = 200) -> bytes:
    """Walk at random through what the guide allows, comparing every mask with the judge's; what was said."""
    draw, tokenizer = random.Random(seed), grammars.tokenizer
    mark, said = tokenizer.added["｜DSML｜"], b""
    texts = {i: text for i, text in plain(tokenizer).items() if MARK not in text} | {mark: MARK}
    for _ in range(most):
        wanted = {i for i, text in texts.items() if judge(said + text)[0]}
        wanted |= {grammars.eos} if judge(said)[1] else set()
        found = allowed(guide, tokenizer)
        if _forced(judge, said):  # the library then gives the next token of the vocabulary's own spelling
            assert found and found <= wanted, (said, found, wanted)
        else:
            assert found == wanted, (said, [texts.get(i) for i in list(found ^ wanted)[:9]], len(found - wanted))
        token = draw.choice(sorted(found))
        guide.accept(token)
        if token == grammars.eos:
            return said
        said += texts[token]
    return said


def _forced(judge: Judge, said: bytes) -> bool:
    """Whether there is only one way on."""
    return not judge(said)[1] and sum(judge(said + bytes([n]))[0] for n in range(256)) == 1


# --- JSON


def test_a_small_schema(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yz", 1]}, "b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    judge = one_of(*(f'{{"a":{a}{b}}}' for a in ('"x"', '"yz"', "1") for b in ("", ',"b":true', ',"b":false')))
    for seed in range(8):
        guide = AnswerGuide(grammars, thinking=False, matcher=grammars.json(schema))
        assert json.loads(compare(grammars, guide, judge, seed))["a"] in ("x", "yz", 1)


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 12}, [str(n) for n in range(1, 13)]),
        ({"const": 5}, ["5"]),
        ({"enum": [None, True, "é🙂"]}, ["null", "true", '"é🙂"']),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 2}, ["[]", "[null]", "[null,null]"]),
        ({"anyOf": [{"const": "ab"}, {"const": "abc"}]}, ['"ab"', '"abc"']),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "boolean"}}}, ["true", "false"]),
    ],
)
def test_small_schemas(grammars: Grammars, schema: dict[str, Any], texts: list[str]) -> None:
    for seed in range(4):
        guide = AnswerGuide(grammars, thinking=False, matcher=grammars.json(schema))
        compare(grammars, guide, one_of(*texts), seed)


def test_any_object_is_json_and_any_json_is_an_object(grammars: Grammars) -> None:
    """Whatever the mask lets through is an object; every compact JSON text of an object passes."""
    for seed in range(20):
        guide = AnswerGuide(grammars, thinking=False, matcher=grammars.json({"type": "object"}))
        assert isinstance(json.loads(_walk(grammars, guide, random.Random(seed))), dict)
    for seed in range(30):
        draw = random.Random(seed)
        text = json.dumps({f"k{n}": _value(draw, 3) for n in range(3)}, separators=(",", ":"), ensure_ascii=False)
        guide = AnswerGuide(grammars, thinking=False, matcher=grammars.json({"type": "object"}))
        for token in [*grammars.tokenizer.encode(text), grammars.eos]:
            assert token in allowed(guide, grammars.tokenizer), (text, token)
            guide.accept(token)


def _walk(grammars: Grammars, guide: AnswerGuide, draw: random.Random) -> str:
    """Said at random, then the shortest way to an end."""
    tokenizer, said = grammars.tokenizer, list[int]()
    signs = [grammars.eos, *(tokenizer.encode(sign)[0] for sign in '"}]:0le')]
    while len(said) < 400:
        may = sorted(allowed(guide, tokenizer))
        near = [i for i in signs if i in may] if len(said) > 12 else []
        token = near[0] if near else draw.choice(may)
        guide.accept(token)
        if token == grammars.eos:
            break
        said.append(token)
    return tokenizer.decode(said)


def _value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(7 if depth else 5)
    if kind > 4:
        inner = [_value(draw, depth - 1) for _ in range(draw.randrange(3))]
        return inner if kind == 5 else {f"x{n} ü": v for n, v in enumerate(inner)}
    return (None, True, draw.randrange(-99, 10**6), draw.random() * 1e9, 'a "b" \\ \n 杭州 🙂')[kind]


# --- tool calls

HEAD, TAIL = '｜DSML｜invoke name="f">\n', "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"


EMPTY = f"<{HEAD}</｜DSML｜invoke>"


def given(key: str, value: str, string: str = "false") -> str:
    return f'<｜DSML｜parameter name="{key}" string="{string}">{value}</｜DSML｜parameter>\n'


def calls(grammars: Grammars, *, strict: bool = False, **schema: Any) -> AnswerGuide:
    function = Function("f", {"type": "object", **schema}, strict)
    return AnswerGuide(grammars, thinking=False, matcher=grammars.calls([function], ""))


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"enum": ["x", 1]}, [("x", "true"), ("1", "false")]),
        ({"const": "a b"}, [("a b", "true")]),
        ({"const": 5}, [("5", "false")]),
        ({"type": "integer", "const": 5}, [("5", "false")]),
        ({"type": "string", "enum": ["a", "</p>"]}, [("a", "true"), ("</p>", "true")]),
        ({"type": ["string", "null"], "enum": ["a", None]}, [("a", "true"), ("null", "false")]),
        ({"type": "boolean"}, [("true", "false"), ("false", "false")]),
        ({"anyOf": [{"const": "a"}, {"type": "null"}]}, [("a", "true"), ("null", "false")]),
        (
            {"oneOf": [{"const": "a"}, {"anyOf": [{"const": "b"}, {"const": 7}]}]},
            [("a", "true"), ("b", "true"), ("7", "false")],
        ),
        ({"$ref": "#/$defs/Color"}, [("red", "true"), ("blue", "true")]),
        ({"allOf": [{"$ref": "#/$defs/Color"}], "default": "red"}, [("red", "true"), ("blue", "true")]),
        (
            {"anyOf": [{"$ref": "#/$defs/Color"}, {"type": "null"}]},
            [("red", "true"), ("blue", "true"), ("null", "false")],
        ),
        ({"$ref": "#/$defs/Flags"}, [(v, "false") for v in ("[]", "[true]", "[false]")]),
    ],
)
def test_parameters(grammars: Grammars, schema: dict[str, Any], values: list[tuple[str, str]]) -> None:
    """A string is bare and marked as such, all else is JSON; references and choices are followed."""
    defs = {"Color": {"type": "string", "enum": ["red", "blue"]}, "Flag": {"type": "boolean"}}
    defs |= {"Flags": {"type": "array", "items": {"$ref": "#/$defs/Flag"}, "maxItems": 1}}
    judge = one_of(*(f"<{HEAD}{given('q', value, string)}{TAIL}" for value, string in values))
    bounded = one_of(*(f"<{HEAD}{given('q', value, string)}</｜DSML｜invoke>" for value, string in values))
    for seed in range(3):
        guide = calls(grammars, properties={"q": schema}, required=["q"], **{"$defs": defs})
        assert judge(compare(grammars, guide, _repeated(bounded), seed, most=80))[0]


def _repeated(call: Judge) -> Judge:
    """A block of one call or more, each after a line end, and the tag that closes it."""
    closing = "\n</｜DSML｜tool_calls>".encode().replace("｜DSML｜".encode(), MARK)
    end = b"</" + MARK + b"invoke>"

    def judge(said: bytes) -> tuple[bool, bool]:
        first, found, rest = said.partition(end)
        if not found:
            return call(said)[0], False
        if not call(first + end)[1]:
            return False, False
        again = rest.startswith(b"\n<" + MARK) and judge(rest[1:])
        return closing.startswith(rest) or bool(again and again[0]), rest == closing or bool(again and again[1])

    return judge


def test_arguments_stand_in_the_schemas_order_and_optional_ones_may_be_missing(grammars: Grammars) -> None:
    properties = {"a": {"const": 1}, "ключ": {"const": "x"}, "c\\d": {"type": "null"}}
    parts = [given("a", "1"), given("ключ", "x", "true"), given("c\\d", "null")]
    texts = [f"<{HEAD}{a}{parts[1]}{c}</｜DSML｜invoke>" for a in ("", parts[0]) for c in ("", parts[2])]
    for seed in range(6):
        guide = calls(grammars, properties=properties, required=["ключ"])
        compare(grammars, guide, _repeated(one_of(*texts)), seed, most=150)


@pytest.mark.parametrize("schema", [{"properties": {}, "additionalProperties": False}])
def test_no_parameters(grammars: Grammars, schema: dict[str, Any]) -> None:
    compare(grammars, calls(grammars, **schema), _repeated(one_of(EMPTY)), 1)


def test_a_string_is_any_text_up_to_its_tag(grammars: Grammars) -> None:
    head = f'<{HEAD}<｜DSML｜parameter name="q" string="true">'.encode().replace("｜DSML｜".encode(), MARK)
    tail = MARK + b"parameter>\n</" + MARK + b"invoke>\n</" + MARK + b"tool_calls>"

    def judge(said: bytes) -> tuple[bool, bool]:
        if not said.startswith(head):
            return head.startswith(said), False
        text, marked, _ = said[len(head) :].partition(MARK)
        if not marked:
            return _begins_utf8(text), False
        rest = said[len(head) + len(text) :]
        again = rest.startswith(tail[: -len(b"</" + MARK + b"tool_calls>")] + b"<")
        assert not again or len(rest) > 20
        return text.endswith(b"</") and _is_utf8(text) and (tail.startswith(rest) or again), rest == tail

    for seed in range(6):
        guide = calls(grammars, properties={"q": {"type": "string"}}, required=["q"])
        compare(grammars, guide, judge, seed, most=60)


def _is_utf8(text: bytes) -> bool:
    try:
        return bool(text.decode()) or not text
    except UnicodeDecodeError:
        return False


def _begins_utf8(text: bytes) -> bool:
    """Whole characters and perhaps the beginning of one."""
    try:
        return bool(text.decode()) or not text
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"pattern": "^[ab]{2}$"}, ["ab", "bb"], ["a", "abc", ""]),
        ({"pattern": "b+"}, ["b", "abba", "x\nb"], ["a", ""]),
        ({"pattern": "^/x/"}, ["/x/", "/x/y"], ["x/", "/x"]),
        ({"minLength": 1, "maxLength": 2}, ["a", "é🙂"], ["", "abc"]),
        ({"format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567", ""]),
        ({"format": "ipv4"}, ["127.0.0.1"], ["256.0.0.1", "1.2.3"]),
        ({"format": "ipv6"}, ["fe80:0:0:0:1:2:3:4"], ["fe80", "g:0:0:0:1:2:3:4"]),
        ({"format": "email"}, ["a.b@c.de"], ["a.b", "@c"]),
        ({"format": "hostname"}, ["a-b.example.org"], ["-a", "a..b"]),
        ({"format": "color"}, ["any thing"], []),
    ],
)
def test_strings_of_strict_tools(
    grammars: Grammars, schema: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    """B.4: patterns and formats of strict schemas are kept; where nobody asked for that, a string is any text."""

    def passes(text: str, strict: bool) -> bool:
        guide, tokenizer = (
            calls(grammars, strict=strict, properties={"q": {"type": "string", **schema}}, required=["q"]),
            grammars.tokenizer,
        )
        said = f"<{HEAD}{given('q', text, 'true')}{TAIL}"
        places = [n for n in range(len(said)) if said.startswith("｜DSML｜", n)]
        for token in tokenizer.splice(said, [(n, n + len("｜DSML｜")) for n in places]):
            if token not in allowed(guide, tokenizer):
                return False
            guide.accept(token)
        return allowed(guide, tokenizer) == {grammars.eos}

    assert all(passes(text, strict=True) for text in right)
    assert not any(passes(text, strict=True) for text in wrong)
    assert all(passes(text, strict=False) for text in right + wrong)


def test_schemas_that_end_nowhere_are_anything(grammars: Grammars) -> None:
    for schema in (
        {"$ref": "#/$defs/A"},
        {"$ref": "#/nowhere"},
        {"enum": []},
        True,
        {"anyOf": [{"$ref": "#/$defs/B"}] * 9},
    ):
        root = {"$defs": {"A": {"$ref": "#/$defs/A"}, "B": {"anyOf": [{"$ref": "#/$defs/B"}] * 9}}}
        kinds = {form.get("type") if isinstance(form.get("type"), str) else "other" for form in forms_of(schema, root)}
        assert kinds == {"string", "other"}


def test_a_schema_that_cannot_be_enforced_is_refused(grammars: Grammars) -> None:
    with pytest.raises(RequestError, match="cannot be enforced"):
        grammars.json({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}})
    with pytest.raises(RequestError, match=r'"x\\ny"'):
        grammars.calls([Function("f", {"type": "object", "properties": {"x\ny": {}}})], "")


# --- when it begins, and what never may be


def test_thinking_is_free_until_it_ends_and_the_answer_is_not_empty(grammars: Grammars) -> None:
    tokenizer = grammars.tokenizer
    texts, end = set(plain(tokenizer)), tokenizer.added["</think>"]
    guide = AnswerGuide(grammars, thinking=True)
    for token in tokenizer.encode('so {"a": <'):
        assert allowed(guide, tokenizer) == texts | {end}
        guide.accept(token)
    guide.accept(end)
    assert allowed(guide, tokenizer) == texts
    guide.accept(min(texts))
    assert allowed(guide, tokenizer) == texts | {grammars.eos}


@pytest.mark.parametrize("budget", [1, 3])
def test_a_budget_ends_the_thinking(grammars: Grammars, budget: int) -> None:
    tokenizer, end = grammars.tokenizer, grammars.tokenizer.added["</think>"]
    guide = AnswerGuide(grammars, thinking=True, budget=budget, matcher=grammars.json({"const": 5}))
    for token in tokenizer.encode("one two three four")[:budget]:
        assert allowed(guide, tokenizer) == set(plain(tokenizer)) | {end}
        guide.accept(token)
    assert allowed(guide, tokenizer) == {end}
    guide.accept(end)
    assert [tokenizer.bytes_of(i) for i in allowed(guide, tokenizer)] == [b"5"]


def test_a_schema_holds_from_the_end_of_the_thinking_on(grammars: Grammars) -> None:
    tokenizer, end = grammars.tokenizer, grammars.tokenizer.added["</think>"]
    guide = AnswerGuide(grammars, thinking=True, matcher=grammars.json({"type": "boolean"}))
    assert allowed(guide, tokenizer) == set(plain(tokenizer)) | {end}
    guide.accept(end)
    assert compare(grammars, guide, one_of("true", "false"), 3) in (b"true", b"false")


def test_a_forced_call_follows_the_thinking(grammars: Grammars) -> None:
    tokenizer, end = grammars.tokenizer, grammars.tokenizer.added["</think>"]
    function = Function("f", {"type": "object", "properties": {}, "additionalProperties": False})
    matcher = grammars.calls([function], grammars.opening(whole=True))
    guide = AnswerGuide(grammars, thinking=True, matcher=matcher)
    guide.accept(tokenizer.encode("x")[0])
    guide.accept(end)
    said = compare(grammars, guide, _behind("\n\n<｜DSML｜tool_calls>\n", _repeated(one_of(EMPTY))), 5)
    assert said.endswith(MARK + b"tool_calls>")


def _behind(head: str, judge: Judge) -> Judge:
    begin = head.encode().replace("｜DSML｜".encode(), MARK)
    return lambda said: judge(said[len(begin) :]) if said.startswith(begin) else (begin.startswith(said), False)


def test_a_call_of_its_own_will_is_held_to_its_form(grammars: Grammars) -> None:
    """The mark is possible only behind a bracket; from there on the tools' grammar holds; no second block follows."""
    tokenizer, mark = grammars.tokenizer, grammars.tokenizer.added["｜DSML｜"]
    function = Function("f", {"type": "object", "properties": {}, "additionalProperties": False})
    guide = AnswerGuide(grammars, thinking=False, calls=grammars.calls([function], grammars.opening(whole=False)))
    texts = set(plain(tokenizer))
    assert allowed(guide, tokenizer) == texts
    for token in tokenizer.encode("ok a<b"):
        guide.accept(token)
        bracket = tokenizer.bytes_of(token).endswith(b"<")
        assert allowed(guide, tokenizer) == texts | {grammars.eos} | ({mark} if bracket else set())
    guide.accept(tokenizer.encode("<")[0])
    guide.accept(mark)
    said = compare(grammars, guide, _behind("tool_calls>\n", _repeated(one_of(EMPTY))), 2)
    assert said.endswith(MARK + b"tool_calls>")


def test_without_tools_there_is_no_mark(grammars: Grammars) -> None:
    guide, tokenizer = AnswerGuide(grammars, thinking=False), grammars.tokenizer
    for token in tokenizer.encode("a <"):
        guide.accept(token)
        assert allowed(guide, tokenizer) == set(plain(tokenizer)) | {grammars.eos}


# --- from a body to its guide


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("protocol", ["chat", "responses"])
def test_schemas_of_bodies(codec: Codec, protocol: str, strict: bool, thinking: bool) -> None:
    """As SDKs write them for nested models: references in choices, fixed values, values of several types."""
    schema = {
        "type": "object",
        "properties": {"a": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}, "b": {"const": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "$defs": {"A": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, **CLOSED}},
    }
    form: dict[str, Any] = {"name": "x", "strict": strict, "schema": schema}
    effort = "high" if thinking else "none"
    fields: dict[str, Any] = {
        "chat": {
            "messages": [{"role": "user", "content": "x"}],
            "reasoning_effort": effort,
            "response_format": {"type": "json_schema", "json_schema": form},
        },
        "responses": {
            "input": "x",
            "reasoning": {"effort": effort},
            "text": {"format": {"type": "json_schema", **form}},
        },
    }
    raw = json.dumps({"model": "m"} | fields[protocol]).encode()
    judge = one_of(*(f'{{"a":{a},"b":2}}' for a in ("null", '{"n":1}', '{"n":2}')))
    for seed in range(3):
        guide = open_exchange(protocol, raw, Desk(codec, ("m",), 1 << 20)).guide
        if thinking:
            guide.accept(codec.tokenizer.added["</think>"])
        compare(codec.grammars, guide, judge, seed)


def test_a_strict_tool_of_a_body(codec: Codec) -> None:
    parameters = {
        "type": "object",
        "properties": {"kind": {"$ref": "#/$defs/K"}, "id": {"type": "string", "pattern": "^[ab]$"}},
        "required": ["kind", "id"],
        "additionalProperties": False,
        "$defs": {"K": {"type": "string", "enum": ["x", "y"]}},
    }
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "thinking": {"type": "disabled"},
        "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    guide = open_exchange("chat", json.dumps(body).encode(), Desk(codec, ("m",), 1 << 20)).guide
    texts = [f"<{HEAD}{given('kind', k, 'true')}{given('id', i, 'true')}</｜DSML｜invoke>" for k in "xy" for i in "ab"]
    compare(codec.grammars, guide, _repeated(one_of(*texts)), 4, most=120)


@pytest.mark.parametrize("protocol", ["chat", "responses"])
def test_json_or_calls_where_a_body_wants_both(codec: Codec, protocol: str) -> None:
    """A format does not fall under the table where there are tools: the answer fits it, or is calls."""
    form = {"name": "x", "schema": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, **CLOSED}}
    function = {"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    fields: dict[str, Any] = {
        "chat": {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": form},
            "tools": [{"type": "function", "function": function}],
        },
        "responses": {
            "input": "x",
            "text": {"format": {"type": "json_schema", **form}},
            "tools": [{"type": "function", **function}],
        },
    }
    text = one_of('{"n":1}', '{"n":2}')
    calls = _behind("\n\n<｜DSML｜tool_calls>\n", _repeated(one_of(EMPTY)))

    def judge(said: bytes) -> tuple[bool, bool]:
        begun, whole = zip(text(said), calls(said), strict=True)
        return any(begun), any(whole)

    seen = set()
    for seed in range(8):
        raw = json.dumps({"model": "m"} | fields[protocol]).encode()
        guide = open_exchange(protocol, raw, Desk(codec, ("m",), 1 << 20)).guide
        guide.accept(codec.tokenizer.added["</think>"])
        seen.add(compare(codec.grammars, guide, judge, seed)[:1])
    assert seen == {b"{", b"\n"}
