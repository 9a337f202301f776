"""Cases 84 to 90 of reference api D.3: Responses, driven by the openai client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import APIError, BadRequestError

from tests.server.harness import BROKEN, MODEL, PARIS, T1_RESPONSES, Site, block, data_lines, invoke, leaks

SAID = "Let me see.</think>It is four."
CALLED = "Look it up.</think>One moment." + block(PARIS)


def create(site: Site, **fields: Any) -> Any:
    return site.openai("").responses.create(**{"model": MODEL, "input": "2+2?"} | fields)


def test_case_84_an_answer(site: Site) -> None:
    site.script(SAID)
    answer = create(site)
    assert answer.output_text == "It is four."
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == "Let me see."
    raw = site.responses("2+2?").json()
    assert raw["store"] is False and raw["previous_response_id"] is None and raw["status"] == "completed"
    used = raw["usage"]
    assert (used["input_tokens"], used["output_tokens"]) == (len(site.prompt()), len(site.ids(SAID)))
    assert used["total_tokens"] == used["input_tokens"] + used["output_tokens"]
    assert used["output_tokens_details"]["reasoning_tokens"] > 0


def test_case_85_a_stream(site: Site) -> None:
    site.script(CALLED)
    found = list(create(site, stream=True, tools=[T1_RESPONSES]))
    assert [e.sequence_number for e in found] == list(range(len(found)))
    assert (found[0].type, found[1].type) == ("response.created", "response.in_progress")
    assert found[-1].type == "response.completed"
    assert found[-1].response.usage.output_tokens == len(site.ids(CALLED))
    assert "".join(e.delta for e in found if e.type == "response.output_text.delta") == "One moment."
    assert "".join(e.delta for e in found if e.type == "response.reasoning_text.delta") == "Look it up."
    pieces = [e.delta for e in found if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(pieces)) == {"city": "Paris", "days": 2}
    raw = site.responses(stream=True, tools=[T1_RESPONSES]).text
    assert "[DONE]" not in raw and not leaks(raw)
    for head, data in zip(raw.split("event: ")[1:], data_lines(raw), strict=True):
        assert head.split("\n")[0] == json.loads(data)["type"]


def test_case_85_the_stream_helper(site: Site) -> None:
    site.script(SAID)
    with site.openai("").responses.stream(model=MODEL, input="2+2?") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output_text == "It is four."


@pytest.mark.parametrize("with_reasoning", [True, False])
def test_case_86_a_loop_of_calls(site: Site, with_reasoning: bool) -> None:
    stub = site.script(CALLED, "</think>18 degrees.")
    first = create(site, tools=[T1_RESPONSES])
    items: list[Any] = [{"role": "user", "content": "2+2?"}]
    items += [i.to_dict() for i in first.output if with_reasoning or i.type != "reasoning"]
    call = next(i for i in first.output if i.type == "function_call")
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "18C"})
    assert create(site, input=items, tools=[T1_RESPONSES]).output_text == "18 degrees."
    eos = site.codec.tokenizer.added["<｜end▁of▁sentence｜>"]
    known = [*stub.requests[0].prompt_ids, *site.ids(CALLED), eos]
    assert list(stub.requests[1].prompt_ids)[: len(known)] == known


def test_case_87_cut_by_length(site: Site) -> None:
    site.script(SAID)
    answer = create(site, max_output_tokens=len(site.ids(SAID)) - 2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert list(create(site, max_output_tokens=2, stream=True))[-1].type == "response.incomplete"


def test_case_88_what_is_ignored(site: Site) -> None:
    site.script(SAID)
    fields = {
        "previous_response_id": "resp_1",
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "truncation": "auto",
        "store": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "reasoning": {"effort": "high", "summary": "auto"},
        "instructions": "Be kind.",
    }
    assert create(site, **fields).output_text == "It is four."
    assert site.prompt_text().startswith("<｜begin▁of▁sentence｜>Be kind.<｜User｜>")


PATCH = "*** Begin Patch\n*** Update File: a.py\n-1\n+2\n*** End Patch"


def test_case_89_apply_patch(site: Site) -> None:
    tools = [{"type": "custom", "name": "apply_patch", "description": "Patch files"}]
    site.script("Hm.</think>" + block(invoke("apply_patch", ("input", "true", PATCH))))
    found = list(create(site, tools=tools, stream=True))
    pieces = [e.delta for e in found if e.type == "response.custom_tool_call_input.delta"]
    assert "".join(pieces) == PATCH
    (call,) = [i for i in found[-1].response.output if i.type == "custom_tool_call"]
    assert (call.name, call.input) == ("apply_patch", PATCH)
    items = [
        {"role": "user", "content": "2+2?"},
        call.to_dict(),
        {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"},
    ]
    site.script("</think>ok")
    assert create(site, tools=tools, input=items).output_text == "ok"
    assert "*** End Patch" in site.prompt_text() and "done" in site.prompt_text()


def test_case_89_other_custom_tools(site: Site) -> None:
    with pytest.raises(BadRequestError, match="other"):
        create(site, tools=[{"type": "custom", "name": "other"}])


def test_case_90_a_schema(real: Site) -> None:
    schema = {
        "type": "object",
        "properties": {"even": {"type": "boolean"}, "kind": {"enum": ["sum", "list"]}},
        "required": ["even", "kind"],
        "additionalProperties": False,
    }
    text = {"format": {"type": "json_schema", "name": "verdict", "schema": schema, "strict": True}}
    answer = create(real, input="What is 12 + 34?", text=text, temperature=0, max_output_tokens=300)
    found = json.loads(answer.output_text)
    assert isinstance(found["even"], bool) and found["kind"] in ("sum", "list") and len(found) == 2


def test_a_fault_within_a_stream(site: Site) -> None:
    site.break_down()
    try:
        found = list(create(site, stream=True))
    except APIError as broken:
        assert BROKEN in str(broken)
    else:
        assert found[-1].type in ("response.failed", "error")
        assert BROKEN in found[-1].model_dump_json()
