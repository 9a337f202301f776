"""What the next step computes, and who waits: continuous batching over pages and slots, without a tensor.

A step is one token of every sequence that answers, and prompts in pieces that end at absolute multiples of 128, at most
`token_budget` tokens of them: the gap between two tokens of an answer is bounded whatever else arrives.

Fairness: first come, first served within a namespace; namespaces take turns, for admission and for every 128 tokens of
prefill. Who is next and does not fit is waited for: a long prompt is never overtaken for ever by short ones.

Memory: a sequence is admitted with the pages of all its ids, and takes further pages as its answer grows. When there is
none, the youngest gives all of its own back and waits in front of the queue with its ids. The oldest always goes on, so
everyone ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from fathom.api import FinishReason
from fathom.engine.pages import PagePool
from fathom.engine.request import PAGE, Sequence, pages_for
from fathom.errors import ConfigError, ContextError


class Hit(Protocol):
    """What a prefix cache knows of a sequence's beginning.

    tokens: the resume point, a multiple of 128 below the number of ids, or 0; pages: of the tokens / 128 blocks before
    it, the page that holds each on the device, None where it must be loaded; common: tokens in whole blocks that the
    cache has, with or without a resume point at their end: at least `tokens`.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def pages(self) -> Items[int | None]: ...

    @property
    def common(self) -> int: ...


class Prefixes(Protocol):
    """Where beginnings are kept that other requests computed."""

    def match(self, namespace: str, ids: Items[int]) -> Hit:
        """The furthest resume point below the last id. Changes nothing."""

    def restore(self, hit: Hit, pages: Items[int], slot: int) -> bool:
        """Put the state into `slot` and the blocks that no page held into their `pages`.

        False if something could not be read; it is not offered again.
        """


@dataclass(frozen=True, slots=True)
class Piece:
    """The next `count` tokens of a sequence, from position `start`; `samples`: its last row gives a new token."""

    sequence: Sequence
    start: int
    count: int
    samples: bool

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: pieces of answers first, then of prompts, one a sequence; and who was admitted or pre-empted for it."""

    pieces: tuple[Piece, ...]
    admitted: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()


class Scheduler:
    """Decides for one thread: add, cancel and finish between steps; a step is `plan`, the model, `advance`.

    slots: sequences that run at once; token_budget: most prefill tokens of a step, at least 128; leaving: told of a
    sequence that is about to lose its pages and slot (`finish` is None when pre-empted), while both are still its own.
    """

    def __init__(
        self,
        pool: PagePool,
        slots: int,
        token_budget: int = 512,
        prefix: Prefixes | None = None,
        leaving: Callable[[Sequence], None] | None = None,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"{slots} sequences at once are too few: it must be at least 1")
        if token_budget < PAGE:
            raise ConfigError(
                f"a budget of {token_budget} prefill tokens a step is too small: it must be at least {PAGE}"
            )
        self.pool, self.token_budget = pool, token_budget

    @property
    def capacity(self) -> int:
        """The most tokens of a prompt and its answer that the pool holds for one sequence alone."""

    @property
    def waiting(self) -> int:
        """Sequences that hold nothing yet, or nothing any more."""

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with a slot, in order of arrival."""

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises ContextError if it would not fit though it were alone."""

    def cancel(self, sequence: Sequence) -> bool:
        """End it now, wherever it is; False if it has ended already."""

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """It ends: pages and slot are free for the next plan."""

    def plan(self) -> Plan:
        """The next step. Empty when nothing runs, or when what waits needs memory that someone else still holds."""

    def advance(self, plan: Plan) -> None:
        """The plan's pieces are computed. Those that sample must then get their token, or finish, before the next."""
