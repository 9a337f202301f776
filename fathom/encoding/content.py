"""The content of messages, in whatever form it comes, as text. Reference api A.6, B.9, C.4."""

from __future__ import annotations

from typing import Any

from fathom.encoding.body import shown
from fathom.errors import RequestError

_BILLING = "x-anthropic-billing-header"


def text_of(content: Any) -> str:
    """Any content as text: parts are joined by blank lines, what is not text is named."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise RequestError(400, f"content must be a string or a list of parts, not {shown(content)}", param="content")
    return "\n\n".join(part_text(part) for part in content if part)


def part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RequestError(400, f"a part of content must be an object, not {shown(part)}", param="content")
    for key in ("text", "refusal", "input_text", "output_text"):
        if isinstance(part.get(key), str):
            return str(part[key])
    source = part.get("source")
    if part.get("type") == "document" and isinstance(source, dict) and source.get("type") in ("text", "content"):
        return text_of(source.get("data") or source.get("content"))
    if part.get("type") == "search_result":
        return text_of(part.get("content"))
    return f"[Unsupported {part.get('type', 'part')}]"


def without_billing(text: Any) -> Any:
    """Without the header that a command-line agent puts first and changes with every call."""
    if isinstance(text, str):
        return "\n".join(line for line in text.split("\n") if not line.startswith(_BILLING))
    if isinstance(text, list):
        blocks = [b for b in text if not (isinstance(b, dict) and str(b.get("text", "")).startswith(_BILLING))]
        return [{"type": "text", "text": part_text(b)} for b in blocks]
    return text
