"""Between sampled ids and the prompt library's parser, such that nothing leaks. Reference recipe 5, api A.8.

The parser trusts the model; a model may write half a tool call, markup in the middle of a sentence, or a control token
nobody expects. The guard reads the ids first. To the parser it passes two kinds of things: what the model says, as
plain ids, in which the parser never sees markup; and the structure of thinking and tool calls, as canonical text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any

from fathom.api import FinishReason
from fathom.encoding import markup
from fathom.encoding.conversation import library
from fathom.encoding.markup import CLOSE, END, INVOKE, MARK, OPEN, PARAMETER, may_be_tag, whole_tag
from fathom.encoding.tokenizer import DSML, END_OF_THINKING, Tokenizer


class _In(Enum):
    """Where in an answer the guard is."""

    THINKING = auto()
    CONTENT = auto()
    BLOCK = auto()  # between calls, or where one may begin
    INVOKE = auto()  # between the parameters of a call
    VALUE = auto()  # in a string, passed on as it comes
    HELD = auto()  # in JSON, judged when it is whole
    DROPPED = auto()  # in a block that nobody asked for


class Guard:
    """The ids of one answer.

    thinking: the prompt ends inside the thinking; in_block: it ends inside a tool block; tools: calls may be made.
    """

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool, in_block: bool = False, tools: bool = True) -> None:
        self._tokenizer, self._tools, self._chunk = tokenizer, tools, library().InferenceChunk
        self._end_id, self._mark_id = tokenizer.added[END_OF_THINKING], tokenizer.added[DSML]
        self._added = frozenset(tokenizer.added.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._origin = _In.THINKING if thinking else _In.CONTENT
        self._state = _In.BLOCK if in_block else self._origin
        self._opened = in_block  # the parser is inside a block
        self._held = ""  # read and not yet judged
        self._newlines = ""  # at the end of the content so far: layout if a block follows
        self._parameter = ("", "")  # key and string attribute of a held value
        self._value = ""  # of a held parameter, or text between parameters
        self._filled = False  # the call that is open has a parameter
        self._steps: dict[_In, Callable[[bool], Iterator[Any] | None]] = {
            _In.THINKING: self._prose,
            _In.CONTENT: self._prose,
            _In.BLOCK: self._block,
            _In.INVOKE: self._invoke,
            _In.VALUE: self._string,
            _In.HELD: self._json,
            _In.DROPPED: self._drop,
        }

    @property
    def thinking(self) -> bool:
        """Whether the answer has not come out of its thinking yet."""
        return self._origin is _In.THINKING

    def push(self, token: int) -> list[Any]:
        """The library's chunks that this id makes certain. Control tokens that no answer may hold are dropped."""
        if token in self._added:
            mark = {self._end_id: END, self._mark_id: MARK}.get(token)
            if mark is None:
                return []
            text = self._decoder.decode(b"", final=True) + mark
        else:
            text = self._decoder.decode(self._tokenizer.bytes_of(token))
        self._held += text
        return list(self._read(final=False)) if text else []

    def finish(self, reason: FinishReason) -> list[Any]:
        """What was held back, and the end of whatever is open; an answer cut by its length stays open."""
        if reason is FinishReason.LENGTH and MARK in self._held and may_be_tag(self._held):
            self._held = self._newlines = ""  # a tag cut in two, and the layout before it
        chunks = list(self._read(final=True))
        if reason is FinishReason.LENGTH:
            return chunks + (list(self._held_value(cut=True)) if self._state is _In.HELD else [])
        return chunks + list(self._closed(_In.CONTENT)) + (self._marked(markup.BLOCK_CLOSER) if self._opened else [])

    def _read(self, final: bool) -> Iterator[Any]:
        """Let the states eat what is held until one of them wants more."""
        while self._held and (chunks := self._steps[self._state](final)) is not None:
            yield from chunks
        if final and not self._held and self._newlines and not self._opened:
            yield from self._plain(self._take_newlines())

    # --- the states: each eats from `_held` and gives chunks, or None if it must see more

    def _prose(self, final: bool) -> Iterator[Any] | None:
        """Thinking or content: plain up to markup."""
        text, self._held = self._split_plain(final)
        if text:
            return self._say(text)
        if not self._held:
            return None
        if self._held[0] == END:
            self._held = self._held[1:]
            return self._end_thinking()
        if self._held[0] == MARK:
            self._held = self._held[1:]  # loose, as in "The ｜DSML｜ is"
            return iter(())
        if OPEN.match(self._held) or INVOKE.match(self._held):
            self._state = _In.BLOCK if self._tools else _In.DROPPED
            self._newlines = self._newlines if self._tools else ""  # layout of the block goes with it
            return iter(())
        return None if self._cut_tag(final) else self._skip_tag()

    def _block(self, final: bool) -> Iterator[Any] | None:
        """Between calls; until one has begun nothing is sure."""
        self._held = self._held.lstrip() if self._opened else self._held
        rest = self._held.lstrip()
        if found := INVOKE.match(rest):
            self._held, self._state, self._filled = rest[found.end() :], _In.INVOKE, False
            return iter([*self._begin_block(), *self._marked(markup.invoke_opener(found[2]))])
        for tag in (OPEN, CLOSE["tool_calls"]):
            if found := tag.match(rest):
                self._held = rest[found.end() :]
                if tag is not OPEN and not self._opened:
                    self._state = self._origin
                return iter(())
        if not rest or (not final and may_be_tag(rest)):
            if final:
                self._held = ""
            return None
        if self._opened:
            self._held = rest[1:]  # text after the calls: nobody would show it
            return iter(())
        self._state = self._origin
        return iter(())

    def _invoke(self, final: bool) -> Iterator[Any] | None:
        """Between the parameters of a call; what else stands there waits until one begins or the call ends."""
        text, self._held = self._split_plain(final)
        self._value += text
        if found := PARAMETER.match(self._held):
            self._held = self._held[found.end() :]
            return self._begin_parameter(found[2], found[4] or "")
        if found := CLOSE["invoke"].match(self._held):
            self._held = self._held[found.end() :]
            return self._closed(_In.BLOCK)
        if any(tag.match(self._held) for tag in (INVOKE, OPEN, CLOSE["tool_calls"])):
            return self._closed(_In.BLOCK)
        if not self._held or self._cut_tag(final):
            return None
        self._held = self._held[1:] if self._held[0] in (MARK, END) else markup.UNKNOWN.sub("", self._held, count=1)
        return iter(())

    def _string(self, final: bool) -> Iterator[Any] | None:
        """A string's text as it comes, up to the tag that ends it."""
        text, self._held = self._split_plain(final)
        text = self._take_newlines() + text
        if not final:
            kept = text.rstrip("\n")
            text, self._newlines = kept, text[len(kept) :]
        if text:
            return self._plain(text)
        return self._end_of_value(final)

    def _json(self, final: bool) -> Iterator[Any] | None:
        """A value that must be JSON, collected up to the tag that ends it."""
        text, self._held = self._split_plain(final)
        self._value += text
        return iter(()) if text else self._end_of_value(final)

    def _drop(self, final: bool) -> Iterator[Any] | None:
        """A whole block, unseen."""
        if found := CLOSE["tool_calls"].search(self._held):
            self._held, self._state = self._held[found.end() :], self._origin
            return iter(())
        self._held = "" if final else self._held[-markup.LONGEST :]
        return None

    def _split_plain(self, final: bool) -> tuple[str, str]:
        """What is held, as text that cannot be markup and the rest."""
        found = markup.BORDER.search(self._held)
        if found and final and found[0] in ("<", "</"):
            found = None
        at = found.start() if found else len(self._held)
        return self._held[:at], self._held[at:]

    def _cut_tag(self, final: bool) -> bool:
        """Whether what is held is the beginning of a tag; at the end of an answer it goes, for it was no text."""
        if not may_be_tag(self._held):
            return False
        self._held = "" if final else self._held
        return True

    def _skip_tag(self) -> Iterator[Any]:
        """A tag out of place goes; of something that only begins like one, the control token goes."""
        found = whole_tag(self._held)
        self._held = self._held[found.end() :] if found else self._held.replace(MARK, "", 1)
        return iter(())

    def _end_of_value(self, final: bool) -> Iterator[Any] | None:
        if not self._held:
            return None
        if found := CLOSE["parameter"].match(self._held):
            self._held = self._held[found.end() :]
            return self._end_parameter(self._take_newlines())
        if whole_tag(self._held):
            # The closing tag is missing; a line end before another tag is layout.
            return self._end_parameter(self._take_newlines().removesuffix("\n"))
        if self._cut_tag(final):
            return None
        if self._held[0] in (MARK, END):
            self._held = self._held[1:]
            return iter(())
        return self._skip_tag()

    def _begin_parameter(self, key: str, string: str) -> Iterator[Any]:
        yield from self._bare(alone=False)
        self._parameter, self._state = (key, string), _In.VALUE if string == "true" else _In.HELD
        if string == "true":
            yield from self._parameter_tag(string=True)

    def _end_parameter(self, tail: str) -> Iterator[Any]:
        held, self._state = self._state is _In.HELD, _In.INVOKE
        yield from self._held_value(cut=False) if held else self._plain(tail)
        self._value = ""
        yield from self._marked(markup.PARAMETER_CLOSER)

    def _held_value(self, cut: bool) -> Iterator[Any]:
        """A value that was held: as JSON if it is, or if it was meant to be and was cut; else as a string."""
        said = self._parameter[1]
        as_json = (said == "false") if cut else markup.is_json(self._value)
        yield from self._parameter_tag(string=not as_json)
        yield from self._plain(self._value.strip() if as_json and not cut else self._value)

    def _bare(self, alone: bool) -> Iterator[Any]:
        """Text where parameters belong: a JSON object stands for them; other text, if it is `alone` in its call."""
        text, self._value = self._value.strip(), ""
        given = json.loads(text) if markup.is_json(text) else None
        if not isinstance(given, dict):
            given = {"arguments": text} if text and alone and not self._filled else {}
        for key, value in given.items():
            plain = isinstance(value, str)
            self._parameter = (key, "")
            yield from self._parameter_tag(string=plain)
            yield from self._plain(value if plain else json.dumps(value, ensure_ascii=False))
            yield from self._marked(markup.PARAMETER_CLOSER)

    def _closed(self, wanted: _In) -> Iterator[Any]:
        """Leave the parameter and the call that are open."""
        if self._state in (_In.VALUE, _In.HELD):
            yield from self._end_parameter(self._take_newlines())
        if self._state is _In.INVOKE:
            yield from self._bare(alone=True)
            yield from self._marked(markup.INVOKE_CLOSER)
            self._state = wanted

    def _begin_block(self) -> list[Any]:
        if self._opened:
            return []
        self._opened, self._newlines = True, ""
        ended = [self._chunk.tokens([self._end_id])] if self.thinking else []
        self._origin = _In.CONTENT
        return [*ended, *self._marked(markup.BLOCK_OPENER)]

    def _end_thinking(self) -> Iterator[Any]:
        if self.thinking:
            self._origin = self._state = _In.CONTENT
            yield self._chunk.tokens([self._end_id])

    def _say(self, text: str) -> Iterator[Any]:
        """Prose. Line ends at the end of content wait: before a block they are layout."""
        if not self.thinking and not self._opened:
            text = self._take_newlines() + text
            kept = text.rstrip("\n")
            text, self._newlines = kept, text[len(kept) :]
        if self.thinking or not self._opened:
            yield from self._plain(text)

    def _take_newlines(self) -> str:
        taken, self._newlines = self._newlines, ""
        return taken

    def _parameter_tag(self, string: bool) -> list[Any]:
        self._filled = True
        return self._marked(markup.parameter_opener(self._parameter[0], string))

    def _plain(self, text: str) -> Iterator[Any]:
        """Text that the parser takes for nothing but text."""
        for token in self._tokenizer.encode(markup.LOOSE.sub("", text)):
            yield self._chunk.tokens([token])

    def _marked(self, text: str) -> list[Any]:
        """Text that the parser takes for structure."""
        return [self._chunk.text(text)]
