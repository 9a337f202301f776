"""A conversation as the ids of a prompt: calls in their order, answers made here exactly as they were sampled."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.encoding.codec import Codec
from fathom.encoding.conversation import library
from fathom.encoding.replay import Turn
from fathom.encoding.tokenizer import END_OF_THINKING

Recall = Callable[[str, Any], Turn | None]
"""(the question, an assistant message of the library) -> the answer as it was sampled, if it was sampled here."""


@dataclass
class Rebuilding:
    """Walks a conversation of the library once.

    thinks: the answer will; prefilled: its last message is the beginning of the answer. After `messages`: `turns` are
    the placeholders for answers whose ids are known, in order; `question` is the last text of the user.
    """

    recall: Recall
    thinks: bool
    prefilled: bool
    turns: list[tuple[str, Turn]] = field(default_factory=list)
    question: str = ""
    _names: dict[str, str] = field(default_factory=dict)
    _calls: int = 0
    _mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def messages(self, given: Sequence[Any]) -> list[Any]:
        """The same messages, call ids in string order as the library sorts by them."""
        return [self._message(message, is_last=n == len(given) - 1) for n, message in enumerate(given)]

    def _message(self, message: Any, is_last: bool) -> Any:
        if message.role == "assistant":
            return self._answer(message, is_last)
        if message.role == "tool":
            name = self._names.get(message.tool_call_id, message.tool_call_id)
            return library().ToolMessage(message.content, name)
        if message.role == "user":
            self.question = message.content
        return message

    def _answer(self, message: Any, is_last: bool) -> Any:
        recipe = library()
        calls = [recipe.ToolCall(self._name(c.id), c.name, c.arguments) for c in message.tool_calls or ()]
        turn = None if is_last else self.recall(self.question, message)
        if turn:
            placeholder = f"\ue000{self._mark}-{len(self.turns)}\ue001"
            self.turns.append((placeholder, turn))
            # An empty reasoning opens the thinking in the header, none leaves it closed.
            return recipe.AssistantMessage(placeholder, reasoning_content="" if self.thinks and turn.thinking else None)
        prefix = message.prefix or (is_last and self.prefilled)
        return recipe.AssistantMessage(message.content, message.reasoning_content, calls or None, prefix=prefix)

    def _name(self, id: str) -> str:
        self._calls += 1
        self._names[id] = f"call_{self._calls:06d}"
        return self._names[id]


def spliced(codec: Codec, rendered: Any, turns: Sequence[tuple[str, Turn]], keep_thinking: bool) -> list[int]:
    """The prompt's ids, each placeholder replaced by the ids that were sampled for it."""
    text, ranges, at = rendered.prompt, rendered.special_ranges, 0
    ids: list[int] = []
    for placeholder, turn in turns:
        place = text.index(placeholder, at)
        ids += codec.tokenizer.splice(text[at:place], _within(ranges, at, place))
        ids = _joined(codec, ids, turn, keep_thinking)
        at = place + len(placeholder)
    return ids + codec.tokenizer.splice(text[at:], _within(ranges, at, len(text)))


def behind_header(codec: Codec, prompt_ids: Sequence[int]) -> tuple[list[int], bool]:
    """What a prompt already has of the answer (a given beginning, a forced block), and whether it began in thinking."""
    added = codec.tokenizer.added
    begin = len(prompt_ids) - 1 - list(reversed(prompt_ids)).index(added["<｜Assistant｜>"]) + 2
    return list(prompt_ids[begin:]), prompt_ids[begin - 1] == added["<think>"]


def _within(ranges: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    return [(a - begin, b - begin) for a, b in ranges if begin <= a and b <= end]


def _joined(codec: Codec, ids: list[int], turn: Turn, keep_thinking: bool) -> list[int]:
    """A turn behind its header: with its thinking where the header opens one, else what came after it."""
    added = codec.tokenizer.added
    think, end = added["<think>"], added[END_OF_THINKING]
    if keep_thinking and turn.thinking and ids[-2:-1] != [think]:
        return [*ids[:-1], think, *turn.ids]
    if turn.thinking and ids[-2:] == [think, end]:
        return [*ids[:-1], *turn.ids]
    shown = turn.ids[turn.ids.index(end) + 1 :] if turn.thinking else turn.ids
    return [*ids, *shown]
