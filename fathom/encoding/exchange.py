"""What a request of any protocol is once it was understood; the server knows nothing else of it."""

from __future__ import annotations

from typing import Any

from fathom.api import GenerateRequest, SamplingParams
from fathom.encoding.guide import AnswerGuide


class Exchange:
    """A request that was understood: what the engine is asked, and who writes the answer.

    protocol: chat, messages, responses or completions; model: the name in the answer; stream: it is wanted in pieces;
    thinking: it begins in thought.
    """

    protocol: str
    model: str
    prompt_ids: list[int]
    params: SamplingParams
    guide: AnswerGuide
    stream: bool
    thinking: bool

    def generate(self) -> GenerateRequest:
        """For the engine."""
        raise NotImplementedError

    def writer(self, identity: str) -> Any:
        """Writes the answer. Once."""
        raise NotImplementedError

    def remember(self, writer: Any) -> None:
        """The answer is whole: keep what was sampled."""
