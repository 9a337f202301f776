"""A world for the scheduler: sequences arrive, leave and are cancelled; memory holds what a model would have written.

Nothing here trusts the scheduler. A row of memory is the hash of all ids up to its token, so a page that is shared
wrongly, overwritten or never written shows itself at the next step that reads it. Every other promise is checked from
what a plan says and from counts kept here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from zlib import crc32

from fathom.api import FinishReason, GenerateRequest, SamplingParams
from fathom.engine.pages import PagePool
from fathom.engine.request import Sequence
from fathom.engine.scheduler import Piece, Plan, Scheduler

Rows = list[int]


def chain(namespace: str, ids: list[int]) -> Rows:
    """For every position the hash of the namespace and all ids up to it: what a model's row there depends on."""
    last, rows = crc32(namespace.encode()), []
    for i in ids:
        last = hash((last, i))
        rows.append(last)
    return rows


class Memory:
    """Rows of pages and states of slots."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.pages: dict[int, Rows] = {}
        self.states: dict[int, int] = {}

    def check(self, sequence: Sequence, rows: Rows) -> None:
        """All that was computed before `at` is there."""
        for n in range(-(-sequence.at // self.page)):
            want = rows[n * self.page : min((n + 1) * self.page, sequence.at)]
            assert self.pages[sequence.pages[n]][: len(want)] == want, f"rows of sequence {sequence.id} are not its own"
        if sequence.at:
            assert self.states[sequence.slot] == rows[sequence.at - 1], "the slot holds another sequence's state"

    def write(self, piece: Piece, rows: Rows) -> None:
        for at in range(piece.start, piece.end):
            page = self.pages.setdefault(piece.sequence.pages[at // self.page], [])
            del page[at % self.page :]
            assert len(page) == at % self.page, "a row was left out"
            page.append(rows[at])
        self.states[piece.sequence.slot] = rows[piece.end - 1]


@dataclass
class FoundPrefix:
    tokens: int
    pages: tuple[int | None, ...]
    common: int
    keys: Rows


class RandomPrefixes:
    """A prefix cache that knows what it was shown, forgets at random, and now and then fails to read."""

    def __init__(self, draw: random.Random, pool: PagePool, memory: Memory, failures: float) -> None:
        self.draw, self.pool, self.memory, self.failures = draw, pool, memory, failures
        self.device: dict[int, int] = {}
        self.host: dict[int, Rows] = {}
        self.states: set[int] = set()
        self.restored = self.failed = 0
        pool.reclaim = self.reclaim

    def match(self, namespace: str, ids: list[int]) -> FoundPrefix:
        size = self.memory.page
        keys = chain(namespace, list(ids))[size - 1 :: size]
        known = next((n for n, k in enumerate(keys) if k not in self.device and k not in self.host), len(keys))
        points = [n for n in range(1, known + 1) if keys[n - 1] in self.states and n * size < len(ids)]
        n = max(points, default=0)
        return FoundPrefix(n * size, tuple(self.device.get(k) for k in keys[:n]), known * size, keys)

    def restore(self, hit: FoundPrefix, pages: list[int], slot: int) -> bool:
        assert len(pages) == len(hit.pages) == hit.tokens // self.memory.page
        assert all(was in (None, page) for was, page in zip(hit.pages, pages, strict=True))
        if self.draw.random() < self.failures:
            self.failed += 1
            self.states.discard(hit.keys[len(pages) - 1])
            return False
        for key, was, page in zip(hit.keys, hit.pages, pages, strict=False):
            if was is None:
                if key not in self.host:
                    return False
                self.memory.pages[page] = list(self.host[key])
        self.memory.states[slot] = hit.keys[len(pages) - 1]
        self.restored += 1
        return True

    def save(self, sequence: Sequence, rows: Rows, position: int) -> None:
        size = self.memory.page
        for n in range(position // size):
            key, page = rows[(n + 1) * size - 1], sequence.pages[n]
            if key not in self.device:
                self.device[key] = page
                self.pool.share(page)
        self.states.add(rows[position - 1])

    def reclaim(self, n: int) -> bool:
        alone = [k for k, page in self.device.items() if self.pool.owners(page) == 1]
        if len(alone) < n:
            return False
        self.forget()
        for key in self.draw.sample(alone, n):
            page = self.device.pop(key)
            if self.draw.random() < 0.5:
                self.host[key] = self.memory.pages[page]
            self.memory.pages.pop(page)
            self.pool.release(page)
        return True

    def forget(self) -> None:
        """Something on the host is lost."""
        if self.host and self.draw.random() < 0.2:
            self.host.pop(self.draw.choice(list(self.host)))

    def drop(self) -> None:
        for page in self.device.values():
            self.pool.release(page)
        self.device.clear()


@dataclass
class Watch:
    """What the test knows of one sequence, from outside."""

    sequence: Sequence
    rows: Rows
    next: int | None = None
    cached: int | None = None
    skipped: int = 0
    ahead: int = 0
    overtaken: Counter[str] = field(default_factory=Counter)


class World:
    """Runs one workload to its end, checking every step."""

    def __init__(self, scheduler: Scheduler, memory: Memory, prefix: RandomPrefixes | None, slots: int) -> None:
        self.scheduler, self.memory, self.prefix, self.slots = scheduler, memory, prefix, slots
        self.watches: dict[Sequence, Watch] = {}
        self.fresh: dict[str, list[Sequence]] = {}
        self.parked: list[Sequence] = []
        self.steps = self.preempted = self.computed = 0
        scheduler._leaving = self.leaving

    @property
    def live(self) -> list[Sequence]:
        return [s for s in self.watches if s.finish is None]

    def submit(self, prompt: list[int], answer: int, namespace: str, keep: tuple[int, ...] = ()) -> Sequence:
        params = SamplingParams(max_tokens=answer)
        request = GenerateRequest(prompt_ids=prompt, params=params, namespace=namespace, keep=keep)
        sequence = Sequence.open(request, self.scheduler.capacity)
        line = self.fresh.setdefault(namespace, [])
        self.watches[sequence] = Watch(sequence, chain(namespace, prompt), ahead=len(line))
        line.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        assert self.scheduler.cancel(sequence)
        assert not self.scheduler.cancel(sequence)
        assert sequence.finish == FinishReason.CANCELLED
        self.gone(sequence)

    def gone(self, sequence: Sequence) -> None:
        assert sequence.slot is None and not sequence.pages
        line = self.fresh.get(sequence.namespace, [])
        if sequence in line:
            for later in line[line.index(sequence) + 1 :]:
                self.watches[later].ahead -= 1
            line.remove(sequence)
        if sequence in self.parked:
            self.parked.remove(sequence)

    def leaving(self, sequence: Sequence) -> None:
        """Its memory is still whole; perhaps something of it is kept."""
        rows = self.watches[sequence].rows
        self.memory.check(sequence, rows)
        size = self.memory.page
        if self.prefix and sequence.at >= size and self.prefix.draw.random() < 0.5:
            self.prefix.save(sequence, rows, sequence.at // size * size)

    def step(self, stop: float = 0.0, draw: random.Random | None = None) -> Plan:
        before = self.scheduler.running
        plan = self.scheduler.plan()
        self.steps += 1
        self.check_admission(plan)
        self.check_preemption(plan, before)
        self.check_memory()
        self.check_pieces(plan)
        self.check_shares(plan)
        self.compute(plan)
        self.scheduler.advance(plan)
        self.keep(plan)
        self.sample(plan, stop, draw)
        self.check_memory()
        return plan

    def compute(self, plan: Plan) -> None:
        for piece in plan.pieces:
            watch = self.watches[piece.sequence]
            assert piece.start == watch.next == piece.sequence.at, "tokens are computed in order, once a life"
            self.memory.check(piece.sequence, watch.rows)
            self.memory.write(piece, watch.rows)
            watch.next = piece.end
            self.computed += piece.count

    def keep(self, plan: Plan) -> None:
        for piece in plan.pieces if self.prefix else ():
            if piece.sequence.resumable(piece.end):
                self.prefix.save(piece.sequence, self.watches[piece.sequence].rows, piece.end)

    def sample(self, plan: Plan, stop: float, draw: random.Random | None) -> None:
        for piece in plan.pieces:
            sequence = piece.sequence
            assert sequence.at == piece.end
            assert piece.samples == (piece.end == len(sequence.ids))
            if not piece.samples:
                continue
            token = draw.randrange(50) if draw else 1
            rows = self.watches[sequence].rows
            rows.append(hash((rows[-1], token)))
            full = sequence.append(token)
            if full or (draw and draw.random() < stop):
                self.scheduler.finish(sequence, FinishReason.LENGTH if full else FinishReason.STOP)
                self.gone(sequence)

    def check_memory(self) -> None:
        """Owners are exact; what a sequence will write is its own; slots are its own."""
        owners = Counter(page for s in self.scheduler.running for page in s.pages)
        owners.update(self.prefix.device.values() if self.prefix else ())
        pool = self.scheduler.pool
        assert [pool.owners(p) for p in range(pool.count)] == [owners[p] for p in range(pool.count)]
        assert pool.free == sum(not owners[p] for p in range(pool.count))
        for s in self.scheduler.running:
            assert len(set(s.pages)) == len(s.pages)
            assert all(pool.owners(p) == 1 for p in s.pages[-(-s.at // self.memory.page) :])
            if s.at % self.memory.page:
                assert pool.owners(s.pages[s.at // self.memory.page]) == 1, "the page that is being filled is shared"
        slots = [s.slot for s in self.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert all(slot in range(self.slots) for slot in slots)
        assert self.scheduler.waiting + len(slots) == len(self.live)
        assert self.scheduler.waiting == len(self.parked) + sum(map(len, self.fresh.values()))

    def check_pieces(self, plan: Plan) -> None:
        """Every answer goes on by one token, in front; prompts within the budget, in allowed pieces."""
        running, size = self.scheduler.running, self.memory.page
        answering = [s for s in running if s.at >= s.prompt and len(s.ids) == s.at + 1]
        decode, prefill = plan.pieces[: len(answering)], plan.pieces[len(answering) :]
        assert [p.sequence for p in decode] == answering
        assert all(p.count == 1 for p in decode)
        assert len({p.sequence for p in plan.pieces}) == len(plan.pieces)
        assert sum(p.count for p in prefill) <= self.scheduler.token_budget
        assert all(p.sequence in running and p.count > 0 for p in plan.pieces)
        assert all(p.end % size == 0 or p.end == len(p.sequence.ids) for p in prefill)
        assert not any(p.sequence.resumable(at) for p in prefill for at in range(p.start + 1, p.end))
        assert all(p.end <= len(p.sequence.pages) * size for p in plan.pieces)
        assert plan.pieces or not running, "something runs, but nothing goes on"

    def check_shares(self, plan: Plan) -> None:
        """Prefill: a namespace's oldest and its shortest, nothing of the budget wasted, neither skipped for long."""
        size = self.memory.page
        ends = {p.sequence: p.end for p in plan.pieces}
        left = self.scheduler.token_budget
        lines: dict[str, list[Sequence]] = {}
        stuck: dict[str, list[Sequence]] = {}
        for s in self.scheduler.running:
            if s.at >= s.prompt and len(s.ids) == s.at + 1:
                continue
            lines.setdefault(s.namespace, []).append(s)
            end = ends.get(s, s.at)
            left -= end - s.at
            if not (end == len(s.ids) or (end > s.at and s.resumable(end))):
                stuck.setdefault(s.namespace, []).append(s)
        assert left < size or not stuck, "budget was left, and someone could have used it"
        for line in stuck.values():
            rest = [len(s.ids) - ends.get(s, s.at) for s in line]
            for s, own in list(zip(line, rest, strict=True))[1:]:
                assert s not in ends or own == min(rest[1:]), "overtook an older one and a shorter one"
        for line in lines.values():
            self.check_waits(line, ends)

    def check_waits(self, line: list[Sequence], ends: dict[Sequence, int]) -> None:
        """The oldest of a namespace, and the one with the least left of the others: each has every other turn."""
        due = line[0], min(line[1:], key=lambda s: len(s.ids) - s.at, default=line[0])
        for s in line:
            watch = self.watches[s]
            watch.skipped = watch.skipped + 1 if s in due and s not in ends else 0
            # Each step begins with whose turn it is, so a namespace moves up by one at least. Each has a turn in two,
            # or in three, where somebody has become the oldest just before the turn that is not the oldest's.
            assert watch.skipped < 3 * len(self.fresh), "a prompt starved"

    def check_admission(self, plan: Plan) -> None:
        """Pre-empted ones first; then in order of arrival within a namespace, and namespaces in turn."""
        for s in plan.admitted:
            assert s.slot is not None and s in self.scheduler.running
            self.watches[s].next = s.at
            assert s.at % self.memory.page == 0 and s.at < len(s.ids)
            if self.watches[s].cached is None:
                self.watches[s].cached = s.at
            assert s.cached == self.watches[s].cached, "what the first life found, and no later one"
            if s in self.parked:
                assert s is min(self.parked, key=lambda p: p.id)
                self.parked.remove(s)
                continue
            assert not self.parked, "a new sequence overtook one that was pre-empted"
            self.check_turn(s)
        assert self.scheduler.running or not self.live, "the pool is free, and nobody was admitted"

    def check_turn(self, sequence: Sequence) -> None:
        line = self.fresh[sequence.namespace]
        assert line.pop(0) is sequence, "not first come, first served"
        for other in self.waiting():
            watch = self.watches[other]
            if other.namespace == sequence.namespace:
                watch.ahead -= 1
            watch.overtaken[sequence.namespace] += 1
        # Of n in its own line before it, it waits n + 1 turns; in each every other namespace has one at most.
        mine = self.watches[sequence].overtaken
        turns = mine[sequence.namespace] + 1
        assert all(n <= turns for name, n in mine.items() if name != sequence.namespace), "a namespace starved"

    def waiting(self) -> Iterator[Sequence]:
        for line in self.fresh.values():
            yield from line

    def check_preemption(self, plan: Plan, before: tuple[Sequence, ...]) -> None:
        """Only the youngest, never the oldest, and nobody takes their place in the same step."""
        for s in plan.preempted:
            assert s.slot is None and not s.pages and s.finish is None
            assert s.at == 0, "it begins again"
            assert len(s.ids) == len(self.watches[s].rows), "its ids are kept"
            assert all(s.id > other.id for other in self.scheduler.running), "an older one was pre-empted"
            assert s is not before[0], "the oldest was pre-empted"
            self.watches[s].next = None
            self.parked.append(s)
            self.preempted += 1
        assert not (plan.preempted and plan.admitted)

    def finish(self) -> None:
        """All has ended: every page is free, in one run; every slot too."""
        assert not self.live and not self.scheduler.running and not self.scheduler.waiting
        if self.prefix:
            self.prefix.drop()
        pool = self.scheduler.pool
        assert list(pool.runs()) == [(0, pool.count)] and pool.free == pool.count
        assert not self.scheduler.plan().pieces
