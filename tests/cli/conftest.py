from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import fathom
from fathom.api import Event, FinishReason, SamplingParams, Usage
from fathom.cli import chat, generate
from fathom.encoding.chat import Chat
from fathom.encoding.codec import Codec
from fathom.encoding.tokenizer import Tokenizer
from fathom.engine.llm import LLM
from tests.oracle import draw_config, draw_weights, our_model

Piped = Callable[[bytes], None]


@pytest.fixture(scope="session")
def codec() -> Codec:
    """The embedded model's tokenizer and dialect."""
    return Codec(Tokenizer.load(Path(fathom.__path__[0]) / "weights" / "small"))


@pytest.fixture(scope="session")
def tiny(codec: Codec) -> LLM:
    """A random model of two layers with the embedded tokenizer's vocabulary and a context of 200."""
    config = draw_config(1, vocab_size=codec.tokenizer.size, num_hidden_layers=2, compress_ratios=[4, 128, 0])
    return LLM(our_model(config, draw_weights(config, 1)), max_context=200)


@dataclass
class Script:
    """An engine that says what it was told, text by text, and remembers what it was asked; None interrupts it."""

    codec: Codec
    answers: list[str | None] = field(default_factory=list)
    context: int = 1000
    prompts: list[list[int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Event]:
        self.prompts.append(list(prompt_ids))
        self.params.append(params)
        thinking, _, text = (self.answers.pop(0) or "stopped here").partition("</think>")
        added = self.codec.tokenizer.added["</think>"]
        ids = [*self.codec.tokenizer.encode(thinking), added, *self.codec.tokenizer.encode(text)]
        for token in ids:
            yield Event(token=token)
            if "stopped" in thinking:
                raise KeyboardInterrupt
        yield Event(finish=FinishReason.STOP, usage=Usage(len(prompt_ids), len(ids)))

    def generate_batch(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Event]]:
        return [list(self.generate(*r)) for r in requests]

    def asked(self, n: int) -> str:
        """The text of the n-th prompt."""
        return self.codec.tokenizer.decode(self.prompts[n])


@pytest.fixture
def script(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> Script:
    """The verbs talk to this engine."""
    engine = Script(codec)
    for verb in (chat, generate):
        monkeypatch.setattr(verb, "open_chat", lambda *_, **__: Chat(engine, codec))
    return engine


@pytest.fixture
def with_tiny(codec: Codec, tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verbs talk to the tiny random model."""
    for verb in (chat, generate):
        monkeypatch.setattr(verb, "open_chat", lambda *_, **__: Chat(tiny, codec))


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Piped:
    """Puts bytes into standard input."""

    def put(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))

    return put
