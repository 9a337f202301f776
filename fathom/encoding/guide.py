"""What may be sampled next in one answer: the thinking and its budget, JSON, a schema, tool calls. Reference api B.4.

A guide begins to constrain where the answer proper begins, after the thinking. Control tokens that no answer may hold
are never allowed; nor is an end before the thinking has ended, or right after it, so that an answer is never empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fathom.encoding.grammar import Grammars
from fathom.encoding.tokenizer import DSML, END_OF_THINKING


class AnswerGuide:
    """The guide of one answer, an `api.Guide`.

    thinking: it begins in thought; budget: tokens after which the thinking is ended, None for none; matcher: what the
    answer must be from its first token on; calls: what follows the first control token of a tool block that the model
    opens by itself. Without either, an answer is free.
    """

    def __init__(
        self,
        grammars: Grammars,
        *,
        thinking: bool,
        budget: int | None = None,
        matcher: Any = None,
        calls: Any = None,
    ) -> None:
        added = grammars.tokenizer.added
        self._tokenizer, self._eos = grammars.tokenizer, grammars.eos
        self._end, self._mark = added[END_OF_THINKING], added[DSML]
        self._thinking, self._left = thinking, budget
        self._matcher, self._calls = matcher, calls
        self._begun, self._after_bracket = False, False
        self._done = False
        self._free = _all_but(self._tokenizer.size, set(added.values()))

    def allowed(self) -> bytes | None:
        """The mask of what may come next."""
        if self._done:
            return _only(self._tokenizer.size, [self._eos])
        if self._thinking:
            if self._left is not None and self._left <= 0:
                return _only(self._tokenizer.size, [self._end])
            return _with(self._free, [self._end])
        if self._matcher:
            return bytes(self._matcher.compute_bitmask())
        marks = [self._mark] if self._calls and self._after_bracket else []
        return _with(self._free, marks + ([self._eos] if self._begun else []))

    def accept(self, token: int) -> None:
        """This token was sampled."""
        if self._thinking:
            self._left = None if self._left is None else self._left - 1
            self._thinking = token != self._end
            return
        self._begun = True
        if self._matcher:
            self._matcher.consume_token(token)
            self._done = self._matcher.is_stopped()
        elif token == self._mark:
            self._matcher, self._calls = self._calls, None
        else:
            self._after_bracket = self._tokenizer.bytes_of(token).endswith(b"<")


def _only(size: int, ids: Sequence[int]) -> bytes:
    return _with(bytes(-(-size // 8)), ids)


def _with(mask: bytes, ids: Sequence[int]) -> bytes:
    """The mask with these ids allowed as well."""
    if not ids:
        return mask
    bits = bytearray(mask)
    for i in ids:
        bits[i // 8] |= 1 << i % 8
    return bytes(bits)


def _all_but(size: int, ids: set[int]) -> bytes:
    bits = bytearray(b"\xff" * -(-size // 8))
    for i in [*ids, *range(size, 8 * len(bits))]:
        if i < 8 * len(bits):
            bits[i // 8] &= ~(1 << i % 8)
    return bytes(bits)
