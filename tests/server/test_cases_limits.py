"""Cases 91 to 95 of reference api D.3, and what clients may do to a server with sockets and crowds."""

from __future__ import annotations

import itertools
import json
import resource
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import BadRequestError

from tests.server.conftest import Opener
from tests.server.harness import (
    MODEL,
    OFF,
    Site,
    chunks,
    eventually,
    user,
)

SAID = "Let me see.</think>It is four."


def served(site: Site) -> bool:
    """Whether a plain request is answered."""
    return bool(site.chat(**OFF).json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("path", ["/chat/completions", "/anthropic/v1/messages", "/responses", "/completions"])
def test_case_91_a_prompt_longer_than_the_context(site: Site, path: str) -> None:
    stub = site.script(SAID, context=4096)
    text = "7" * 5000
    body = {"model": MODEL, "messages": [user(text)], "input": text, "prompt": text, "max_tokens": 10}
    begun = time.monotonic()
    refused = site.raw.post(path, json=body)
    assert time.monotonic() - begun < 10 and not stub.requests
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert "4096" in message.replace(",", "")
    assert any(5000 <= int(word) < 5100 for word in message.replace(",", "").split() if word.isdigit()), message
    assert not stub.requests


def test_case_91_by_the_client(site: Site) -> None:
    site.script(SAID, context=1024)
    with pytest.raises(BadRequestError, match="1024"):
        site.openai().chat.completions.create(model=MODEL, messages=[user("7" * 2000)])


def test_case_92_a_crowd_waits_or_comes_again(narrow: Site) -> None:
    """More at once than the limit: whoever is refused is told when to return, and the client's retries succeed."""
    narrow.script(SAID, delay=0.005)
    refused = []
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: narrow.raw.post("/v1/chat/completions", json=body()), range(8)))
        for answer in (a for a in answers if a.status_code != 200):
            refused.append(answer)
            assert answer.status_code in (429, 503) and int(answer.headers["retry-after"]) >= 1
        client = narrow.openai(max_retries=8)

        def ask(_: int) -> str:
            return client.chat.completions.create(model=MODEL, messages=[user("Hi")]).choices[0].message.content or ""

        assert list(pool.map(ask, range(4))) == ["It is four."] * 4
    assert refused


def test_case_92_a_crowd_is_served(site: Site) -> None:
    site.script(SAID)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda n: site.raw.post("/chat/completions", json=body(f"{n}")), range(64)))
    assert [a.status_code for a in answers] == [200] * 64
    assert {a.json()["choices"][0]["message"]["content"] for a in answers} == {"It is four."}


def body(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [user(text)]} | fields


def arrivals(site: Site, text: str, tokens: int) -> list[float]:
    """When the pieces of a streamed answer came."""
    fields = body(text, stream=True, max_tokens=tokens, temperature=0, reasoning_effort="max")
    with httpx.stream("POST", site.url + "/chat/completions", json=fields, timeout=120) as answer:
        return [time.monotonic() for line in answer.iter_lines() if line.startswith("data:")]


def beside(site: Site, prompt: int, chats: int) -> tuple[list[list[float]], float, float]:
    """When the pieces of short answers came, and when a long prompt beside them was sent and answered."""
    long = {"json": body("7" * prompt, max_tokens=1), "timeout": 600}
    with ThreadPoolExecutor(chats) as pool:
        running = [pool.submit(arrivals, site, f"sort: 9, 3, 7, 1, {n}", 100) for n in range(chats)]
        time.sleep(0.2)
        begun = time.monotonic()
        answer = httpx.post(site.url + "/chat/completions", **long)
        assert answer.status_code == 200, answer.text
        end = time.monotonic()
        return [f.result() for f in running], begun, end


def test_case_93_short_chats_go_on_while_a_long_prompt_is_read(real: Site) -> None:
    """However busy the machine is, each has some of its pieces before the prompt has been read."""
    times, begun, end = beside(real, prompt=3000, chats=3)
    assert min(sum(begun < t < end for t in one) for one in times) >= 4


@pytest.mark.external
def test_case_93_at_full_length(open_real: Opener, say: Callable[[str], None]) -> None:
    """Left when the short answers are there: to read the whole prompt takes a CPU many minutes."""
    with open_real(device=256 << 20) as site, asked(site, body("7" * 200_000, max_tokens=1)):
        assert eventually(lambda: site.relay.status().running == 1, 20)
        with ThreadPoolExecutor(8) as pool:
            times = list(pool.map(lambda n: arrivals(site, f"sort: 9, 3, 7, 1, {n}", 100), range(8)))
        assert site.relay.status().running == 1, "the prompt was refused, or read before the answers were there"
    gap = max(b - a for one in times for a, b in itertools.pairwise(one[1:]))
    say(f"case 93: eight short answers beside a prompt of 200,000 tokens: no piece more than {gap:.2f} s after another")
    assert gap < 3.0, "under a second on two quiet cores"


@pytest.mark.parametrize("stream", [True, False])
def test_case_95_an_answer_that_does_not_begin(impatient: Site, stream: bool) -> None:
    """After the configured time (here a fraction of a second) the request ends, and so does its place in the queue."""
    gate = threading.Event()
    impatient.script(SAID, gate=gate)
    begun = time.monotonic()
    answer = impatient.chat(stream=stream)
    assert time.monotonic() - begun < 30
    assert "error" in (chunks(answer.text)[-1] if stream and answer.status_code == 200 else answer.json())
    status = impatient.relay.inner.status
    assert eventually(lambda: status().running + status().waiting == 0)
    gate.set()
    assert served(impatient)


def dial(site: Site) -> socket.socket:
    host, port = site.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def asked(site: Site, body: dict[str, Any], receive: int = 0) -> socket.socket:
    """A chat request whose answer nobody has read yet; receive: bytes that the client has room for."""
    connection, said = dial(site), json.dumps(body).encode()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    head = f"POST /chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(said)}\r\n\r\n"
    connection.sendall(head.encode() + said)
    return connection


def test_half_open_connections(site: Site) -> None:
    """Heads and bodies that never end, and clients that vanish with and without a word."""
    site.script(SAID)
    head = b"POST /chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    kept = [dial(site) for _ in range(30)]
    for n, connection in enumerate(kept):
        connection.sendall([head, head + b"content-length: 1000\r\n\r\n{", b"POST"][n % 3])
    gone = dial(site)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.sendall(head + b"content-length: 1000\r\n\r\n{")
    gone.close()
    assert served(site)
    for connection in kept:
        connection.close()
    assert served(site)
    assert not site.relay.inner.status().running


def test_a_slow_reader(site: Site) -> None:
    """Who does not read holds up nobody else, and finds everything when it does."""
    count = 6000
    site.script([*site.ids("</think>"), *site.ids("7") * count])
    slow = asked(site, body(stream=True, max_tokens=100_000), receive=100_000)
    time.sleep(0.5)
    begun = time.monotonic()
    assert site.raw.get("/models").status_code == 200
    assert time.monotonic() - begun < 10
    text = b"".join(iter(lambda: slow.recv(65536), b"")).decode()
    slow.close()
    assert text.count("data:") > count
    assert "[DONE]" in text or '"error"' in text


def test_two_thousand_idle_connections(site: Site) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 8192)
    if wanted < 4500:
        pytest.skip("too few file descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    site.script(SAID)
    idle = []
    try:
        for _ in range(2000):
            idle.append(dial(site))
        begun = time.monotonic()
        assert served(site)
        assert time.monotonic() - begun < 10
    finally:
        for connection in idle:
            connection.close()
    assert served(site)
