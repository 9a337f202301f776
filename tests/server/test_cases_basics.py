"""Cases 1 to 11 of reference api D.3: models, paths, bodies that are wrong."""

from __future__ import annotations

import httpx
import pytest
from openai import BadRequestError

from tests.server.harness import MODEL, OFF, PREFIXES, Site, user


def test_case_01_the_list_of_models(site: Site) -> None:
    models = site.openai().models.list()
    assert models.object == "list"
    assert {MODEL, "deepseek-v4-pro"} <= {m.id for m in models.data}
    assert all(m.id and m.object == "model" and m.owned_by for m in models.data)


def test_case_02_models_under_every_path(site: Site) -> None:
    answers = [site.raw.get(prefix + "/models") for prefix in PREFIXES]
    assert [a.status_code for a in answers] == [200] * len(PREFIXES)
    assert len({a.text for a in answers}) == 1


def test_case_04_an_answer_without_thinking(site: Site) -> None:
    site.script("Hello!")
    answer = site.openai().chat.completions.create(model=MODEL, messages=[user("Hi")], extra_body=OFF)
    message = answer.choices[0].message
    assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", "Hello!", "stop")
    assert "reasoning_content" not in message.model_dump()
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len(site.prompt())


@pytest.mark.parametrize("base", PREFIXES)
def test_case_05_the_same_under_every_base(site: Site, base: str) -> None:
    site.script("Hello!")
    answer = site.openai(base).chat.completions.create(model=MODEL, messages=[user("Hi")], extra_body=OFF)
    assert answer.choices[0].message.content == "Hello!"
    assert site.openai(base).responses.create(model=MODEL, input="Hi", reasoning={"effort": "none"}).output_text


@pytest.mark.parametrize("base", ["", "/anthropic"])
def test_case_05_messages_under_every_base(site: Site, base: str) -> None:
    site.script("Hello!")
    message = site.anthropic(base).messages.create(
        model=MODEL, max_tokens=50, messages=[user("Hi")], thinking={"type": "disabled"}
    )
    assert message.content[0].text == "Hello!"


def test_case_06_an_unknown_model(site: Site) -> None:
    with pytest.raises(BadRequestError) as refused:
        site.openai().chat.completions.create(model="gpt-9", messages=[user("Hi")])
    assert refused.value.type == "invalid_request_error"
    assert "gpt-9" in str(refused.value) and MODEL in str(refused.value) and "deepseek-v4-pro" in str(refused.value)
    assert site.responses(model="gpt-9").status_code == 400


def test_case_06_claude_names_are_served(site: Site) -> None:
    site.script("</think>Hello!")
    ids = {m["id"] for m in site.raw.get("/models").json()["data"]}
    for name in ("claude-opus-4-8", "claude-sonnet-5", "claude-haiku-4-5", "deepseek-v4-pro[1m]"):
        message = site.anthropic().messages.create(model=name, max_tokens=50, messages=[user("Hi")])
        assert message.model in ids


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b"null", b'"text"', b'{"model": ', b"\xff\xfe{}", b'{"a":1}garbage']
)
@pytest.mark.parametrize("path", ["/chat/completions", "/anthropic/v1/messages", "/responses", "/completions"])
def test_case_07_a_malformed_body(site: Site, path: str, body: bytes) -> None:
    refused = site.raw.post(path, content=body, headers={"content-type": "application/json"})
    assert refused.status_code in (400, 422)
    assert refused.json()["error"]["message"]
    assert site.raw.get("/models").status_code == 200


def test_case_07_the_connection_stays_usable(site: Site) -> None:
    """One connection only: what follows a refused body is read as the next request."""
    site.script("Hello!")
    with httpx.Client(base_url=site.url, limits=httpx.Limits(max_connections=1)) as client:
        for _ in range(3):
            assert client.post("/chat/completions", content=b'{"model"').status_code in (400, 422)
        body = {"model": MODEL, "messages": [user("Hi")], **OFF}
        assert client.post("/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "Hello!"


def test_case_08_unknown_fields_are_ignored(site: Site) -> None:
    site.script("Hello!")
    assert site.chat(foo=1, service_tier="auto", parallel_tool_calls=True, **OFF).status_code == 200
    assert site.messages(foo=1, container=None, **OFF).status_code == 200
    assert site.responses(foo=1, metadata={"a": "b"}).status_code == 200


def test_case_09_no_messages(site: Site) -> None:
    assert site.chat(messages=[]).status_code in (400, 422)
    assert site.messages(messages=[]).status_code in (400, 422)
    assert site.responses(input=[]).status_code in (400, 422)


@pytest.mark.parametrize("value", [0, -1, 393217, "x", 1.5, True, [], {}])
def test_case_10_max_tokens_out_of_range(site: Site, value: object) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        refused = site.chat(**{field: value}, **OFF)
        assert refused.status_code in (400, 422), field
        assert "error" in refused.json()


def test_case_10_max_tokens_in_range(site: Site) -> None:
    site.script("Hello!")
    for value in (1, 393216, None):
        assert site.chat(max_tokens=value, **OFF).status_code == 200


def test_case_11_the_balance(site: Site) -> None:
    found = site.raw.get("/user/balance").json()
    assert found["is_available"] is True
    for info in found["balance_infos"]:
        assert info["currency"] in ("CNY", "USD")
        assert all(isinstance(info[k], str) for k in ("total_balance", "granted_balance", "topped_up_balance"))
