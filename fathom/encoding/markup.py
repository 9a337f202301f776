"""How thinking and tool calls are spelled, as text in which control tokens stand out. Reference api A.6.

Read text carries the two control tokens that an answer may hold as lone surrogates, which no decoded text can have.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fathom.encoding.tokenizer import DSML

MARK, END = "\udc01", "\udc02"
"""The mark of a tag, and the end of thinking."""

OPEN = re.compile(f"<{MARK}tool_calls\\s*>")
CLOSE = {name: re.compile(f"</{MARK}{name}\\s*>") for name in ("tool_calls", "invoke", "parameter")}
INVOKE = re.compile(f"<{MARK}invoke\\s+name=([\"'])(.*?)\\1[^<>\\n]*>")
PARAMETER = re.compile(f"<{MARK}parameter\\s+name=([\"'])(.*?)\\1(?:\\s+string=([\"'])(true|false)\\3)?\\s*>")
TAGS = (OPEN, INVOKE, PARAMETER, *CLOSE.values())

UNKNOWN = re.compile(f"</?{MARK}[^<>\\n{MARK}{END}]*>?")
"""What is spelled like a tag and is none."""

BORDER = re.compile(f"</?{MARK}|</?\\Z|{MARK}|{END}")
"""Where plain text ends: at markup, at a loose control token, or at what may yet become markup."""

_QUOTED = re.compile(r'"[^"]*("|\Z)')
"""What stands in quotes inside a tag, or begins to: a bracket there does not end it."""

LOOSE = re.compile(f"[{MARK}{END}]")

LONGEST = 400
"""Characters that a tag may have before it is taken for text."""

BLOCK_OPENER, BLOCK_CLOSER = f"<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"
INVOKE_CLOSER, PARAMETER_CLOSER = f"</{DSML}invoke>\n", f"</{DSML}parameter>\n"


def invoke_opener(name: str) -> str:
    """The tag of a call; the name without what could be read as markup."""
    kept = re.sub(r"[^\w.:/-]", "", name)
    return f'<{DSML}invoke name="{kept}">\n'


def parameter_opener(key: str, string: bool) -> str:
    """The tag of a parameter. The parser copies a key into JSON, so it is escaped, in ASCII so that it is no markup."""
    escaped = json.dumps(LOOSE.sub("", key))[1:-1]
    escaped = escaped.replace(" ", "\\u0020").replace("<", "\\u003c").replace("'", "\\u0027")
    return f'<{DSML}parameter name="{escaped}" string="{"true" if string else "false"}">'


def whole_tag(text: str) -> re.Match[str] | None:
    """The tag at the beginning of the text, if there is one."""
    return next((found for tag in TAGS if (found := tag.match(text))), None)


def may_be_tag(text: str) -> bool:
    """Whether it is the beginning of a tag that is not yet whole."""
    if text in ("<", "</"):
        return True
    if not text.startswith((f"<{MARK}", f"</{MARK}")) or len(text) > LONGEST or whole_tag(text):
        return False
    inside = text[2:]
    broken = MARK in inside[1:] or END in inside or "\n" in inside
    return not broken and ">" not in _QUOTED.sub("", inside)


def is_json(text: str) -> bool:
    """Whether it is one JSON value; NaN and the infinities are none."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> Any:
    raise ValueError(name)
