"""Cases 60 to 62 of reference api D.3: answers that must have a form, and answers that go on."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.server.harness import MODEL, OFF, Site, chunks, joined, said, user


@pytest.mark.parametrize("wish", ['{"sum": 46, "ok": tru}', "It is 46.", "[1, 2", '{"a": "b</think>', ""])
def test_case_60_json_after_free_thinking(site: Site, wish: str) -> None:
    """Whatever a model would like to say: the mask leaves it nothing but an object once its thinking has ended."""
    site.urge(f"It is a sum.</think>{wish}")
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 2000}
    choice = site.chat("What is 12 + 34? Answer in JSON.", **fields).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["reasoning_content"]


def test_case_60_nobody_says_that_json_is_wanted(site: Site, strict: Site) -> None:
    """Lenient: the model is told, as by a schema. The hosted service wants the word in the prompt."""
    for server in (site, strict):
        server.urge("</think>It is 46.")
    form = {"type": "json_object"}
    content = site.chat(response_format=form).json()["choices"][0]["message"]["content"]
    assert isinstance(json.loads(content), dict) and "Response Format" in site.prompt_text()
    said = site.responses(text={"format": form}).json()["output"][-1]["content"][0]["text"]
    assert isinstance(json.loads(said), dict)
    assert strict.chat(response_format=form).status_code == 400


class Verdict(BaseModel):
    even: bool
    kind: Literal["sum", "list"]


def test_case_61_a_schema_and_parse(real: Site) -> None:
    answer = real.openai().chat.completions.parse(
        model=MODEL, messages=[user("What is 12 + 34?")], response_format=Verdict, temperature=0, max_tokens=300
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


@pytest.mark.parametrize("thinking", [True, False])
def test_messages_parse(real: Site, thinking: bool) -> None:
    """By the client, which sends `output_config.format`."""
    answer = real.anthropic().messages.parse(
        model=MODEL,
        messages=[user("What is 12 + 34?")],
        output_format=Verdict,
        max_tokens=300,
        thinking={"type": "adaptive" if thinking else "disabled"},
    )
    assert isinstance(answer.parsed_output, Verdict)


@pytest.mark.parametrize("form", [7, {"type": "poem"}, {"type": "json_schema"}, {"type": "json_schema", "schema": 7}])
def test_a_format_of_messages_that_is_none(site: Site, form: Any) -> None:
    refused = site.messages(output_config={"format": form})
    assert refused.status_code == 400 and "output_config.format" in refused.json()["error"]["message"]


def test_case_62_an_answer_goes_on(site: Site) -> None:
    site.script("print(1)\n```\nDone.")
    turns = [user("Write code"), said("```python\n", prefix=True)]
    answer = site.chat(path="/beta/chat/completions", messages=turns, stop=["```"], **OFF).json()["choices"][0]
    assert site.prompt_text().endswith("<｜Assistant｜></think>```python\n")
    assert (answer["message"]["content"], answer["finish_reason"]) == ("print(1)\n", "stop")
    raw = site.chat(path="/beta/chat/completions", messages=turns, stop=["```"], stream=True, **OFF).text
    assert joined(raw, "content") == "print(1)\n"
    assert chunks(raw)[-1]["usage"]
