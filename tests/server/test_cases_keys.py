"""Cases 3, 80 and 81 of reference api D.3: keys, where the operator has made some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from fathom.encoding.codec import Codec
from fathom.engine.stub import ScriptedEngine
from fathom.server.books import Books
from fathom.server.database import open_database
from fathom.server.keys import Keyring, Limits
from fathom.server.metrics import Metrics
from fathom.server.prices import PriceBook
from fathom.server.settings import ServerSettings
from tests.server.conftest import desk
from tests.server.harness import MODEL, Site, serving, user

CHAT = {"model": MODEL, "messages": [user("Hi")]}
MESSAGES = CHAT | {"max_tokens": 50}


@pytest.fixture(scope="module")
def locked(embedded: Codec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, str]]:
    """A server that asks for keys, and the one key it knows."""
    folder: Path = tmp_path_factory.mktemp("keys")
    database = open_database(f"sqlite:///{folder}/fathom.db")
    ring = Keyring(database)
    _, secret = ring.create("ann", Limits())
    engine = ScriptedEngine([[]])
    books = Books(Metrics(engine.status), PriceBook.load(), MODEL, keyring=ring)
    with serving(engine, embedded, desk(embedded), ServerSettings(), books=books) as site:
        site.script("Let me see.</think>Hello!")
        yield site, secret
    database.dispose()


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong-1234"}])
@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/completions", "/anthropic/v1/messages"])
def test_case_03_no_answer_without_a_key(locked: tuple[Site, str], path: str, headers: dict[str, str]) -> None:
    site, _ = locked
    seen = len(site.relay.inner.requests)
    refused = httpx.post(site.url + path, json=MESSAGES | {"input": "Hi", "prompt": "Hi"}, headers=headers)
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"
    assert len(site.relay.inner.requests) == seen


def test_case_80_a_wrong_key(locked: tuple[Site, str]) -> None:
    site, _ = locked
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=site.url + "/anthropic", api_key="wrong").messages.create(**MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=site.url, api_key="wrong").chat.completions.create(**CHAT)


@pytest.mark.parametrize("form", ["x-api-key", "bearer", "both"])
def test_case_81_either_header_opens(locked: tuple[Site, str], form: str) -> None:
    """Where both are sent `Authorization` counts."""
    site, secret = locked
    headers = {
        "x-api-key": {"x-api-key": secret},
        "bearer": {"authorization": f"Bearer {secret}"},
        "both": {"authorization": f"Bearer {secret}", "x-api-key": "wrong"},
    }[form]
    answer = httpx.post(site.url + "/anthropic/v1/messages", json=MESSAGES, headers=headers)
    assert answer.status_code == 200
    assert httpx.get(site.url + "/user/balance", headers=headers).json()["is_available"] is True


def test_case_81_the_clients_keys(locked: tuple[Site, str]) -> None:
    site, secret = locked
    for key in ({"api_key": secret}, {"auth_token": secret}):
        client = anthropic.Anthropic(base_url=site.url + "/anthropic", **key)
        assert client.messages.create(**MESSAGES).content[-1].text == "Hello!"
    client = openai.OpenAI(base_url=site.url + "/v1", api_key=secret)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "Hello!"
