"""Fill in the middle (reference api A.7, B.4), driven by the openai client."""

from __future__ import annotations

import pytest

from tests.server.harness import MODEL, PREFIXES, Site, chunks, leaks


@pytest.mark.parametrize("base", PREFIXES)
def test_the_middle_is_filled(site: Site, base: str) -> None:
    site.script("return a + b")
    answer = site.openai(base).completions.create(
        model=MODEL, prompt="def add(a, b):\n    ", suffix="\n\nprint(add(1, 2))", max_tokens=50
    )
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        "return a + b",
        "stop",
    )
    text = "<｜fim▁begin｜>def add(a, b):\n    <｜fim▁hole｜>\n\nprint(add(1, 2))<｜fim▁end｜>"
    assert site.prompt() == site.ids("<｜begin▁of▁sentence｜>" + text)
    assert answer.usage and answer.usage.prompt_tokens == len(site.prompt())


def test_a_stream_with_a_stop_string(site: Site) -> None:
    site.script("one\ntwo\nthree")
    asked = {"model": MODEL, "prompt": "a", "suffix": "b", "stop": ["\ntwo"], "max_tokens": 50}
    stream = site.openai("/beta").completions.create(**asked, stream=True)
    assert "".join(c.choices[0].text for c in stream if c.choices) == "one"
    raw = site.raw.post("/beta/completions", json=asked | {"stream": True}).text
    assert raw.endswith("data: [DONE]\n\n")
    assert [c["choices"][0]["finish_reason"] for c in chunks(raw) if c["choices"]][-1] == "stop"


def test_echo_and_length(site: Site) -> None:
    site.script("one two three four five six")
    asked = {"model": MODEL, "prompt": "zero ", "max_tokens": 3}
    answer = site.raw.post("/beta/completions", json=asked | {"echo": True}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"].startswith("zero ")
    assert answer["usage"]["completion_tokens"] == 3


def test_sampling_reaches_the_engine(site: Site) -> None:
    site.script("one")
    asked = {"prompt": "a", "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7}
    assert site.raw.post("/completions", json={"model": MODEL, **asked}).status_code == 200
    params = site.relay.inner.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 3, 7)


def test_control_tokens_neither_come_in_nor_go_out(site: Site) -> None:
    site.script("a<｜fim▁hole｜>b</think>c｜DSML｜d")
    answer = site.raw.post(
        "/completions", json={"model": MODEL, "prompt": "<｜fim▁end｜>", "suffix": "<｜User｜>"}
    ).json()
    assert not leaks(answer["choices"][0]["text"])
    controls = [i for i in site.prompt() if i in site.codec.tokenizer.added.values()]
    assert len(controls) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 7},
        {"prompt": None},
        {"suffix": 7},
        {"max_tokens": 0},
        {"model": "foo"},
        {"stream": "no"},
        {"echo": 1},
        {"suffix": []},
        {"top_k": "x"},
        {"top_k": 5.5},
        {"temperature": "0.5"},
        {"seed": 1.5},
    ],
)
def test_wrong_fields(site: Site, fields: dict[str, object]) -> None:
    answer = site.raw.post("/completions", json={"model": MODEL, "prompt": "a"} | fields)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]
