"""Cases 33 to 44 of reference api D.3: streams of chat completions."""

from __future__ import annotations

import json
import re
import socket
import threading
from typing import Any

import httpx
import pytest

from tests.server.harness import (
    MODEL,
    OFF,
    PARIS,
    ROME,
    T1,
    Site,
    block,
    chunks,
    deltas,
    eventually,
    joined,
    leaks,
    streamed_calls,
    user,
)

SAID = "First I think about it, then I speak.</think>It is four, I am sure.\n\nOr is it?"


def test_case_33_the_order_of_a_stream(site: Site) -> None:
    site.script(SAID)
    client = site.openai()
    whole = client.chat.completions.create(model=MODEL, messages=[user("2+2?")], seed=1).choices[0].message
    pieces = [
        chunk.choices[0].delta.model_dump()
        for chunk in client.chat.completions.create(model=MODEL, messages=[user("2+2?")], seed=1, stream=True)
        if chunk.choices
    ]
    assert pieces[0]["role"] == "assistant"
    thought = [n for n, d in enumerate(pieces) if d.get("reasoning_content")]
    spoken = [n for n, d in enumerate(pieces) if d.get("content")]
    assert len(thought) > 3 and len(spoken) > 3
    assert thought[-1] < spoken[0]
    assert "".join(d.get("content") or "" for d in pieces) == whole.content
    assert "".join(d.get("reasoning_content") or "" for d in pieces) == whole.model_dump()["reasoning_content"]


SPLIT = "Let me look</think>Two calls:" + block(PARIS, ROME)


def cut_ids(site: Site, text: str, cut: int) -> list[int]:
    """Ids of a text such that no token lies across `cut`; a control token is never cut."""
    spans = [m.span() for m in re.finditer("</think>|｜DSML｜", text)]
    inside = next((start for start, end in spans if start < cut < end), cut)
    return site.ids(text[:inside]) + site.ids(text[inside:])


def bytewise(site: Site, text: str) -> list[int]:
    """Ids of a text with one token a byte wherever the vocabulary allows."""
    pieces = re.split("(</think>|｜DSML｜)", text)
    one = {site.codec.tokenizer.bytes_of(i): i for i in reversed(range(site.codec.tokenizer.size))}
    return [
        i
        for piece in pieces
        for i in (site.ids(piece) if piece in ("</think>", "｜DSML｜") else [one[bytes([b])] for b in piece.encode()])
    ]


def seen(site: Site, raw: str) -> tuple[str, str, list[tuple[str, str]], str]:
    calls = [(c["name"], c["arguments"]) for c in streamed_calls(raw)]
    finish = [c["finish_reason"] for chunk in chunks(raw) for c in chunk["choices"] if c["finish_reason"]]
    assert len(finish) == 1
    return joined(raw, "reasoning_content"), joined(raw, "content"), calls, finish[0]


def test_case_34_every_cut_point_gives_the_same_answer(site: Site) -> None:
    """Every second one over HTTP; `encoding/test_guard.py` has the same answer with all of them, and many others."""
    wanted = (
        "Let me look",
        "Two calls:",
        [("get_weather", '{"city": "Paris", "days": 2}'), ("get_weather", '{"city": "Rome"}')],
        "tool_calls",
    )
    scripts = [bytewise(site, SPLIT)] + [cut_ids(site, SPLIT, n) for n in range(1, len(SPLIT), 2)]
    unique = [list(s) for s in dict.fromkeys(map(tuple, scripts))]
    assert len(unique) > 50
    site.script(*unique)
    for script in unique:
        assert seen(site, site.chat(stream=True, tools=[T1]).text) == wanted, script


def test_case_34_a_cut_anywhere_leaks_nothing(site: Site) -> None:
    """The same answer ended by length after each of its tokens: what was shown is a beginning of the whole."""
    ids = bytewise(site, SPLIT)
    site.script(ids)
    for count in range(1, len(ids), 7):
        reasoning, content, calls, finish = seen(site, site.chat(stream=True, tools=[T1], max_tokens=count).text)
        assert "Let me look".startswith(reasoning) and "Two calls:".startswith(content.rstrip("\n<")), content
        assert not leaks([reasoning, content, calls]) and finish == "length"
        for (name, arguments), whole in zip(calls, ('{"city": "Paris", "days": 2}', '{"city": "Rome"}'), strict=False):
            assert name == "get_weather" and whole.startswith(arguments.removesuffix("</"))


@pytest.mark.parametrize("end", ["2 <", "so\n\n", "so\n", "</", "\n\n<", "a\n\n</", "<", "if a <b"])
@pytest.mark.parametrize("tools", [False, True])
def test_case_35_nothing_is_lost_at_the_end(site: Site, end: str, tools: bool) -> None:
    fields: dict[str, Any] = {"tools": [T1]} if tools else {}
    site.script("</think>It ends in " + end)
    assert joined(site.chat(stream=True, **fields).text, "content") == "It ends in " + end
    assert site.chat(**fields).json()["choices"][0]["message"]["content"] == "It ends in " + end


def test_case_36_characters_are_whole(site: Site) -> None:
    text = "wow 😀👩‍👩‍👧 杭州 é"
    for script in (site.ids("</think>" + text), bytewise(site, "🤔</think>" + text)):
        site.script(script)
        raw = site.chat(stream=True).text
        pieces = [d.get("content") or "" for d in deltas(raw)]
        assert "".join(pieces) == text
        assert not any("\ufffd" in (d.get("content") or "") + (d.get("reasoning_content") or "") for d in deltas(raw))


def test_case_37_usage_is_asked_for(site: Site) -> None:
    site.script(SAID)
    raw = site.chat(stream=True, stream_options={"include_usage": True}).text
    assert raw.endswith("data: [DONE]\n\n")
    found = chunks(raw)
    assert found[-1]["usage"]["completion_tokens"] == len(site.ids(SAID))
    assert all(chunk["usage"] is None for chunk in found[:-1])


def test_case_38_usage_rides_on_the_closing_chunk(site: Site) -> None:
    """Documented choice: DeepSeek's style, whether it was asked for or not."""
    site.script(SAID)
    closing = chunks(site.chat(stream=True).text)[-1]
    assert closing["choices"][0]["finish_reason"] == "stop"
    assert closing["usage"]["prompt_tokens"] == len(site.prompt())


def test_case_39_comments_while_a_stream_waits(hasty: Site) -> None:
    """The clock runs fast here: the wait between two signs of life is a fraction of a second, not 15."""
    gate = threading.Event()
    hasty.script(SAID, gate=gate)
    threading.Timer(0.7, gate.set).start()
    raw = hasty.chat(stream=True).text
    assert raw.count(": keep-alive") >= 3
    assert raw.index(": keep-alive") < raw.index("data:")
    gate.clear()
    threading.Timer(0.4, gate.set).start()
    stream = hasty.openai().chat.completions.create(model=MODEL, messages=[user("2+2?")], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == SAID.split("</think>")[1]


def test_case_40_blank_lines_while_a_body_waits(hasty: Site) -> None:
    gate = threading.Event()
    hasty.script(SAID, gate=gate)
    threading.Timer(0.5, gate.set).start()
    raw = hasty.chat().text
    assert raw[0] == "\n" and json.loads(raw)["choices"][0]["finish_reason"] == "stop"
    gate.clear()
    threading.Timer(0.3, gate.set).start()
    answer = hasty.openai().chat.completions.create(model=MODEL, messages=[user("2+2?")])
    assert answer.choices[0].message.content == SAID.split("</think>")[1]


def busy(site: Site) -> int:
    status = site.relay.inner.status()
    return status.running + status.waiting


def hang_up(site: Site, path: str, body: dict[str, Any]) -> None:
    """Send a request, wait for the beginning of its answer, and close the connection."""
    payload = json.dumps(body).encode()
    host, port = site.url.removeprefix("http://").split(":")
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + payload)
        assert connection.recv(10)


@pytest.mark.parametrize("path", ["/chat/completions", "/anthropic/v1/messages", "/responses"])
def test_case_41_a_disconnect_ends_the_work(site: Site, path: str) -> None:
    site.script("word " * 900, delay=0.02)
    body = {"model": MODEL, "messages": [user("Hi")], "max_tokens": 900, "stream": True, "input": "Hi"}
    hang_up(site, path, body)
    assert eventually(lambda: busy(site) == 0, 2.0)
    site.script("Hello!")
    assert site.chat(**OFF).json()["choices"][0]["message"]["content"] == "Hello!"


def test_case_41_a_disconnect_before_a_whole_body_ends_the_work(site: Site) -> None:
    site.script("word " * 900, delay=0.02)
    body = {"model": MODEL, "messages": [user("Hi")], "max_tokens": 900}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(site.url + "/chat/completions", json=body, timeout=0.3)
    assert eventually(lambda: busy(site) == 0, 2.0)


def test_case_42_a_stop_string(site: Site) -> None:
    site.script(SAID)
    answer = site.chat(stop=["\n\n"]).json()["choices"][0]
    assert answer["message"]["content"] == "It is four, I am sure."
    assert answer["finish_reason"] == "stop"
    raw = site.chat(stop="four", stream=True).text
    assert joined(raw, "content") == "It is "
    assert raw.endswith("data: [DONE]\n\n")
    assert eventually(lambda: busy(site) == 0)


def test_case_42_a_stop_string_is_not_sought_in_reasoning(site: Site) -> None:
    """Documented choice."""
    site.script(SAID)
    answer = site.chat(stop=["think", "sure"]).json()["choices"][0]["message"]
    assert answer["reasoning_content"] == SAID.split("</think>")[0]
    assert answer["content"] == "It is four, I am "


def test_case_42_a_call_wins_over_a_stop_string(site: Site) -> None:
    site.script("</think>Calling." + block(PARIS))
    choice = site.chat(stop=["\n\n"], tools=[T1]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Calling."


def check_logprobs(tokens: list[dict[str, Any]], text: str) -> None:
    assert bytes(b for t in tokens for b in t["bytes"]).decode() == text
    for token in tokens:
        assert token["logprob"] <= 0
        assert 1 <= len(token["top_logprobs"]) <= 5
        ordered = [t["logprob"] for t in token["top_logprobs"]]
        assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize("stream", [False, True])
def test_case_43_log_probabilities(real: Site, stream: bool) -> None:
    fields = {"logprobs": True, "top_logprobs": 5, "temperature": 0, "max_tokens": 60, "stream": stream}
    answer = real.chat("What is 12 + 34?", **fields)
    if stream:
        choices = [c for chunk in chunks(answer.text) for c in chunk["choices"]]
        logs = [c["logprobs"] for c in choices if c.get("logprobs")]
        content = [t for log in logs for t in log.get("content") or ()]
        reasoning = [t for log in logs for t in log.get("reasoning_content") or ()]
        message = {"content": joined(answer.text, "content")}
        message["reasoning_content"] = joined(answer.text, "reasoning_content")
    else:
        choice = answer.json()["choices"][0]
        message, logs = choice["message"], choice["logprobs"]
        content, reasoning = logs["content"], logs["reasoning_content"]
    assert message["content"]
    check_logprobs(content, message["content"])
    check_logprobs(reasoning, message["reasoning_content"])


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_responses(real: Site, stream: bool) -> None:
    """By the client: those of the answer's text, each piece its own; reasoning has no place for them."""
    asked: Any = {"model": MODEL, "input": "What is 12 + 34?", "top_logprobs": 5, "temperature": 0}
    if stream:
        with real.openai().responses.stream(**asked) as events:
            pieces = [e for e in events if e.type == "response.output_text.delta"]
            whole = events.get_final_response()
        assert len(pieces) > 1
        listed = [log for piece in pieces for log in piece.logprobs]
        assert [log.token for log in listed] == [log.token for log in whole.output[-1].content[0].logprobs]
    else:
        whole = real.openai().responses.create(**asked)
    text = whole.output[-1].content[0]
    assert text.text
    check_logprobs([log.model_dump() for log in text.logprobs], text.text)


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_completions(real: Site, stream: bool) -> None:
    asked: Any = {"model": MODEL, "prompt": "12 + 34 =", "logprobs": 3, "temperature": 0, "max_tokens": 20}
    answer = real.openai().completions.create(**asked, stream=stream)
    choices = [c.choices[0] for c in (answer if stream else [answer])]
    logs = [c.logprobs for c in choices if c.logprobs]
    assert len(logs) > 1 or not stream
    assert "".join(t for log in logs for t in log.tokens) == "".join(c.text for c in choices) != ""
    assert all(len(top) <= 3 for log in logs for top in log.top_logprobs)
    assert all(p <= 0 for log in logs for p in log.token_logprobs)


def test_case_43_no_log_probabilities_unless_asked(real: Site) -> None:
    assert real.chat("Hi", max_tokens=5).json()["choices"][0]["logprobs"] is None


def test_case_44_stream_options_without_a_stream(site: Site, strict: Site) -> None:
    site.script(SAID)
    strict.script(SAID)
    assert site.chat(stream_options={"include_usage": True}).status_code == 200
    assert strict.chat(stream_options={"include_usage": True}).status_code == 400


def test_a_stream_is_sent_as_it_is_made(site: Site) -> None:
    """The first words arrive long before the last."""
    engine = site.script("</think>" + "word " * 1000, delay=0.02)
    with site.raw.stream("POST", "/chat/completions", json=stream_body()) as answer:
        lines = answer.iter_lines()  # held: dropping the iterator hangs up, and the answer would end
        assert next(line for line in lines if '"content":"' in line)
        assert engine.status().running == 1
    assert eventually(lambda: engine.status().running == 0)


def stream_body() -> dict[str, Any]:
    return {"model": MODEL, "messages": [user("Hi")], "stream": True}
