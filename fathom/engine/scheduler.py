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

from bisect import insort
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

from fathom.api import FinishReason
from fathom.engine.pages import PagePool
from fathom.engine.request import PAGE, Sequence, pages_for
from fathom.engine.turns import Dealer, Queue, arrival
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

    def restore(self, hit: Any, pages: Items[int], slot: int) -> bool:
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


@dataclass(frozen=True, slots=True)
class _Nothing:
    """The hit of a cache that knows nothing."""

    tokens: int = 0
    pages: tuple[int | None, ...] = ()
    common: int = 0


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
            raise ConfigError(f"{token_budget} prefill tokens a step are too few: it must be at least {PAGE}")
        self.pool, self.token_budget = pool, token_budget
        self._prefix, self._leaving = prefix, leaving
        self._slots = list(reversed(range(slots)))
        self._queue, self._dealer = Queue(), Dealer()
        self._running: list[Sequence] = []
        self._blocked: Sequence | None = None
        self._count = 0

    @property
    def capacity(self) -> int:
        """The most ids that the pool allows one sequence: all pages full, and the last token, which is not computed."""
        return self.pool.count * PAGE + 1

    @property
    def waiting(self) -> int:
        """Sequences that hold nothing yet, or nothing any more."""
        return len(self._queue)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with a slot, in order of arrival."""
        return tuple(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises ContextError if it would not fit though it were alone."""
        if sequence.end > self.capacity:
            limit = f"prompt and answer may take {sequence.end} tokens, but the cache holds {self.capacity}"
            raise ContextError(f"{limit}: shorten the prompt, lower max_tokens, or give the cache more memory")
        assert sequence.end > sequence.prompt, "a sequence without room for an answer"
        sequence.id, self._count = self._count, self._count + 1
        self._queue.add(sequence)

    def cancel(self, sequence: Sequence) -> bool:
        """End it now, wherever it is; False if it has ended already."""
        if sequence.finish:
            return False
        self.finish(sequence, FinishReason.CANCELLED)
        return True

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """It ends: pages and slot are free for the next plan."""
        assert sequence.finish is None, f"sequence {sequence.id} has ended already: {sequence.finish}"
        sequence.finish = reason
        if sequence.slot is None:
            self._queue.remove(sequence)
        else:
            self._leave(sequence)

    def plan(self) -> Plan:
        """The next step. Empty when nothing runs, or when what waits needs memory that someone else still holds."""
        assert all(s.at < len(s.ids) for s in self._running), "a sequence that sampled got no token"
        preempted = tuple(self._grow())
        # Whoever just gave its pages back would take them at once.
        admitted = () if preempted else tuple(self._admit())
        decode = [Piece(s, s.at, 1, True) for s in self._running if s.decoding]
        ends = self._dealer.deal([s for s in self._running if not s.decoding], self.token_budget)
        reading = [(s, ends[s]) for s in self._running if s in ends]
        prefill = [Piece(s, s.at, end - s.at, end == len(s.ids)) for s, end in reading]
        return Plan((*decode, *prefill), admitted, preempted)

    def advance(self, plan: Plan) -> None:
        """The plan's pieces are computed. Those that sample must then get their token, or finish, before the next."""
        for piece in plan.pieces:
            if piece.sequence.finish is None:
                piece.sequence.at = piece.end

    def _grow(self) -> Iterator[Sequence]:
        """A page for every answer whose last one is full, oldest first; yields those that were pre-empted for it."""
        for sequence in self.running:
            while sequence.slot is not None and sequence.decoding and sequence.at == len(sequence.pages) * PAGE:
                if page := self.pool.allocate(1, after=sequence.pages[-1]):
                    sequence.pages += page
                else:
                    yield self._preempt()

    def _preempt(self) -> Sequence:
        """The youngest gives everything back but its ids."""
        youngest = self._running[-1]
        self._leave(youngest)
        youngest.at = 0
        self._queue.park(youngest)
        return youngest

    def _leave(self, sequence: Sequence) -> None:
        if self._leaving:
            self._leaving(sequence)
        assert sequence.slot is not None
        self._running.remove(sequence)
        self._slots.append(sequence.slot)
        self._free(sequence.pages)
        sequence.slot, sequence.pages, self._blocked = None, [], None

    def _admit(self) -> Iterator[Sequence]:
        """Those whose turn it is, as long as they fit. Until someone leaves, who did not fit is not tried again."""
        while self._slots and (head := self._queue.head()):
            if self._running and head is self._blocked:
                return
            if not self._start(head):
                self._blocked = head
                return
            self._queue.pop()
            insort(self._running, head, key=arrival)
            yield head

    def _start(self, sequence: Sequence) -> bool:
        """Pages, a slot and what the cache knows; False, and nothing changed, if the pages are not there."""
        hit = self._match(sequence)
        while (pages := self._pages(sequence, hit)) is not None:
            if not hit.tokens or self._restore(hit, pages):
                self._begin(sequence, hit, pages)
                return True
            self._free(pages)
            failed, hit = hit, self._match(sequence)
            if hit.tokens >= failed.tokens:
                hit = _Nothing()
        return False

    def _begin(self, sequence: Sequence, hit: Hit, pages: list[int]) -> None:
        sequence.slot, sequence.pages, sequence.at = self._slots.pop(), pages, hit.tokens
        if not sequence.lives:
            sequence.cached = hit.tokens
        sequence.lives += 1
        if hit.common > hit.tokens:
            sequence.keep.add(hit.common)

    def _match(self, sequence: Sequence) -> Hit:
        hit = self._prefix.match(sequence.namespace, sequence.ids) if self._prefix else _Nothing()
        assert hit.tokens < len(sequence.ids) and hit.tokens == len(hit.pages) * PAGE, "a hit that cannot be resumed"
        return hit

    def _restore(self, hit: Hit, pages: list[int]) -> bool:
        assert self._prefix
        return self._prefix.restore(hit, pages[: len(hit.pages)], self._slots[-1])

    def _pages(self, sequence: Sequence, hit: Hit) -> list[int] | None:
        """The pages of a hit, shared where they are on the device, and of the ids after it; None if they are too many.

        As many as there are sequences running stay free, so that each of them can grow before someone must go.
        """
        shared = [page for page in hit.pages if page is not None]
        for page in shared:
            self.pool.share(page)
        need = pages_for(len(sequence.ids)) - len(shared)
        fits = self.pool.ensure(need + len(self._running))
        fresh = self.pool.allocate(need, after=shared[-1] if shared else None) if fits else None
        if fresh is None:
            self._free(shared)
            return None
        rest = iter(fresh)
        return [next(rest) if page is None else page for page in hit.pages] + list(rest)

    def _free(self, pages: Items[int]) -> None:
        for page in pages:
            self.pool.release(page)
