"""Clients that take their time, and the end of a server. The times of `Patience` are fractions of a second here."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest

from fathom.encoding.codec import Codec
from fathom.engine.stub import ScriptedEngine
from fathom.errors import ConfigError
from fathom.server.listen import Patience, bound, loopback
from fathom.server.settings import ServerSettings
from tests.server.conftest import desk
from tests.server.harness import MODEL, OFF, Site, chunks, eventually, joined, serving, user

SAID = "Let me see.</think>It is four."

HEAD = b"POST /chat/completions HTTP/1.1\r\nhost: x\r\n"


@contextlib.contextmanager
def hurried(codec: Codec, **settings: Any) -> Iterator[Site]:
    patience = Patience(head=0.4, idle=1, unread=0.5, end=0.5, most_head=16_384)
    with serving(ScriptedEngine([[]]), codec, desk(codec), ServerSettings(**settings), patience) as site:
        site.script(SAID)
        yield site


@pytest.fixture(scope="module")
def site(embedded: Codec) -> Iterator[Site]:
    with hurried(embedded, max_requests=3, body_timeout=0.4) as site:
        yield site


def dial(site: Site, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    host, port = site.url.removeprefix("http://").split(":")
    connection.settimeout(5)
    connection.connect((host, int(port)))
    return connection


def status(connection: socket.socket) -> int:
    """The status of an answer, which is read to its end."""
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def closed_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the server hangs up in time; what it says before is read."""
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def request(**fields: Any) -> bytes:
    asked = json.dumps({"model": MODEL, "messages": [user("Hi")]} | fields).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(asked) + asked


def test_a_head_must_arrive(site: Site) -> None:
    """Nothing at all; half a head; a byte every tenth of a second; half a second head after a first answer."""
    silent, half, again = dial(site), dial(site), dial(site)
    half.sendall(HEAD)
    again.sendall(request())
    assert status(again) == 200
    again.sendall(b"POST /chat")
    assert all(closed_within(connection, 2) for connection in (silent, half, again))
    trickle = dial(site)
    with pytest.raises(OSError):
        for _ in range(30):
            trickle.sendall(b"P")
            time.sleep(0.1)


def test_a_body_must_arrive(site: Site) -> None:
    connection = dial(site)
    connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
    assert status(connection) == 408
    assert closed_within(connection, 3)


def test_a_connection_may_rest_between_requests(site: Site) -> None:
    connection = dial(site)
    for _ in range(2):
        connection.sendall(request())
        assert status(connection) == 200
        time.sleep(0.6)
    assert closed_within(connection, 3)


def test_a_head_has_a_limit(site: Site) -> None:
    connection = dial(site)
    connection.sendall(HEAD + b"x: " + b"y" * 30_000)
    assert connection.recv(100).startswith(b"HTTP/1.1 4")
    assert closed_within(connection, 2)


def test_who_does_not_read_is_sent_away(site: Site) -> None:
    """More of them than places; each is cut off although its answer is not at its end, and the places are free."""
    site.script([*site.ids("</think>"), *site.ids("7") * 200_000])
    slow = [dial(site, 4096) for _ in range(3)]
    for connection in slow:
        connection.sendall(request(stream=True, max_tokens=200_000))
    assert eventually(lambda: len(site.relay.inner.requests) == 3)
    site.relay.inner, engine = ScriptedEngine([site.ids(SAID)]), site.relay.inner
    assert eventually(lambda: site.chat(**OFF).status_code == 200, 20)
    assert eventually(lambda: engine.status().running == 0)
    for connection in slow:
        with contextlib.suppress(OSError):
            while connection.recv(65536):
                pass
        connection.close()


def test_who_reads_slowly_but_steadily_is_served(site: Site) -> None:
    site.script([*site.ids("</think>"), *site.ids("7") * 3000])
    connection = dial(site, 4096)
    connection.sendall(request(stream=True, max_tokens=200_000).replace(b"host: x", b"host: x\r\nconnection: close"))
    said = b""
    while piece := connection.recv(16384):
        said += piece
        time.sleep(0.01)
    assert b"[DONE]" in said


def ended(codec: Codec, say: Any, delay: float, **fields: Any) -> list[httpx.Response]:
    """The answers to two requests that run when the server is asked to stop."""
    answers: list[httpx.Response] = []
    asked = {"model": MODEL, "messages": [user("Hi")]} | fields
    with hurried(codec) as site:
        engine = site.script(say, delay=delay)
        ask = threading.Thread(target=lambda: answers.append(site.raw.post("/chat/completions", json=asked)))
        other = threading.Thread(target=lambda: answers.append(httpx.post(site.url + "/messages", json=asked)))
        ask.start()
        other.start()
        assert eventually(lambda: len(engine.requests) == 2)
        begun = time.monotonic()
        site.listener.should_exit = True
        ask.join(10)
        other.join(10)
        assert time.monotonic() - begun < 9
        assert eventually(lambda: engine.status().running == 0)
    return answers


@pytest.mark.parametrize("stream", [True, False])
def test_the_end_says_why(embedded: Codec, stream: bool) -> None:
    for answer in ended(embedded, "Let me see.</think>" + "a" * 5000, 0.01, stream=stream, max_tokens=9000):
        error = chunks(answer.text)[-1] if stream else answer.json()
        assert "shutting down" in json.dumps(error["error"])
        assert stream or answer.status_code == 503


def test_what_is_almost_done_may_finish(embedded: Codec) -> None:
    answers = ended(embedded, SAID, 0.01, stream=True)
    assert any(joined(a.text, "content") == "It is four." for a in answers if "[DONE]" in a.text)
    assert not any('"error"' in a.text for a in answers)


def test_sockets() -> None:
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: .*choose another"):
            bound("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on nowhere\.invalid"):
        bound("nowhere.invalid", 0)
    assert [loopback(h) for h in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.0.1")] == [True] * 3 + [
        False
    ] * 2


def test_an_answer_is_not_held_back(site: Site) -> None:
    """On a socket that gathers small parts, an answer's body waits 40 ms for the client to acknowledge its head."""
    times = []
    for _ in range(61):
        begun = time.monotonic()
        assert site.raw.get("/health").status_code == 200
        times.append(time.monotonic() - begun)
    assert sorted(times)[30] < 0.035
