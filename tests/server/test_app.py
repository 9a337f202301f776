"""What the application does with clients that go, engines that fail and answers that are silent for long."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from fathom.api import GenerateRequest
from fathom.encoding.answer import AnswerWriter
from fathom.encoding.codec import Codec
from fathom.encoding.replay import ReplayStore
from fathom.engine.stub import ScriptedEngine
from fathom.server import app
from fathom.server.app import create_app
from fathom.server.books import Books
from fathom.server.settings import ServerSettings
from tests.server.conftest import desk, scripted
from tests.server.harness import MODEL, OFF, PARIS, Site, block, chunks, eventually, serving, user

PATHS = ["/chat/completions", "/anthropic/v1/messages", "/responses", "/completions"]


def body(**fields: Any) -> dict[str, Any]:
    """For every protocol at once."""
    return {"model": MODEL, "messages": [user("Hi")], "input": "Hi", "prompt": "Hi", "max_tokens": 50} | fields


async def call(app: FastAPI, path: str, content: bytes, gone: Callable[[], Awaitable[Any]]) -> list[dict[str, Any]]:
    """One request by hand; the client leaves when `gone` returns. What was sent to it."""
    sent: list[dict[str, Any]] = []
    asked = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await gone()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope |= {"method": "POST", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b""}
    await app(scope | {"headers": [], "client": ("x", 1), "server": ("y", 2), "scheme": "http"}, receive, send)
    return sent


async def at_once() -> None:
    """A client that has gone before anything was said."""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_who_leaves_before_the_first_byte_leaves_nothing_behind(embedded: Codec, path: str, stream: bool) -> None:
    """More clients than places come and go while the engine is busy: no place, no request stays taken."""
    engine = ScriptedEngine([embedded.tokenizer.encode("Hello")], gate=threading.Event())
    app = create_app(engine, desk(embedded), settings=ServerSettings(max_requests=2))

    async def main() -> None:
        for _ in range(3):
            sent = await call(app, path, json.dumps(body(stream=stream)).encode(), at_once)
            assert all(message.get("status") not in (429, 529) for message in sent)

    asyncio.run(main())
    assert len(engine.requests) == 3
    assert eventually(lambda: engine.status().running + engine.status().waiting == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_waiting_is_cancelled(embedded: Codec, stream: bool) -> None:
    """Both while a plain answer is awaited and after its blank lines have begun."""
    engine = ScriptedEngine([embedded.tokenizer.encode("Hello")], gate=threading.Event())
    app = create_app(engine, desk(embedded), settings=ServerSettings(max_requests=1, keep_alive=0.1))
    content = json.dumps(body(stream=stream)).encode()

    async def main() -> None:
        for seconds in (0.05, 0.4):
            await call(app, "/chat/completions", content, lambda seconds=seconds: asyncio.sleep(seconds))

    asyncio.run(main())
    assert eventually(lambda: engine.status().running + engine.status().waiting == 0)


@pytest.fixture
def faulty(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An engine that cannot even take a request."""

    def submit(request: GenerateRequest, sink: object) -> None:
        raise RuntimeError("out of luck, secret detail")

    monkeypatch.setattr(site.relay, "submit", submit)
    yield site


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_fault_is_an_error_body_without_details(
    faulty: Site, path: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets an id, the log the place under it; neither the error's text nor prompt nor key is anywhere."""
    said = [user("my prompt")]
    asked = body(stream=stream, messages=said, input="my prompt", prompt="my prompt")
    answer = faulty.raw.post(path, json=asked, headers={"authorization": "Bearer my-key"})
    assert answer.status_code == 500 and answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["type"] == "server_error"
    assert ("type" in answer.json()) == ("messages" in path)
    identity = answer.headers["x-request-id"]
    assert identity == answer.headers["request-id"] and identity in answer.json()["error"]["message"]
    [line] = [record.getMessage() for record in caplog.records]
    assert identity in line and "RuntimeError in server/test_app.py" in line and "server/app.py" in line
    assert not any(word in said for word in ("secret", "my prompt", "my-key") for said in (answer.text, caplog.text))


@pytest.mark.parametrize("path", ["/v1/models", "/ready", "/user/balance", "/v1/models/small"])
def test_a_fault_of_any_endpoint_is_an_error_body(site: Site, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("secret")

    for place, name in ((site.relay, "status"), (Books, "identify"), (Books, "balance")):
        monkeypatch.setattr(place, name, fails)
    monkeypatch.setattr("fathom.server.app._shown", fails)
    answer = site.raw.get(path)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_carries_its_id(site: Site, path: str) -> None:
    fine, refused = site.raw.post(path, json=body()), site.raw.post(path, json=body(model="none"))
    assert (fine.status_code, refused.status_code) == (200, 400)
    assert fine.headers["x-request-id"] == fine.json()["id"] != refused.headers["x-request-id"]


def test_who_leaves_with_half_a_body_is_no_fault(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        time.sleep(0.1)
    assert site.chat(**OFF).status_code == 200
    assert not caplog.records


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(ReplayStore, "remember", fails)
    assert site.chat().json()["choices"][0]["message"]["content"] == "Hello!"


def test_counting_goes_beyond_the_context(embedded: Codec) -> None:
    """C.4 no. 22: the prompt that is refused can be counted."""
    engine = ScriptedEngine([[]])
    asked = {"model": MODEL, "messages": [user("word " * 500)], "max_tokens": 5}
    with serving(engine, embedded, desk(embedded, context=100), ServerSettings()) as site:
        assert site.raw.post("/v1/messages", json=asked).status_code == 400
        assert site.raw.post("/v1/messages/count_tokens", json=asked).json()["input_tokens"] > 500


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS[:3])
def test_a_fault_of_the_writer_ends_the_answer(
    site: Site, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """C.4 no. 24: the stream ends cleanly, with an error that the protocol's clients know."""
    pushed = AnswerWriter.push

    def push(writer: AnswerWriter, event: Any) -> Any:
        if len(writer.ids) == 3:
            raise KeyError("secret")
        return pushed(writer, event)

    monkeypatch.setattr(AnswerWriter, "push", push)
    answer = site.raw.post(path, json=body(stream=stream))
    assert "secret" not in answer.text + caplog.text
    assert answer.headers["x-request-id"] in answer.text and answer.headers["x-request-id"] in caplog.text
    if stream:
        last = chunks(answer.text)[-1]
        assert "error" in last or last["type"] in ("error", "response.failed")
    else:
        assert answer.status_code == 500
    assert eventually(lambda: site.relay.status().running == 0)


def test_signs_of_life_while_everything_said_is_hidden(embedded: Codec) -> None:
    """A tool block that may not be shown is sampled for a second: comments come all the same."""
    with scripted(embedded, keep_alive=0.1) as site:
        site.script("</think>Yes." + block(PARIS), delay=0.02)
        body = {"model": MODEL, "messages": [user("Hi")], "stream": True}
        with httpx.stream("POST", site.url + "/chat/completions", json=body) as answer:
            lines = list(answer.iter_lines())
    said = next(n for n, line in enumerate(lines) if "Yes" in line)
    assert sum(line.startswith(":") for line in lines[said:]) >= 3


def test_one_model(site: Site) -> None:
    assert site.openai().models.retrieve(MODEL).id == MODEL
    assert site.anthropic().models.retrieve("small").id == "small"
    refused = site.raw.get("/v1/models/gpt-2")
    assert refused.status_code == 404 and MODEL in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", [*PATHS, "/v1/messages/count_tokens"])
def test_the_loop_goes_on_while_large_bodies_are_read(site: Site, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While four are read, others are answered: nobody waits for the end of a reading that does not come."""
    gate, reading = threading.Event(), threading.Semaphore(0)

    def held(work: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*arguments: Any, **options: Any) -> Any:
            if len(arguments[-2]) > 10_000:
                reading.release()
                gate.wait(60)
            return work(*arguments, **options)

        return wait

    monkeypatch.setattr(app, "open_exchange", held(app.open_exchange))
    monkeypatch.setattr(app, "count_tokens", held(app.count_tokens))
    site.script("</think>ok")
    large = body(messages=[user("word " * 6_000)], input="word " * 6_000, prompt="word " * 6_000)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(httpx.post, site.url + path, json=large, timeout=60) for _ in range(4)]
        assert all(reading.acquire(timeout=20) for _ in answers)
        assert site.raw.get("/health").status_code == 200
        assert site.chat(**OFF).status_code == 200
        assert not any(answer.done() for answer in answers)
        gate.set()
    assert [answer.result().status_code for answer in answers] == [200] * 4


def test_the_description_names_every_endpoint(site: Site) -> None:
    paths = site.raw.get("/openapi.json").json()["paths"]
    wanted = ("chat/completions", "completions", "responses", "messages", "messages/count_tokens", "models")
    assert {f"/v1/{name}" for name in wanted} <= set(paths)
    assert all("requestBody" in way for path in paths.values() for name, way in path.items() if name == "post")


def test_turns_that_are_not_written_are_told(embedded: Codec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    served = desk(embedded, replay=ReplayStore(tmp_path / "file" / "replay"))
    with serving(ScriptedEngine([[]]), embedded, served, ServerSettings()) as site:
        site.script("Let me see.</think>Hello!")
        assert site.chat().status_code == 200
        for path in ("/ready", "/status"):
            assert "kept in memory only" in site.raw.get(path).json()["notes"][0]
