"""What an answer must look like: JSON, a schema, a tool call, a budget of thinking. Reference api B.4.

Masks come from `llguidance`. A guide begins to constrain where the answer proper begins, after the thinking. Control
tokens that no answer may hold
are never allowed; nor is an end before the thinking has ended, or right after it, so that an answer is never empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from fathom.encoding.tokenizer import DSML, END_OF_THINKING, Tokenizer
from fathom.errors import RequestError

Schema = Mapping[str, Any]

_COMPACT: Schema = {"x-guidance": {"whitespace_flexible": False}}
"""JSON without optional white space, of which a model that is lost could write for ever."""

_JSON_TYPES = ("integer", "number", "boolean", "null", "array", "object")


@dataclass(frozen=True, slots=True)
class Function:
    """A tool that may be called, with the JSON Schema of its arguments."""

    name: str
    parameters: Schema


class Grammars:
    """Makes matchers for one tokenizer. Raises RequestError for a schema that cannot be enforced."""

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self.tokenizer, self.eos = tokenizer, eos
        self.mark = f"<[{tokenizer.added[DSML]}]>"
        # The tools of an agent come with every round: compiling them takes longer than all else in reading it.
        self._compiled = lru_cache(maxsize=32)(self._compile)

    @cached_property
    def _vocabulary(self) -> Any:
        """The library's tokenizer, in which no control token can pass for text."""
        layout = json.loads(self.tokenizer.source)
        for token in layout["added_tokens"]:
            token["special"] = True
        return _library().LLTokenizer(json.dumps(layout), n_vocab=self.tokenizer.size, eos_token=self.eos)

    def json(self, schema: Schema) -> Any:
        """A matcher for one JSON value that fits `schema`."""
        return self._matcher(f"start: %json {json.dumps({**_COMPACT, **schema})}\n", "the schema")

    def calls(self, functions: Sequence[Function], opening: str) -> Any:
        """A matcher for a block of calls; `opening`: what of its beginning is still to come.

        The arguments stand in the order of the schema; a string may hold any text, other values fit their schema.
        """
        lines = [f'start: {opening}invoke ("\\n" invoke)* "\\n</" {self.mark} "tool_calls>"']
        lines.append("invoke: " + " | ".join(f"f{n}" for n in range(len(functions))))
        for n, function in enumerate(functions):
            lines += self._function(n, function)
        lines.append("TEXT: /(.|\\n)*<\\//")
        return self._matcher("\n".join(lines) + "\n", "the tools' parameters")

    def opening(self, whole: bool) -> str:
        """The beginning of a block, from its blank line or from behind its first control token."""
        return (f'"\\n\\n<" {self.mark} ' if whole else "") + '"tool_calls>\\n" '

    def _function(self, n: int, function: Function) -> Iterator[str]:
        properties = function.parameters.get("properties") or {}
        required = set(function.parameters.get("required") or ())
        parts = [f"f{n}p{i}{'' if key in required else '?'}" for i, key in enumerate(properties)]
        if not properties and function.parameters.get("additionalProperties") is not False and function.parameters:
            parts.append(f"f{n}any*")
            yield f"f{n}any: {self._tag_open(None)} ({self._string('TEXT')} | {self._value({})})"
        head = json.dumps(f'invoke name="{function.name}">\n')
        yield f'f{n}: "<" {self.mark} {head} {" ".join(parts)} "</" {self.mark} "invoke>"'
        shared = {k: function.parameters[k] for k in ("$defs", "$def", "definitions") if k in function.parameters}
        for i, (key, schema) in enumerate(properties.items()):
            yield f"f{n}p{i}: {self._tag_open(key)} ({' | '.join(self._forms(schema, shared))})"

    def _forms(self, schema: Any, shared: Schema) -> Iterator[str]:
        """A value as the markup writes it: strings bare, everything else as JSON."""
        schema = schema if isinstance(schema, dict) else {}
        if texts := [v for v in schema.get("enum", [schema.get("const")]) if isinstance(v, str)]:
            yield from (self._string(json.dumps(f"{text}</")) for text in texts)
        elif _may_be_string(schema):
            yield self._string("TEXT")
        others = [v for v in schema.get("enum", ()) if not isinstance(v, str)]
        if "enum" in schema and others:
            yield self._value({"enum": others})
        elif "enum" not in schema and "const" not in schema and (kinds := _json_kinds(schema)):
            yield self._value({**schema, **shared, **({"type": kinds} if kinds != [schema.get("type")] else {})})

    def _tag_open(self, key: str | None) -> str:
        name = '/[^"<>\\n]+/' if key is None else json.dumps(key)
        return f'"<" {self.mark} "parameter name=\\"" {name} "\\" string=\\""'

    def _string(self, text: str) -> str:
        return f'"true\\">" {text} {self.mark} "parameter>\\n"'

    def _value(self, schema: Schema) -> str:
        wanted = {**_COMPACT, **(schema or {"type": list(_JSON_TYPES)})}
        return f'"false\\">" %json {json.dumps(wanted)} "</" {self.mark} "parameter>\\n"'

    def _matcher(self, lark: str, what: str) -> Any:
        return self._compiled(lark, what).deep_copy()

    def _compile(self, lark: str, what: str) -> Any:
        lib = _library()
        matcher = lib.LLMatcher(self._vocabulary, lib.LLMatcher.grammar_from_lark(lark), log_level=0)
        if matcher.is_error():
            reason = str(matcher.get_error()).strip().split("\n")[0]
            raise RequestError(400, f"{what} cannot be enforced: {reason}")
        return matcher


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


def _may_be_string(schema: Schema) -> bool:
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")) and kind is None:
        return True
    return None in kinds or "string" in kinds


def _json_kinds(schema: Schema) -> list[str]:
    """The types other than string that a value of this schema may have."""
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    return [k for k in _JSON_TYPES if k in kinds or None in kinds]


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


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError(501, "constrained answers need the package llguidance: install it") from None
    return llguidance
