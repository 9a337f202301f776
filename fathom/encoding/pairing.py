"""Which result answers which call, whatever a client did to their order and their ids. Reference api C.4 number 27."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mark:
    """A call or a result in a conversation; turn: calls of one turn are answered in their order."""

    turn: int
    is_call: bool
    id: str


def pair(marks: Sequence[Mark]) -> dict[int, int]:
    """Place of a call -> place of its result, in linear time.

    An id may be used again: a result belongs to the latest turn before it that waits for its id, and there to the
    first call. What then has no partner is matched by id alone. Missing here: calls without a result.
    """
    waiting: defaultdict[str, list[tuple[int, deque[int]]]] = defaultdict(list)
    stray: defaultdict[str, deque[int]] = defaultdict(deque)
    answers: dict[int, int] = {}
    for place, mark in enumerate(marks):
        turns = waiting[mark.id]
        if mark.is_call:
            if not turns or turns[-1][0] != mark.turn:
                turns.append((mark.turn, deque()))
            turns[-1][1].append(place)
        elif turns:
            answers[turns[-1][1].popleft()] = place
            if not turns[-1][1]:
                turns.pop()
        else:
            stray[mark.id].append(place)
    for id, turns in waiting.items():
        for call in (call for _, calls in turns for call in calls):
            if stray[id]:
                answers[call] = stray[id].popleft()
    return answers


class Names:
    """Ids that are used once: the library refuses one that it has seen."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def unique(self, id: str) -> str:
        """The id itself the first time, then one like it."""
        name = id = id or "call"
        while name in self._seen:
            self._seen[id] += 1
            name = f"{id}_{self._seen[id]}"
        self._seen[name] = 1
        return name


# --- chat


def chat_turns(turns: Sequence[Body]) -> list[Body]:
    """Each call's result directly after it, in the calls' order; a missing one is empty, one without a call is text."""
    marks: list[Mark] = []
    first: dict[int, int] = {}
    for n, turn in enumerate(turns):
        first[n] = len(marks)
        if turn.get("role") == "tool":
            marks.append(Mark(n, False, turn["tool_call_id"]))
        else:
            marks += [Mark(n, True, call.get("id") or "") for call in turn.get("tool_calls") or ()]
    answers, names, placed = pair(marks), Names(), list[Body]()
    taken = {marks[place].turn for place in answers.values()}
    for n, turn in enumerate(turns):
        if turn.get("role") == "tool":
            placed += [] if n in taken else [{"role": "user", "content": turn["content"]}]
            continue
        calls = [{**call, "id": names.unique(call.get("id") or "")} for call in turn.get("tool_calls") or ()]
        placed.append({**turn, "tool_calls": calls} if calls else turn)
        for k, call in enumerate(calls):
            found = answers.get(first[n] + k)
            text = "" if found is None else turns[marks[found].turn]["content"]
            placed.append({"role": "tool", "tool_call_id": call["id"], "content": text})
    return placed


# --- messages


def message_turns(turns: Sequence[Body]) -> list[Body]:
    """Calls last in a turn, their results first in the next; what has no partner is added or becomes text."""
    marks: list[Mark] = []
    blocks: list[Body] = []
    for n, turn in enumerate(turns):
        for block in turn["content"]:
            if block["type"] == "tool_result":
                marks.append(Mark(n, False, block["tool_use_id"]))
                blocks.append(block)
            elif block["type"] == "tool_use" and turn["role"] == "assistant":
                marks.append(Mark(n, True, block.get("id") or ""))
                blocks.append(block)
    answers, names = pair(marks), Names()
    taken = set(answers.values())
    placed: list[Body] = []
    due: list[Body] = []
    place = 0
    for turn in turns:
        texts, calls, after = list[Body](), list[Body](), list[Body]()
        for block in turn["content"]:
            if place < len(blocks) and block is blocks[place]:
                if marks[place].is_call:
                    calls.append({**block, "id": names.unique(block.get("id") or "")})
                    after.append(_result_block(calls[-1]["id"], blocks, answers.get(place)))
                elif place not in taken:
                    texts.insert(0, {"type": "text", "text": block["content"]})
                place += 1
            elif block["type"] == "tool_use":
                texts.append({"type": "text", "text": "[Unsupported tool_use]"})
            else:
                texts.append(block)
        if due and turn["role"] != "user":
            placed.append({"role": "user", "content": due})
            due = []
        texts = [b for b in texts if b["type"] != "text" or b["text"]]
        content = [*due, *texts, *calls]
        if content or not placed or placed[-1]["role"] != turn["role"]:
            placed.append({"role": turn["role"], "content": content or [{"type": "text", "text": ""}]})
        due = after
    return [*placed, {"role": "user", "content": due}] if due else placed


def _result_block(id: str, blocks: Sequence[Body], place: int | None) -> Body:
    return {"type": "tool_result", "tool_use_id": id, "content": "" if place is None else blocks[place]["content"]}


# --- responses


def response_items(items: Sequence[Any]) -> list[Any]:
    """Each call's output directly after its group of calls; a missing one is empty, one without a call is text."""
    marks: list[Mark] = []
    places: list[int] = []
    group = 0
    for n, item in enumerate(items):
        if is_call(item) or is_output(item):
            marks.append(Mark(group, is_call(item), item.get("call_id") or ""))
            places.append(n)
        group += not is_call(item)
    answers = {places[call]: items[places[result]] for call, result in pair(marks).items()}
    taken = {id(output) for output in answers.values()}
    placed: list[Any] = []
    due: list[Body] = []
    closing, names = False, Names()
    for n, item in enumerate(items):
        if is_output(item) and id(item) in taken:
            closing = True
            continue
        if closing or not is_call(item):
            placed += due
            due, closing = [], False
        if is_call(item):
            call_id = names.unique(item.get("call_id") or "")
            placed.append({**item, "call_id": call_id})
            output = answers.get(n, {}).get("output", "")
            due.append({"type": f"{item['type']}_output", "call_id": call_id, "output": output})
        elif is_output(item):
            placed.append({"type": "message", "role": "user", "content": item.get("output", "")})
        else:
            placed.append(item)
    return placed + due


def is_call(item: Any) -> bool:
    """Whether an item is the call of a tool that a client runs."""
    return isinstance(item, dict) and item.get("type") in ("function_call", "custom_tool_call")


def is_output(item: Any) -> bool:
    """Whether an item is what a tool gave."""
    return isinstance(item, dict) and str(item.get("type", "")).endswith("_call_output")
