"""One request on its way through the engine: ids, how far they are computed, what memory it holds. No tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fathom.api import Event, FinishReason, GenerateRequest, Usage

PAGE = 128
"""Tokens of a page, and the distance of prefill borders and resume points: `model.batch.TILE`, known without torch."""

RESUME_EVERY = 4096
"""A resume point is kept at every multiple of this many tokens, so that losing the last ones costs a bounded repeat."""


def pages_for(tokens: int) -> int:
    """How many pages hold the rows of this many tokens."""
    return -(-tokens // PAGE)


def _silent(event: Event) -> None:
    """Where events go that nobody waits for."""


@dataclass(eq=False)
class Sequence:
    """Prompt and answer so far, of which the first `at` tokens are computed. Never longer than `end` ids.

    slot, pages: its memory, None and empty while it waits; cached: prompt tokens that were not computed; keep:
    multiples of 128 at which a resume point is wanted; lives: how often it was admitted; id: its place in the order of
    arrival, given by the scheduler.
    """

    request: GenerateRequest
    ids: list[int]
    prompt: int
    end: int
    keep: set[int] = field(default_factory=set)
    sink: Callable[[Event], None] = _silent
    id: int = -1
    at: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    lives: int = 0
    finish: FinishReason | None = None

    @staticmethod
    def open(request: GenerateRequest, context: int, sink: Callable[[Event], None] = _silent) -> Sequence:
        """A sequence that ends when its `max_tokens` are sampled or `context` tokens are reached."""
        ids = list(request.prompt_ids)
        end = min(context, len(ids) + (request.params.max_tokens or context))
        # A repeat of the same prompt must compute its last token again, so it resumes below it.
        wanted = (len(ids), len(ids) - 1, *(min(p, len(ids)) for p in request.keep))
        keep = {p - p % PAGE for p in wanted} - {0}
        return Sequence(request, ids, len(ids), end, keep, sink)

    @property
    def namespace(self) -> str:
        """Whose request it is, for sharing prefixes and for fair turns."""
        return self.request.namespace

    @property
    def decoding(self) -> bool:
        """Whether the next step is one token of the answer; else a piece of the prompt, or of ids computed again."""
        return self.at >= self.prompt and len(self.ids) - self.at == 1

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        return Usage(self.prompt, len(self.ids) - self.prompt, self.cached)

    def resumable(self, position: int) -> bool:
        """Whether a resume point is wanted at this position."""
        return position in self.keep or (position > 0 and position % RESUME_EVERY == 0)

    def append(self, token: int) -> bool:
        """A sampled token joins the ids; True when there is no room for another."""
        self.ids.append(token)
        return len(self.ids) >= self.end
