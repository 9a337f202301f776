"""A checkpoint's prompt format: conversations to token ids, sampled token ids to answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fathom.api import ChatRequest, Delta, FinishReason, ToolCall
from fathom.encoding.conversation import conversation, library
from fathom.encoding.dialect import Settings
from fathom.encoding.grammar import Grammars
from fathom.encoding.tokenizer import DSML, END_OF_THINKING, Tokenizer

_UNSPELLABLE = {
    name: f"\ue000{name}"
    for name in ("ref", "ref_end", "box", "box_end", "point", "point_end", "polygon", "polygon_end", "image")
}
"""Grounding marks that the library would honour inside assistant text: given spellings that no vocabulary has."""


class Codec:
    """Renders prompts and reads answers with one tokenizer and one dialect."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings | None = None) -> None:
        recipe = library()
        self.tokenizer = tokenizer
        self.settings = settings or Settings()
        self.native = recipe.Tokenizer.from_str(tokenizer.source)
        self._format = recipe.DeepseekV4Encoding().with_special_tokens(recipe.SpecialTokens(**_UNSPELLABLE))

    @staticmethod
    def load(folder: Path, dialect: str | None = None) -> Codec:
        """The codec of a checkpoint's folder; `dialect` overrides what the folder says."""
        return Codec(Tokenizer.load(folder), Settings.load(folder, dialect))

    def render(self, request: ChatRequest, schema: Any = None) -> Any:
        """The prompt as text (`.prompt`) with the places of its control tokens (`.special_ranges`)."""
        dialect = self.settings.dialect
        return self._format.render_conversation(
            conversation(request.messages, request.effort, dialect, request.tools, schema)
        )

    def render_conversation(self, conversation: Any) -> Any:
        """A conversation of the library as text, with the places of its control tokens."""
        return self._format.render_conversation(conversation)

    @cached_property
    def grammars(self) -> Grammars:
        """What makes guides for this tokenizer."""
        return Grammars(self.tokenizer, self.tokenizer.added["<｜end▁of▁sentence｜>"])

    def prompt(self, request: ChatRequest) -> list[int]:
        """The prompt's token ids. Raises PromptError."""
        rendered = self.render(request)
        return self.tokenizer.splice(rendered.prompt, rendered.special_ranges)

    def reader(self, prompt_ids: Sequence[int]) -> AnswerReader:
        """A reader for the answer to a prompt; whether it begins in thinking is read off the prompt's last token."""
        return AnswerReader(self, thinking=prompt_ids[-1:] == [self.tokenizer.added["<think>"]])


class AnswerReader:
    """Turns sampled ids into thinking, text and tool calls, as they come. Reference api A.8.

    Control tokens other than the end of thinking and the tool mark are dropped: none of them can be part of an answer.
    Text that may become markup, and incomplete characters, are held back.
    """

    def __init__(self, codec: Codec, thinking: bool) -> None:
        recipe = library()
        stage = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
        options = recipe.ParsingOptions(parse_tool_calls=True, thinking_initial_stage=stage)
        request = recipe.ConversationRequest(recipe.Conversation(), recipe.ModelVersion.DeepseekV4Pro)
        generator = recipe.ChatCompletionRequest.chunk_generator(request, "answer", "model")
        added = codec.tokenizer.added
        self._dropped = set(added.values()) - {added[END_OF_THINKING], added[DSML]}
        self._chunk = recipe.InferenceChunk
        self._ends = {FinishReason.LENGTH: recipe.InferenceFinishReason.Length}
        self._stop = recipe.InferenceFinishReason.Stop
        self._stream = recipe.StreamProcessor(generator, options, codec.native)
        self._stream.push(self._chunk.ready())
        self._calls: list[list[str]] = []
        self._texts: list[Delta] = []

    def push(self, token: int) -> Delta:
        """What this sampled id makes visible; the stop token is never pushed."""
        return Delta() if token in self._dropped else self._take(self._stream.push(self._chunk.tokens([token])))

    def finish(self, reason: FinishReason) -> Delta:
        """What was held back, at the end."""
        end = self._chunk.finish(self._ends.get(reason, self._stop))
        return self._take([*self._stream.push(end), *self._stream.finish()])

    @property
    def thinking(self) -> str:
        """All the thinking so far."""
        return "".join(d.thinking for d in self._texts)

    @property
    def text(self) -> str:
        """All the visible text so far."""
        return "".join(d.text for d in self._texts)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far, in the order the model made them."""
        return tuple(ToolCall(*call) for call in self._calls)

    def _take(self, chunks: Sequence[Any]) -> Delta:
        deltas = [c["delta"] for chunk in chunks for c in json.loads(chunk.to_json())["choices"]]
        for call in (call for delta in deltas for call in delta.get("tool_calls") or ()):
            self._add_call(call)
        thinking = "".join(d.get("reasoning_content") or "" for d in deltas)
        delta = Delta(thinking, "".join(d.get("content") or "" for d in deltas))
        self._texts.append(delta)
        return delta

    def _add_call(self, piece: dict[str, Any]) -> None:
        if "id" in piece:
            self._calls.append([piece["id"], piece["function"]["name"], ""])
        self._calls[piece["index"]][2] += piece["function"].get("arguments") or ""
