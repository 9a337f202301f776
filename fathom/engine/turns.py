"""Fairness: who is admitted next, and whose prompt gets the next tile."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable

from fathom.engine.request import PAGE, Sequence


def arrival(sequence: Sequence) -> int:
    """The order in which sequences came."""
    return sequence.id


class Queue:
    """Who waits: pre-empted ones first, the oldest in front; then the namespaces in turn, each in order of arrival."""

    def __init__(self) -> None:
        self._parked: list[Sequence] = []
        self._lines: dict[str, deque[Sequence]] = {}

    def __len__(self) -> int:
        return len(self._parked) + sum(map(len, self._lines.values()))

    def add(self, sequence: Sequence) -> None:
        """At the end of its namespace's line; a new namespace has its turn after all others."""
        self._lines.setdefault(sequence.namespace, deque()).append(sequence)

    def park(self, sequence: Sequence) -> None:
        """Before everyone who has not run yet."""
        insort(self._parked, sequence, key=arrival)

    def head(self) -> Sequence | None:
        """Who is next."""
        line = next(iter(self._lines.values()), None)
        return self._parked[0] if self._parked else line[0] if line else None

    def pop(self) -> None:
        """The head leaves; if it was its namespace's turn, the next namespace has it."""
        if self._parked:
            del self._parked[0]
            return
        namespace = next(iter(self._lines))
        line = self._lines.pop(namespace)
        line.popleft()
        if line:
            self._lines[namespace] = line

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer, wherever it stands."""
        if sequence in self._parked:
            self._parked.remove(sequence)
            return
        line = self._lines[sequence.namespace]
        line.remove(sequence)
        if not line:
            del self._lines[sequence.namespace]


class Dealer:
    """Deals a step's prefill tokens, tile by tile, to namespaces in turn.

    In each every other tile is for the oldest, so that nobody is overtaken for ever, and those between for whoever else
    has the least left: a question of a line does not wait until a book has been read.
    """

    def __init__(self) -> None:
        self._turns: list[str] = []
        self._quick: set[str] = set()
        """Namespaces whose next tile is not for the oldest."""

    def deal(self, sequences: Iterable[Sequence], budget: int) -> dict[Sequence, int]:
        """How far each that gets something is computed: to a multiple of 128, or to its last id.

        sequences: in order of arrival. A resume point that is wanted ends a sequence's share. A tile that does not fit
        into what is left keeps its namespace's turn for the next step; a shorter end of another prompt may still fit.
        """
        lines = self._lines(sequences)
        oldest = {line[0] for line in lines.values()}
        ends: dict[Sequence, int] = {}
        while (namespace := next((n for n in self._turns if lines.get(n)), None)) is not None:
            others = [s for s in lines[namespace] if s not in oldest] if namespace in self._quick else []
            sequence = min(others, key=lambda s: len(s.ids) - ends.get(s, s.at), default=lines[namespace][0])
            start = ends.get(sequence, sequence.at)
            end = min(start - start % PAGE + PAGE, len(sequence.ids))
            if end - start > budget:
                del lines[namespace]
                continue
            ends[sequence], budget = end, budget - (end - start)
            if end == len(sequence.ids) or sequence.resumable(end):
                lines[namespace].remove(sequence)
            self._quick ^= {namespace}
            self._turns.remove(namespace)
            self._turns.append(namespace)
        return ends

    def _lines(self, sequences: Iterable[Sequence]) -> dict[str, list[Sequence]]:
        """The sequences of each namespace; a namespace that had none before has its turn after all others."""
        lines: dict[str, list[Sequence]] = {}
        for sequence in sequences:
            lines.setdefault(sequence.namespace, []).append(sequence)
        self._quick &= lines.keys()
        self._turns = [n for n in self._turns if n in lines] + [n for n in lines if n not in self._turns]
        return lines
