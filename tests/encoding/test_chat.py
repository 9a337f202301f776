"""A chat model over a scripted engine: what becomes of an engine that fails in the middle."""

from __future__ import annotations

import pytest

from fathom.api import ChatRequest, Completion, Delta, FinishReason
from fathom.config import WEIGHTS
from fathom.encoding.chat import Chat
from fathom.encoding.codec import Codec
from fathom.engine.stub import Script, ScriptedEngine
from fathom.errors import FathomError

ASKED = ChatRequest(messages=[{"role": "user", "content": "Hi"}], effort="none")


@pytest.fixture(scope="module")
def small() -> Codec:
    return Codec.load(WEIGHTS / "small")


def test_what_was_said_is_shown_and_the_engine_s_line_is_raised(small: Codec) -> None:
    ids = small.tokenizer.splice("Hello there", [])
    pieces = Chat(ScriptedEngine([Script(ids, FinishReason.ERROR, "out of memory: use less")]), small).stream(ASKED)
    shown: list[Delta | Completion] = []
    with pytest.raises(FathomError, match=r"^out of memory: use less$"):
        shown.extend(pieces)
    assert "".join(piece.text for piece in shown).startswith("Hello")


def test_in_a_batch_too(small: Codec) -> None:
    engine = ScriptedEngine([small.tokenizer.splice("fine", []), Script([], FinishReason.ERROR, "it broke")])
    with pytest.raises(FathomError, match="it broke"):
        Chat(engine, small).chat_batch([ASKED, ASKED])
