"""Turns kept as they were sampled: what finds them, what survives, and prompts that begin with the prompt before."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import fathom
from fathom.api import Event, FinishReason
from fathom.encoding import replay
from fathom.encoding.codec import Codec
from fathom.encoding.desk import Desk
from fathom.encoding.exchange import Exchange
from fathom.encoding.intake import open_exchange
from fathom.encoding.replay import ReplayStore, Said, Turn

SAID = Said("Two.", "easy", (("add", '{"a": 1.0, "b": [2]}'),))
TURN = Turn.of([5, 6, 7], True, SAID)


def kept(store: ReplayStore, said: Said = SAID, ids: tuple[str, ...] = ("c1",), scope: str = "me") -> Turn | None:
    return store.find(scope, "1+1?", ids, said)


@pytest.fixture
def store() -> ReplayStore:
    store = ReplayStore()
    store.remember("me", "1+1?", ["c1"], SAID, TURN)
    return store


@pytest.mark.parametrize(
    "said",
    [
        SAID,
        Said("Two.\n", None, SAID.calls),
        Said("\nTwo.", "", SAID.calls),
        Said("Two.", "easy\n", (("add", '{"b":[2],"a":1}'),)),
    ],
)
def test_what_clients_do_to_a_turn(store: ReplayStore, said: Said) -> None:
    assert kept(store, said) == TURN


def test_foreign_call_ids_are_no_hindrance(store: ReplayStore) -> None:
    assert kept(store, ids=("renamed",)) == TURN


@pytest.mark.parametrize(
    "said",
    [
        Said("Three.", "easy", SAID.calls),
        Said("Two.", "hard", SAID.calls),
        Said("Two.", "easy", ()),
        Said("Two.", "easy", (("add", '{"a": true, "b": [2]}'),)),
        Said("Two.", "easy", (("add", "broken"),)),
        Said("Two.", "easy", (("add", "[" * 5000),)),
    ],
)
def test_an_edited_turn_is_not_replayed(store: ReplayStore, said: Said) -> None:
    assert kept(store, said) is None


def test_scopes_share_nothing(store: ReplayStore) -> None:
    assert kept(store, scope="you") is None


def test_the_least_recently_used_go_first() -> None:
    store = ReplayStore(limit=2)
    for name in "abc":
        store.remember("me", name, [], Said(name), Turn.of([1], False, Said(name)))
        store.find("me", "a", [], Said("a"))
    assert [store.find("me", name, [], Said(name)) is not None for name in "abc"] == [True, False, True]


def test_turns_are_bounded_in_tokens() -> None:
    store = ReplayStore(tokens=10)
    for name in "abc":
        store.remember("me", name, [], Said(name), Turn.of([1] * 4, False, Said(name)))
    assert [store.find("me", name, [], Said(name)) is not None for name in "abc"] == [False, True, True]


def test_turns_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "replay"
    first = ReplayStore(path)
    first.remember("me", "1+1?", ["c1"], SAID, TURN)
    first.close()
    assert kept(ReplayStore(path)) == TURN
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "replay"
    first = ReplayStore(path)
    first.remember("me", "1+1?", ["c1"], SAID, TURN)
    first.remember("me", "q", [], Said("x"), Turn.of([9], False, Said("x")))
    first.close()
    path.write_bytes(path.read_bytes()[:-cut])
    second = ReplayStore(path)
    assert kept(second) == TURN
    second.remember("me", "r", [], Said("y"), Turn.of([8], False, Said("y")))
    second.close()
    third = ReplayStore(path)
    assert kept(third) == TURN and third.find("me", "r", [], Said("y"))


def test_damaged_and_foreign_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "replay"
    first = ReplayStore(path)
    first.remember("me", "1+1?", ["c1"], SAID, TURN)
    first.close()
    lines = path.read_bytes().splitlines()
    flipped = lines[1][:40] + bytes([lines[1][40] ^ 1]) + lines[1][41:]
    path.write_bytes(b"\n".join([flipped, b"\xff\xfe", b"00000000 {}", *lines[2:]]) + b"\n")
    assert kept(ReplayStore(path), ids=()) == TURN


def test_a_file_that_cannot_be_written_is_told_and_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ReplayStore(tmp_path / "file" / "replay")
    store.remember("me", "1+1?", ["c1"], SAID, TURN)
    assert kept(store) == TURN and "memory only" in store.trouble


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "replay"
    store = ReplayStore(path, limit=10)
    for n in range(3000):
        store.remember("me", str(n), [], Said("x"), Turn.of([n], False, Said("x")))
    assert len(path.read_bytes().split(b"\n")) < 2 * 1100
    store.close()
    assert ReplayStore(path).find("me", "2999", [], Said("x"))


def test_a_full_disk_is_told_and_written_again_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReplayStore(tmp_path / "replay")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        store.remember("me", "1+1?", ["c1"], SAID, TURN)
        assert kept(store) == TURN and "No space left" in store.trouble
        patch.setattr(replay, "_PAUSE", 0.0)
        store._paused_until = 0.0
        store.remember("me", "q", [], Said("x"), Turn.of([9], False, Said("x")))
        assert "No space left" in store.trouble and [f.name for f in tmp_path.iterdir()] == ["replay"]
    store.remember("me", "r", [], Said("y"), Turn.of([8], False, Said("y")))
    assert not store.trouble
    store.close()
    again = ReplayStore(tmp_path / "replay")
    assert kept(again) == TURN and all(again.find("me", q, [], Said(t)) for q, t in ("qx", "ry"))


def test_a_file_that_cannot_be_read_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "replay"
    path.write_bytes(b"somebody's")

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        patch.setattr(replay, "_PAUSE", 0.0)
        store = ReplayStore(path)
        store.remember("me", "1+1?", ["c1"], SAID, TURN)
    assert kept(store) == TURN and "Permission denied" in store.trouble
    assert path.read_bytes() == b"somebody's"


# --- through exchanges


@pytest.fixture(scope="module")
def small() -> Codec:
    return Codec.load(Path(fathom.__path__[0]) / "weights" / "small")


TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def ids_of(codec: Codec, text: str) -> list[int]:
    """A script's ids, controls by their spelling, other text letter by letter: not as a tokenizer would cut it."""
    ids: list[int] = []
    while text:
        control = next((c for c in codec.tokenizer.added if text.startswith(c)), "")
        ids += [codec.tokenizer.added[control]] if control else codec.tokenizer.encode(text[0])
        text = text[len(control) or 1 :]
    return ids


def answered(desk: Desk, exchange: Exchange, text: str) -> tuple[list[int], dict[str, Any]]:
    """An engine's answer, remembered; the prompt with it and its end, and the body that the client sees."""
    writer = exchange.writer("id")
    writer.start(len(exchange.prompt_ids), 0)
    ids = ids_of(desk.codec, text)
    for token in ids:
        writer.push(Event(token=token))
    writer.finish(Event(finish=FinishReason.STOP))
    exchange.remember(writer)
    end = desk.codec.tokenizer.added["<｜end▁of▁sentence｜>"]
    return [*exchange.prompt_ids, *ids, end], json.loads(writer.body())


def opened(desk: Desk, protocol: str, **body: Any) -> Exchange:
    return open_exchange(protocol, json.dumps({"model": "m", **body}).encode(), desk)


def call(city: str) -> str:
    value = f'<｜DSML｜parameter name="city" string="true">{city}</｜DSML｜parameter>'
    return f'<｜DSML｜invoke name="get_weather">\n{value}\n</｜DSML｜invoke>\n'


def block(*cities: str) -> str:
    return f"\n\n<｜DSML｜tool_calls>\n{''.join(map(call, cities))}</｜DSML｜tool_calls>"


ROUNDS = [
    f"\nI look.\n</think>\n\nLook:{block('Paris', 'Rome')}",
    f"\n\nOnce more</think>{block('Bern')}",
    "so</think>Fine.",
]
"""Newlines at borders, which no rendering from JSON gives back."""


@pytest.fixture
def desk(small: Codec) -> Desk:
    return Desk(codec=small, served=("m",), context=1 << 16)


@pytest.mark.parametrize("reasoning", [True, False], ids=["returned", "dropped"])
def test_case_55_chat_prompts_begin_with_the_one_before(desk: Desk, reasoning: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    before: list[int] = []
    for text in ROUNDS:
        exchange = opened(desk, "chat", messages=messages, tools=[TOOL])
        assert exchange.prompt_ids[: len(before)] == before
        before, body = answered(desk, exchange, text)
        said = body["choices"][0]["message"]
        if not reasoning:
            said.pop("reasoning_content", None)
        messages.append(said)
        messages += [{"role": "tool", "tool_call_id": c["id"], "content": "ok"} for c in said.get("tool_calls") or ()]
    messages.append({"role": "user", "content": "Thanks"})
    assert opened(desk, "chat", messages=messages, tools=[TOOL]).prompt_ids[: len(before)] == before


@pytest.mark.parametrize("thoughts", [True, False], ids=["returned", "dropped"])
def test_case_75_messages_prompts_begin_with_the_one_before(desk: Desk, thoughts: bool) -> None:
    tool = {"name": "get_weather", "input_schema": TOOL["function"]["parameters"]}
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    before: list[int] = []
    for text in ROUNDS:
        exchange = opened(desk, "messages", max_tokens=100, messages=messages, tools=[tool])
        assert exchange.prompt_ids[: len(before)] == before
        before, body = answered(desk, exchange, text)
        blocks = [b for b in body["content"] if thoughts or b["type"] != "thinking"]
        results = [{"type": "tool_result", "tool_use_id": b["id"]} for b in blocks if b["type"] == "tool_use"]
        messages += [{"role": "assistant", "content": blocks}]
        messages += [{"role": "user", "content": results or "Thanks"}]
    last = opened(desk, "messages", max_tokens=100, messages=messages, tools=[tool])
    assert last.prompt_ids[: len(before)] == before


@pytest.mark.parametrize("reasoning", [True, False], ids=["returned", "dropped"])
def test_case_86_responses_prompts_begin_with_the_one_before(desk: Desk, reasoning: bool) -> None:
    tool = {"type": "function", **TOOL["function"]}
    items: list[Any] = [{"role": "user", "content": "Weather?"}]
    before: list[int] = []
    for text in ROUNDS:
        exchange = opened(desk, "responses", input=items, tools=[tool])
        assert exchange.prompt_ids[: len(before)] == before
        before, body = answered(desk, exchange, text)
        items += [item for item in body["output"] if reasoning or item["type"] != "reasoning"]
        calls = [item for item in body["output"] if item["type"] == "function_call"]
        items += [{"type": "function_call_output", "call_id": c["call_id"], "output": "ok"} for c in calls]
    items.append({"role": "user", "content": "Thanks"})
    assert opened(desk, "responses", input=items, tools=[tool]).prompt_ids[: len(before)] == before


def test_a_forced_call_is_replayed_with_its_opening(desk: Desk) -> None:
    """With thinking off the prompt itself opens the block."""
    fields = {"tools": [TOOL], "thinking": {"type": "disabled"}}
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    exchange = opened(desk, "chat", messages=messages, tool_choice="required", **fields)
    before, body = answered(desk, exchange, call("Paris") + "</｜DSML｜tool_calls>")
    said = body["choices"][0]["message"]
    messages += [said, {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "ok"}]
    assert opened(desk, "chat", messages=messages, **fields).prompt_ids[: len(before)] == before


def test_a_continued_answer_is_replayed_whole(desk: Desk) -> None:
    given = {"role": "assistant", "content": "``", "prefix": True}
    messages: list[Any] = [{"role": "user", "content": "Code"}]
    off = {"thinking": {"type": "disabled"}}
    before, body = answered(desk, opened(desk, "chat", messages=[*messages, given], **off), "`x`")
    whole = given["content"] + body["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": whole}, {"role": "user", "content": "Go on"}]
    assert opened(desk, "chat", messages=messages, **off).prompt_ids[: len(before)] == before


def test_without_tools_thinking_is_dropped_and_the_answer_stays(desk: Desk) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    exchange = opened(desk, "chat", messages=messages)
    _, body = answered(desk, exchange, "hm</think>Hello")
    messages += [body["choices"][0]["message"], {"role": "user", "content": "Bye"}]
    prompt = opened(desk, "chat", messages=messages).prompt_ids
    assert desk.codec.tokenizer.decode(prompt).endswith(
        "</think>Hello<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜><think>"
    )
    letters, start = ids_of(desk.codec, "Hello"), len(exchange.prompt_ids)
    assert prompt[start : start + len(letters)] == letters


def test_another_user_or_key_gets_no_ids(desk: Desk) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    _, body = answered(desk, opened(desk, "chat", messages=messages, tools=[TOOL]), "hm</think>Hello")
    messages += [body["choices"][0]["message"], {"role": "user", "content": "Bye"}]
    raw = json.dumps({"model": "m", "messages": messages, "tools": [TOOL]}).encode()
    mine = open_exchange("chat", raw, desk).prompt_ids
    assert open_exchange("chat", raw, desk, key="other").prompt_ids != mine
    assert opened(desk, "chat", messages=messages, tools=[TOOL], user_id="other").prompt_ids != mine


@pytest.mark.parametrize("first", ["enabled", "disabled"])
@pytest.mark.parametrize("second", ["enabled", "disabled"])
def test_a_turn_of_the_other_mode(desk: Desk, first: str, second: str) -> None:
    """What was said without thinking stays as it was; what was thought is dropped where nothing is thought any more."""
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    exchange = opened(desk, "chat", messages=messages, tools=[TOOL], thinking={"type": first})
    before, body = answered(desk, exchange, "hm</think>Hello" if first == "enabled" else "Hello")
    messages += [body["choices"][0]["message"], {"role": "user", "content": "Bye"}]
    prompt = opened(desk, "chat", messages=messages, tools=[TOOL], thinking={"type": second}).prompt_ids
    same = first == "disabled" or second == "enabled"
    assert (prompt[: len(before)] == before) is same
    assert ("<｜Assistant｜></think>Hello" in desk.codec.tokenizer.decode(prompt)) is (first == "disabled" or not same)
