"""Grammars of JSON and of tool calls, as `llguidance` takes them. Reference api A.6, B.4."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from fathom.encoding.schemas import ANY_TEXT, JSON_TYPES, Schema, forms_of, text_of
from fathom.encoding.tokenizer import DSML, Tokenizer
from fathom.errors import RequestError

_COMPACT: Schema = {"x-guidance": {"whitespace_flexible": False}}
"""JSON without optional white space, of which a model that is lost could write for ever."""


@dataclass(frozen=True, slots=True)
class Function:
    """A tool that may be called, with the JSON Schema of its arguments; strict: what strings look like is enforced."""

    name: str
    parameters: Schema
    strict: bool = False


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

    def calls(self, functions: Sequence[Function], opening: str, instead: Schema | None = None) -> Any:
        """A matcher for a block of calls; `opening`: what of its beginning is still to come.

        The arguments stand in the order of the schema; a string may hold any text, other values fit their schema.
        instead: what a JSON value must fit that may come in place of the block.
        """
        lines = ["start: block" + (f" | %json {json.dumps({**_COMPACT, **instead})}" if instead is not None else "")]
        lines.append(f'block: {opening}invoke ("\\n" invoke)* "\\n</" {self.mark} "tool_calls>"')
        lines.append("invoke: " + " | ".join(f"f{n}" for n in range(len(functions))))
        for n, function in enumerate(functions):
            lines += self._function(n, function)
        lines.append(f"TEXT: {ANY_TEXT}")
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
        for i, (key, schema) in enumerate(properties.items()):
            forms = [self._form(form, function) for form in forms_of(schema, function.parameters)]
            yield f"f{n}p{i}: {self._tag_open(key)} ({' | '.join(dict.fromkeys(forms))})"

    def _form(self, form: Schema, function: Function) -> str:
        """One form of a value as the markup writes it: strings bare, everything else as JSON."""
        if form.get("type") != "string":
            shared = {k: function.parameters[k] for k in ("$defs", "$def", "definitions") if k in function.parameters}
            return self._value({**form, **shared} if form else {})
        if "const" in form:
            return self._string(json.dumps(f"{form['const']}</"))
        return self._string(text_of(form) or "TEXT" if function.strict else "TEXT")

    def _tag_open(self, key: str | None) -> str:
        if key and "\n" in key:
            raise RequestError(400, f"the markup of calls cannot name a parameter {json.dumps(key)}: rename it")
        name = '/[^"<>\\n]+/' if key is None else json.dumps(key)
        return f'"<" {self.mark} "parameter name=\\"" {name} "\\" string=\\""'

    def _string(self, text: str) -> str:
        return f'"true\\">" {text} {self.mark} "parameter>\\n"'

    def _value(self, schema: Schema) -> str:
        wanted = {**_COMPACT, **(schema or {"type": list(JSON_TYPES)})}
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


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError(501, "constrained answers need the package llguidance: install it") from None
    return llguidance
