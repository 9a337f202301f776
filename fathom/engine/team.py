"""Several processes hold one model together: the first leads, the others compute what it has them compute.

Requests, the order of things, sampling and the tiers of the cache are the leader's alone. It writes every order to each
follower's standard input before it carries it out itself; they meet in the sums of the model. The caches of all ranks
hold the same bytes (the one key-value head is whole on each), so the leader's pages and states are theirs.

A rank that fails within a step leaves the others at different places of it. Then the team is lost, and with it the
engine, which says so to everyone who waits.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import IO, Any

import torch
from torch import Tensor

from fathom.engine.cache import PagedCache
from fathom.engine.device_cache import DeviceCache
from fathom.engine.memory import Memory, furnish, room
from fathom.engine.runner import Runner, Work
from fathom.errors import ConfigError, FathomError
from fathom.model.transformer import Transformer
from fathom.parallel.tensor import Ranks, meeting_place

_PATIENCE = 30.0
"""Seconds that a process may take to end by itself once its team is lost; where torch sums, its GPU waits for ever."""
LONGEST = 540.0
"""Seconds of a step after which a rank counts as lost, though it lives. NCCL's own patience is 600."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one process of a team is to load: see `LLM.load`. port: of the leader's store, where the processes meet."""

    folder: Path
    device: str = "cpu"
    threads: int | None = None
    context: int | None = None
    memory: Memory = field(default_factory=Memory)
    rank: int = 0
    tp: int = 1
    port: int = 0

    def join(self, store: Any = None) -> Ranks:
        """Meet the others; the leader brings the store."""
        return Ranks(torch.device(self.device).type, self.rank, self.tp, store or meeting_place(self.tp, self.port))


class Team:
    """The leader's view of the others. Raises ConfigError where they cannot start, with their reason.

    lost: why they cannot go on together, or nothing. on_loss: hears it, on a thread of its own; by default it ends the
    process if that has not ended in half a minute.
    """

    def __init__(self, part: Part) -> None:
        store = meeting_place(part.tp)
        self.part, self.lost, self._closed = replace(part, port=store.port), "", threading.Event()
        self.on_loss: Callable[[str], None] = self.end_soon
        self._loss, self._losing = threading.Event(), threading.Lock()
        self._bound: dict[int, list[int]] = {}
        self._others: list[subprocess.Popen[bytes]] = []
        self._heard: list[Queue[Any]] = [Queue() for _ in range(part.tp - 1)]
        self._ears: list[threading.Thread] = []
        self._since: float | None = None
        self._joined: Ranks | None = None
        try:
            for rank in range(1, part.tp):
                self._others.append(_start(replace(self.part, rank=rank)))
                ear = threading.Thread(target=self._listen, args=(rank,), name=f"fathom-rank-{rank}", daemon=True)
                ear.start()
                self._ears.append(ear)
            self._answers()  # they are there
            self._joined = self.part.join(store)
            threading.Thread(target=self._watch, name="fathom-ranks", daemon=True).start()
        except BaseException:
            self.close()
            raise

    @property
    def ranks(self) -> Ranks:
        """The leader among them."""
        assert self._joined
        return self._joined

    def check(self) -> None:
        """Raises ConfigError where the team is lost already."""
        if self.lost:
            raise ConfigError(self.lost)

    def furnish(self, model: Transformer, memory: Memory, context: int) -> tuple[Shared, Runner]:
        """`memory.furnish` on every rank, with as many pages as the one with the least room has. Raises ConfigError."""
        pages = min(room(model, memory, context), *self._answers())
        self.tell(pages)
        try:
            with self.working():
                cache, runner = furnish(model, memory, context, pages, alone=False)
        except Exception as error:
            raise ConfigError(str(self._failed(error))) from error
        return Shared(self, cache), Led(self, runner)

    def tell(self, *order: Any) -> None:
        """Every other rank is to do this. Raises FathomError where the team is lost."""
        said = pickle.dumps(order)
        for rank, process in enumerate(self._others, 1):
            if self.lost:
                raise FathomError(self.lost)
            try:
                _write(process.stdin, said)
            except OSError as error:
                raise self.lose(f"rank {rank} has ended") from error

    @contextmanager
    def step(self) -> Iterator[None]:
        """What all ranks do together. A refusal comes from all of them alike; any other failure loses the team."""
        try:
            yield
        except FathomError:
            raise
        except Exception as error:
            raise self._failed(error) from error

    def lose(self, reason: str) -> FathomError:
        """The ranks are no longer at the same place. The first reason is kept and given back."""
        with self._losing:
            first = not self.lost
            self.lost = self.lost or f"{reason}: the model's {self.part.tp} processes cannot go on without each other"
        if first:
            self._loss.set()
            for process in self._others:
                process.kill()
            threading.Thread(target=self.on_loss, args=(self.lost,), daemon=True).start()
            if joined := self._joined:  # `close` forgets it
                with suppress(RuntimeError):  # of a group that cannot be aborted: on_loss ends the process
                    joined.give_up()
        return FathomError(self.lost)

    @contextmanager
    def working(self) -> Iterator[None]:
        """What is to end in LONGEST seconds, or the team is lost: a rank that hangs says nothing. One thread's."""
        before = self._since
        self._since = before or time.monotonic()
        try:
            yield
        finally:
            self._since = before

    def _watch(self) -> None:
        while not self._closed.wait(LONGEST / 100):
            since = self._since
            if since is not None and time.monotonic() - since > LONGEST:
                self.lose(f"a step has not ended for {LONGEST:.0f} seconds")

    def news(self, work: Work) -> tuple[Any, ...]:
        """A work as the others are told of it: pages only when they are others than before."""
        pages: list[int] | None = None
        if self._bound.get(work.slot) != work.pages:
            self._bound[work.slot] = pages = list(work.pages)
        return work.slot, pages, work.prompt, work.start, work.tokens, work.samples

    def close(self) -> None:
        """The others end. On a GPU the group is not left, which may wait for who has gone: it ends with the process."""
        self._closed.set()
        for process in self._others:
            with suppress(OSError):
                assert process.stdin
                process.stdin.close()
        for process in self._others:
            _ended(process)
        for ear in self._ears:
            ear.join(_PATIENCE)  # it may be giving the exchanges up
        if self._joined and self._joined.device.type == "cpu":
            self._joined.leave()
        self._joined = None

    def end_soon(self, reason: str) -> None:
        """End this process if it has not ended by itself in half a minute."""
        if not self._closed.wait(_PATIENCE):
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(2)

    def _failed(self, error: Exception) -> FathomError:
        self._loss.wait(1.0)  # for the reason, where it is another rank's
        return self.lose(f"rank 0 has failed ({(str(error) or type(error).__name__).splitlines()[0]})")

    def _answers(self) -> list[Any]:
        """One from every other rank. Raises ConfigError where one cannot give it."""
        found = [heard.get() for heard in self._heard]
        self.check()
        return found

    def _listen(self, rank: int) -> None:
        """Hear what a follower says until it ends, which is too early unless the team was closed."""
        process, why = self._others[rank - 1], ""
        assert process.stdout
        with suppress(EOFError, OSError, ValueError, pickle.UnpicklingError):
            while not why:
                kind, value = pickle.load(process.stdout)
                if kind == "failed":
                    why = f" ({value})"
                else:
                    self._heard[rank - 1].put(value)
        process.wait()
        try:
            if not self._closed.is_set():
                self.lose(f"rank {rank} has ended{why}")
        finally:
            for heard in self._heard:
                heard.put(None)  # whoever waits for an answer looks whether the team is lost


class Led(Runner):
    """A runner whose steps all ranks make."""

    def __init__(self, team: Team, runner: Runner) -> None:
        self._team, self._runner = team, runner

    def run(self, works: Sequence[Work]) -> Tensor:
        """See `Runner`."""
        self._team.tell("run", [self._team.news(work) for work in works])
        with self._team.step():
            return self._team.ranks.gathered(self._runner.run(works))


class Shared:
    """A cache (`prefix.Stored`) that is filled on all ranks and read on one."""

    def __init__(self, team: Team, cache: PagedCache | DeviceCache) -> None:
        self._team, self._cache = team, cache
        self.device, self.pages, self.form = cache.device, cache.pages, cache.form
        self.holds = cache.holds

    @property
    def page_bytes(self) -> int:
        """Bytes of a page on one rank."""
        return self._cache.page_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self._cache.block_bytes

    def blocks(self, pages: Sequence[int]) -> list[bytes]:
        """See `Stored`. Raises ConfigError where what the device had to wait for may have come from nobody."""
        return self._sound(self._cache.blocks(pages))

    def state(self, slot: int, at: int) -> bytes:
        """See `Stored`. Raises ConfigError likewise."""
        return self._sound(self._cache.state(slot, at))

    def _sound(self, read: Any) -> Any:
        self._team.check()
        return read

    def load_blocks(self, pages: Sequence[int], blocks: Sequence[bytes]) -> None:
        """Fill pages with what `blocks` gave."""
        self._team.tell("load_blocks", pages, blocks)
        with self._team.step():
            self._cache.load_blocks(pages, blocks)

    def load_state(self, slot: int, at: int, state: bytes) -> None:
        """Put what `state` gave into a slot."""
        self._team.tell("load_state", slot, at, state)
        with self._team.step():
            self._cache.load_state(slot, at, state)


def _start(part: Part) -> subprocess.Popen[bytes]:
    """A follower, which finds the modules that this process finds, and is told its part."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from fathom.engine.follow import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the leader's to answer
    )
    _write(process.stdin, pickle.dumps(part))
    return process


def _write(to: IO[bytes] | None, data: bytes) -> None:
    assert to
    to.write(data)
    to.flush()


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was asked to end; it has nothing to save."""
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
