"""Where a real engine meets a prompt format: what `chat`, `generate` and `eval` open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fathom.api import SamplingParams
from fathom.cli.screen import Loading, tell_of_device
from fathom.errors import PromptError

if TYPE_CHECKING:
    from fathom.encoding.chat import Chat


def open_chat(
    model: str = "small",
    *,
    device: str = "cpu",
    threads: int | None = None,
    dialect: str | None = None,
    max_context: int | None = None,
) -> Chat:
    """A chat model over the checkpoint in folder `model` (or `small`). Raises ConfigError, CheckpointError."""
    from fathom.config import ModelConfig
    from fathom.encoding.chat import Chat
    from fathom.encoding.codec import Codec
    from fathom.engine.llm import LLM, model_folder

    folder = model_folder(model)
    ModelConfig.load(folder)
    codec = Codec.load(folder, dialect)
    context = max_context or codec.settings.context
    tell_of_device(device)
    llm = LLM.load(folder, device=device, threads=threads, max_context=context, progress=Loading(after=1.0))
    return Chat(llm, codec)


@dataclass(frozen=True)
class Sampling:
    """Sampling flags as given; what was left out is the checkpoint's own setting."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def params(self, chat: Chat) -> SamplingParams:
        """Parameters for this model. Raises SamplingError."""
        settings = chat.codec.settings
        return SamplingParams(
            temperature=settings.temperature if self.temperature is None else self.temperature,
            top_p=settings.top_p if self.top_p is None else self.top_p,
            max_tokens=self.max_tokens or settings.max_tokens,
            seed=self.seed,
        )

    def check(self) -> None:
        """Refuse values out of range before anything is loaded. Raises SamplingError."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        SamplingParams(**given)


def check_effort(effort: str) -> None:
    """Refuse an unknown effort before anything is loaded. Raises PromptError."""
    from fathom.encoding.dialect import Dialect

    Dialect.APRIL.level(effort)


def piped_lines() -> Iterator[str]:
    """The lines of standard input, without their ends. Raises PromptError where it is not UTF-8."""
    for n, line in enumerate(sys.stdin.buffer, 1):
        yield decoded(line, f"line {n} of ").rstrip("\r\n")


def decoded(raw: bytes, where: str = "") -> str:
    """Standard input's bytes as text."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte 0x{raw[error.start]:02x} at place {error.start}"
        raise PromptError(f"{where}standard input is not UTF-8 ({problem}): convert it first") from None
