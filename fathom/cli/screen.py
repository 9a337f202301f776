"""Where words go: answers to stdout; thinking, status and errors to stderr. Thinking is dimmed on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fathom.api import Completion, Delta, FinishReason

if TYPE_CHECKING:
    from fathom.checkpoint.reader import Progress

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

_EVERY = 0.5  # seconds between two lines of progress


@dataclass
class Screen:
    """Shows one answer after another as they stream in."""

    dims: bool = field(default_factory=lambda: sys.stderr.isatty())
    _thinks: bool = False
    _wrote: bool = False

    def show(self, delta: Delta) -> None:
        """The next piece."""
        if delta.thinking:
            self._note(("" if self._thinks else self._dim(_DIM)) + _visible(delta.thinking))
            self._thinks = True
        if delta.text:
            self.end_thinking()
            sys.stdout.write(_visible(delta.text))
            sys.stdout.flush()
            self._wrote = True

    def end_thinking(self) -> None:
        """Back to plain words, on a line of their own."""
        if self._thinks:
            self._note(self._dim(_PLAIN) + "\n")
        self._thinks = False

    def end(self) -> None:
        """The answer is over, or was stopped."""
        self.end_thinking()
        if self._wrote:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._wrote = False

    def status(self, line: str) -> None:
        """A line about the answer."""
        self._note(f"{self._dim(_DIM)}{line}{self._dim(_PLAIN)}\n")

    def _dim(self, code: str) -> str:
        return code if self.dims else ""

    def _note(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


@dataclass
class Clock:
    """Times one answer: `first` is the wait for its first visible piece, in seconds."""

    begin: float = field(default_factory=time.perf_counter)
    first: float | None = None

    def tick(self) -> None:
        """Something came."""
        if self.first is None:
            self.first = self.seconds()

    def seconds(self) -> float:
        """Since the request was made."""
        return time.perf_counter() - self.begin

    def rate(self, tokens: int) -> float:
        """Tokens a second after the first."""
        spent = self.seconds() - (self.first or 0.0)
        return (tokens - 1) / spent if tokens > 1 and spent > 0 else 0.0


def summary(done: Completion, clock: Clock, context: int) -> str:
    """The status line: tokens, speed, wait, use of the context, and the reason if an answer was cut."""
    usage = done.usage
    used = usage.prompt_tokens + usage.completion_tokens
    parts = [
        f"{usage.completion_tokens} tokens",
        f"{clock.rate(usage.completion_tokens):.0f} tok/s",
        f"first after {clock.first or clock.seconds():.2f} s",
        f"context {used:,} of {context:,}",
    ]
    if done.finish is FinishReason.LENGTH:
        parts.append("cut at its longest: --max-tokens or --max-context allows more")
    return " · ".join(parts)


def _visible(text: str) -> str:
    """A model must not steer the terminal."""
    return text.replace("\x1b", "␛")


@dataclass
class Loading:
    """Bytes read or written, on one line of stderr that is written over; nothing where nobody looks, nor before `after`
    seconds have passed.
    """

    after: float = 0.0
    shown: float = 0.0

    def __call__(self, progress: Progress) -> None:
        now, last = time.perf_counter(), progress.done >= progress.total
        if sys.stderr.isatty() and progress.seconds > self.after and (last or now - self.shown >= _EVERY):
            self.shown = now
            text = f"{progress.done / 1e9:.2f} of {progress.total / 1e9:.2f} GB, {progress.rate / 1e6:.0f} MB/s"
            print(f"\r{text}   ", end="\n" if last else "", file=sys.stderr, flush=True)


class _Spoken(logging.Handler):
    """Messages as they are, on what stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def tell_of_device(device: str) -> None:
    """What engine and kernels say while they get a GPU ready (which kernels, graphs captured, why not), on stderr."""
    for name in ("fathom.engine", "fathom.kernels") if device != "cpu" else ():
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [_Spoken()]
