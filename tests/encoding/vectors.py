"""Golden prompts of the April encoder that the wire format can express (reference api A.10).

name -> (messages, thinking effort, with the weather tool, tokens, sha256 of the prompt). g13 also carries a schema.
"""

from __future__ import annotations

from typing import Any

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def _call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | fields


def _result(identity: str, value: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": value}


_SYSTEM = {"role": "system", "content": "You are helpful."}
_HI = [_SYSTEM, _user("Hi")]
_SUMS = [_SYSTEM, _user("1+1?"), _answer("2", reasoning_content="easy"), _user("2+2?")]
_CITIES = [
    _SYSTEM,
    _user("Weather in Paris and Rome?"),
    _answer(
        "",
        reasoning_content="need two",
        tool_calls=[
            _call("c1", "get_weather", '{"city": "Paris", "days": 2}'),
            _call("c2", "get_weather", '{"city":"Rome"}'),
        ],
    ),
    _result("c2", "22C"),
    _result("c1", "18C"),
]
_NESTED = '{"s":"杭州 <b>","o":{"k":[1,true,null]},"n":1.5}'

GOLDEN: dict[str, tuple[list[dict[str, Any]], str, bool, int, str]] = {
    "g1": (_HI, "none", False, 9, "6eed1b3904e892656282a3c95a6fe6e0eaa04264823f5ad292a8ec12f21c42ee"),
    "g2": (_HI, "high", False, 9, "2c2b47398e81bd56c7da69bd8e4ffdfb97b1c82a03cca4b152ba79580c548d25"),
    "g3": (_HI, "max", False, 88, "8e359f9bf72ace63a5666c41795c9438cc3c0ac515478cb39ea61fca78fa1868"),
    "g4": (
        [_SYSTEM, _user("1+1?"), _answer("2"), _user("2+2?")],
        "none",
        False,
        21,
        "2b4e608aacaae7149ddd9a1ff60c6d7d5d64904dcdb6fb7e4748d5c59297de4b",
    ),
    "g5": (_SUMS, "high", False, 21, "ac4bbf9f81f2b3c990afa6c5302edc4a8a9f1565169c678b4014e4008dd53621"),
    "g7": (
        [_SYSTEM, _user("Weather in Paris?")],
        "high",
        True,
        286,
        "2bc3b19712677d6f44cd37f4e1e10bed8ba68bc8e1289b7884a1995ff9c9c222",
    ),
    "g8": (_CITIES, "high", True, 406, "3cc1e42f0126849426132ef65c4995d40ac39221e2bce8a9116fd5c7cb32233f"),
    "g9": (
        [*_CITIES, _answer("Paris 18C, Rome 22C", reasoning_content="done"), _user("Thanks")],
        "high",
        True,
        422,
        "bc43acb74734fafc770c1242e9769006c842883434ad164f5c9bcd57f38fb9d7",
    ),
    "g10": (_CITIES, "none", True, 403, "c5acfcc547645c6bdc8e5988723d4efd041b36fcd064e9dc644945087f8b8d2c"),
    "g11": (
        [*_CITIES, _user("Be brief")],
        "high",
        True,
        408,
        "8ba5bd4e2b25da7068195da0dd7ad00ce7285e190fc0c1a65a6623bdc5c44da3",
    ),
    "g12": ([_user("Hi")], "high", True, 280, "33b2e4701106300a73ee829b032b1e73dcbdd15a973e8cd39475f16e5fecaf94"),
    "g13": (
        [_SYSTEM, _user("json a=1")],
        "none",
        False,
        46,
        "b48acdb6945f6e4aaabd064d80335b24c28f3fc00e001b5bc2847d328721b954",
    ),
    "g14": (
        [_user("A"), _user("B")],
        "none",
        False,
        7,
        "80f0b54bfdfe3a267a36776b04cb353e413c2808e083be6d09e1e2262107706a",
    ),
    "g15": (
        [_user("Write code"), _answer("```python\n", prefix=True)],
        "none",
        False,
        9,
        "4823a99d31b7a5bd7a611fa1768575c39de2ebb79210ffcee4660bb33a47bd9b",
    ),
    "g16": (
        [_user("Write code"), _answer("```python\n", reasoning_content="plan", prefix=True)],
        "high",
        False,
        11,
        "529611b69915ad7bd31d5f2707e2b0adbc5f845df6d00617bd220fa5129ace75",
    ),
    "g22": (
        [
            _SYSTEM,
            _user("x"),
            _answer("", tool_calls=[_call("c1", "get_weather", "oops")]),
            _result("c1", "err"),
        ],
        "high",
        True,
        342,
        "ea99035aeafed776d7f69d7e7ff7ce2147c6e1bf232d6a5c1cf55139e4daeb61",
    ),
    "g23": (
        [
            _SYSTEM,
            _user("x"),
            _answer("ok", tool_calls=[_call("c1", "f", _NESTED)]),
            _result("c1", [{"type": "text", "text": "a"}, {"type": "image_url"}]),
        ],
        "high",
        True,
        392,
        "9c8e5fc315cc404c561f2b8ef89cfe8a92464f6347d4820f549725be4b5c0464",
    ),
}
