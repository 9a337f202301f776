"""A parameter's JSON Schema taken apart into what its value may be in the markup of tool calls. Reference api A.6.

There a string is written bare and anything else as JSON, so a schema that allows both is two forms, and a choice as
many as it has branches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

Schema = Mapping[str, Any]

JSON_TYPES = ("integer", "number", "boolean", "null", "array", "object")

ANY_TEXT = r"/(.|\n)*<\//"
"""A string of any text, as the pattern of a grammar, with the beginning of the tag that ends it."""

_DEEPEST, _MOST = 8, 1_000
"""References and choices inside each other, and forms; beyond, a value may be anything."""

_LONGEST = 2_000
"""Characters to which a length is counted."""

_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,8}}"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_OCTET}(\.{_OCTET}){{3}}",
    "ipv6": "([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
"""Formats of a strict schema, each as some of the strings that have it; others say nothing, as in JSON Schema."""


def forms_of(schema: Any, root: Schema) -> list[Schema]:
    """The forms of a value that fits `schema`, at least one: a string has `type: string`, and `const` if it is fixed.

    root: the document that references point into.
    """
    forms = list(islice(_forms(schema, root, 0), _MOST))
    return forms if 0 < len(forms) < _MOST else list(_typed({}))


def text_of(schema: Schema) -> str | None:
    """As `ANY_TEXT`, for a string of this schema: by its pattern, format or length; None if it has none of them."""
    if "pattern" in schema:
        inner = str(schema["pattern"])
        begin, end = ("" if inner.startswith("^") else r"(.|\n)*"), ("" if inner.endswith("$") else r"(.|\n)*")
        inner = f"{begin}({inner.removeprefix('^').removesuffix('$')}){end}"
    elif schema.get("format") in _FORMATS:
        inner = _FORMATS[schema["format"]]
    elif "minLength" in schema or "maxLength" in schema:
        least, most = schema.get("minLength", 0), schema.get("maxLength", _LONGEST + 1)
        inner = rf"(.|\n){{{min(least, _LONGEST)},{most if most <= _LONGEST else ''}}}"
    else:
        return None
    return "/" + re.sub(r"(?<!\\)/", r"\/", inner) + r"<\//"


def _forms(schema: Any, root: Schema, depth: int) -> Iterator[Schema]:
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        schema = {}
    if target := _target(schema, root):
        yield from _forms({**_without(schema, "$ref"), **target}, root, depth + 1)
    elif choice := next((key for key in ("anyOf", "oneOf", "allOf") if _is_choice(key, schema.get(key))), None):
        for branch in schema[choice]:
            yield from _forms({**_without(schema, choice), **branch}, root, depth + 1)
    elif "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        yield from ({"type": "string", "const": value} for value in values if isinstance(value, str))
        if others := [value for value in values if not isinstance(value, str)]:
            yield {"enum": others}
    else:
        yield from _typed(schema)


def _typed(schema: Schema) -> Iterator[Schema]:
    """A string and all else are two forms; what has no type may be both."""
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if None in kinds or "string" in kinds:
        yield {**schema, "type": "string"}
    if others := [k for k in JSON_TYPES if k in kinds or None in kinds]:
        yield {**schema, "type": others if len(others) > 1 else others[0]}


def _is_choice(key: str, branches: Any) -> bool:
    """Whether it can be taken apart: all parts of `allOf` hold at once, so only one of one can."""
    whole = isinstance(branches, list) and all(isinstance(b, Mapping) for b in branches)
    return whole and (len(branches) == 1 if key == "allOf" else len(branches) > 0)


def _target(schema: Schema, root: Schema) -> Schema | None:
    """What a reference inside the same document points at."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for name in reference[2:].split("/"):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _without(schema: Schema, key: str) -> dict[str, Any]:
    return {k: v for k, v in schema.items() if k != key}
