"""Tasks in a checkpoint's own prompt format, through the encoding room: what is trained is what will be asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fathom.api import ChatRequest
from fathom.encoding.codec import Codec
from fathom.encoding.dialect import Settings
from fathom.encoding.tokenizer import CONTROLS, END_OF_THINKING, Tokenizer
from fathom.skills.base import Task

_EOS = CONTROLS[1]


class PromptRenderer:
    """Prompts, and the completions that follow them, as token ids."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.size = codec.tokenizer.size
        self.eos = codec.tokenizer.added[_EOS]
        self._end_of_thinking = codec.tokenizer.added[END_OF_THINKING]

    def prompt(self, messages: Sequence[dict[str, Any]], effort: str, tools: Sequence[Any]) -> list[int]:
        """Token ids up to where the model goes on."""
        return self._codec.prompt(ChatRequest(messages=tuple(messages), effort=effort, tools=tuple(tools)))

    def completion(self, task: Task, effort: str) -> list[int]:
        """Thinking (unless the effort is none), answer or tool call, end of the turn."""
        thought = [] if effort == "none" else [*self._encode(task.traces[effort]), self._end_of_thinking]
        said = self._encode(task.answer) if task.tool_call is None else self._call(task)
        return [*thought, *said, self.eos]

    def _encode(self, text: str) -> list[int]:
        return self._codec.tokenizer.encode(text)

    def _call(self, task: Task) -> list[int]:
        """The tool call as the format writes it into a history, cut out of one."""
        assert task.tool_call is not None
        name, arguments = task.tool_call
        function = {"name": name, "arguments": json.dumps(dict(arguments))}
        call = {"id": "0", "type": "function", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        ids = self.prompt([{"role": "user", "content": ""}, turn], "none", ())
        begin = ids.index(self._end_of_thinking) + 1
        return ids[begin : ids.index(self.eos, begin)]


def open_renderer(tokenizer: Path) -> PromptRenderer:
    """A renderer with the tokenizer of a folder and the default (April) dialect."""
    return PromptRenderer(Codec(Tokenizer.load(tokenizer), Settings()))
