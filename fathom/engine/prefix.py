"""Beginnings that were computed before: blocks of 128 tokens and resume points, in three tiers, across restarts.

A block's key is a hash of the model, the namespace and all ids up to its end; so equal keys mean equal rows, whoever
computed them. A resume point is a state at a multiple of 128 with all blocks before it.

    device  pages of the cache, shared with the sequences that use them (which pins them); blocks only
    host    stored form, in memory: blocks that had to leave the device, and states
    disk    stored form, in files: everything, written soon after it was saved, so that a kill loses moments at most

Every tier gives up what was used least recently; what leaves one tier goes to the next, unless it is there already.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Protocol

from fathom.engine.disk import Disk
from fathom.engine.pages import PagePool
from fathom.engine.request import PAGE

_KEY = 20
_AT_ONCE = 256
"""Blocks that are copied from or to the device at a time: what bounds the memory that this takes there."""
_IDS = struct.Struct(f"<{PAGE}I")


def block_keys(seed: bytes, ids: Sequence[int]) -> Iterator[bytes]:
    """The key of each whole block of `ids`, each a hash of the one before and of its own ids."""
    key = seed
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        key = blake2b(key + _IDS.pack(*ids[start : start + PAGE]), digest_size=_KEY).digest()
        yield key


def state_key(key: bytes) -> bytes:
    """The key of the state at the end of a block."""
    return blake2b(key, digest_size=_KEY, person=b"state").digest()


class Host:
    """Blocks and states in memory, at most `limit` bytes of them.

    Blocks give way to states until those take half: blocks on the device are worth nothing without a state after them.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.blocks, self.states = _Entries(), _Entries()

    @property
    def used(self) -> int:
        """Bytes."""
        return self.blocks.used + self.states.used

    def __contains__(self, key: bytes) -> bool:
        return key in self.blocks or key in self.states

    def get(self, key: bytes) -> bytes | None:
        """An entry of either kind."""
        return self.blocks[key] if key in self.blocks else self.states.get(key)

    def put(self, key: bytes, data: bytes, state: bool = False) -> list[tuple[bytes, bytes]]:
        """Keep an entry; returns what had to leave for it, which may be the entry itself."""
        if key in self:
            return []
        if len(data) > self.limit:
            return [(key, data)]
        (self.states if state else self.blocks)[key] = data
        gone = []
        while self.used > self.limit:
            whose = self.blocks if self.blocks and self.states.used <= self.limit // 2 else self.states
            gone.append(whose.popitem(last=False))
        return gone


class _Entries(OrderedDict[bytes, bytes]):
    """Least recently used first. used: bytes."""

    used = 0

    def __setitem__(self, key: bytes, data: bytes) -> None:
        self.used += len(data)
        super().__setitem__(key, data)

    def popitem(self, last: bool = True) -> tuple[bytes, bytes]:
        key, data = super().popitem(last)
        self.used -= len(data)
        return key, data


class Stored(Protocol):
    """A cache whose pages and slots have a stored form: `PagedCache`, `DeviceCache`."""

    @property
    def page_bytes(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def blocks(self, pages: Sequence[int]) -> list[bytes]: ...

    def load_blocks(self, pages: Sequence[int], blocks: Sequence[bytes]) -> None: ...

    def holds(self, slot: int, at: int) -> bool: ...

    def state(self, slot: int, at: int) -> bytes: ...

    def load_state(self, slot: int, at: int, state: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """What is known of a sequence's beginning: see `scheduler.Hit`. keys: of the blocks before the resume point."""

    tokens: int
    pages: tuple[int | None, ...]
    common: int
    keys: tuple[bytes, ...]


class PrefixCache:
    """The tiers above `pool` and `cache`. For the engine's thread; `tiers`, `restored` and `notes` from any.

    fingerprint: of the model, `engine.fingerprint`. host: its bytes at most. disk: None for none. restored: tokens that
    each tier has given back.
    """

    def __init__(
        self, pool: PagePool, cache: Stored, fingerprint: bytes, host: int = 256 << 20, disk: Disk | None = None
    ) -> None:
        self.pool, self.cache, self.host, self.disk = pool, cache, Host(host), disk
        self._fingerprint = fingerprint
        self._device: OrderedDict[bytes, int] = OrderedDict()
        self.restored = {"device": 0, "host": 0} | ({"disk": 0} if disk else {})
        pool.reclaim = self.reclaim

    @property
    def tiers(self) -> Mapping[str, tuple[int, int]]:
        """Name -> (bytes used, bytes at most)."""
        page = self.cache.page_bytes
        tiers = {
            "device": (len(self._device) * page, self.pool.count * page),
            "host": (self.host.used, self.host.limit),
        }
        return tiers | ({"disk": (self.disk.used, self.disk.limit)} if self.disk else {})

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return self.disk.notes if self.disk else ()

    def match(self, namespace: str, ids: Sequence[int]) -> Hit:
        """The furthest resume point below the last id, and how much is known at all. Only the order of use changes."""
        keys: list[bytes] = []
        for key in block_keys(self._seed(namespace), ids):
            if not self._has(key):
                break
            keys.append(key)
        most = min(len(keys), (len(ids) - 1) // PAGE)
        n = next((n for n in range(most, 0, -1) if self._has(state_key(keys[n - 1]))), 0)
        self._touch(keys[:n])
        pages = tuple(self._device.get(key) for key in keys[:n])
        return Hit(n * PAGE, pages, len(keys) * PAGE, tuple(keys[:n]))

    def restore(self, hit: Hit, pages: Sequence[int], slot: int) -> bool:
        """Fill `slot`, and those of `pages` that the hit had none for. False if something could not be read."""
        missing = [(key, page) for key, page, was in zip(hit.keys, pages, hit.pages, strict=True) if was is None]
        lower = ["host" if key in self.host else "disk" for key, _ in missing]
        state = self._load(end := state_key(hit.keys[-1]))
        blocks = [block for key, _ in missing if (block := self._load(key)) is not None]
        if state is None or len(blocks) < len(missing):
            return False
        self._keep(end, state, state=True)
        for some in _slices(len(missing)):
            self.cache.load_blocks([page for _, page in missing[some]], blocks[some])
        self.cache.load_state(slot, hit.tokens, state)
        for key, page in missing:
            self._adopt(key, page)
        self._touch(hit.keys)
        for tier in (*lower, *["device"] * (len(hit.keys) - len(missing))):
            self.restored[tier] += PAGE
        return True

    def save(self, namespace: str, ids: Sequence[int], at: int, pages: Sequence[int], slot: int) -> None:
        """Keep a resume point at `at`, a multiple of 128 that the sequence with these ids, pages and slot has reached.

        To be called soon after it was reached: once the slot's window has gone on too far, nothing is kept.
        """
        if at <= 0 or at % PAGE or not self.cache.holds(slot, at):
            return
        keys = list(block_keys(self._seed(namespace), ids[:at]))
        for key, page in zip(keys, pages, strict=False):
            self._adopt(key, page)
        self._write_blocks(keys)
        if not self._has(key := state_key(keys[-1])):
            state = self.cache.state(slot, at)
            self._keep(key, state, state=True)
            if self.disk:
                self.disk.put(key, state)
        self._touch(keys)

    def reclaim(self, n: int) -> bool:
        """Free the n pages that nobody uses and that were used least recently; all or none of them."""
        alone = (key for key, page in self._device.items() if self.pool.owners(page) == 1)
        if len(victims := list(islice(alone, n))) < n:
            return False
        self._demote(victims)
        return True

    def flush(self) -> None:
        """Wait until everything that was saved is on disk."""
        if self.disk:
            self.disk.flush()

    def close(self) -> None:
        """Write what is worth it, give all pages back, and stop."""
        for key in list(self._device):
            self.pool.release(self._device.pop(key))
        if self.disk:
            self.disk.close()

    def _seed(self, namespace: str) -> bytes:
        return blake2b(self._fingerprint + namespace.encode("utf-8", "surrogatepass"), digest_size=_KEY).digest()

    def _has(self, key: bytes) -> bool:
        return key in self._device or key in self.host or (self.disk is not None and self.disk.has(key))

    def _load(self, key: bytes) -> bytes | None:
        data = self.host.get(key)
        return self.disk.get(key) if data is None and self.disk else data

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Last used is the first block: without it the others are worth nothing."""
        order = [state_key(keys[-1]), *reversed(keys)] if keys else []
        for entries in (self._device, self.host.blocks, self.host.states):
            for key in order:
                if key in entries:
                    entries.move_to_end(key)
        if self.disk:
            self.disk.touch(order)

    def _adopt(self, key: bytes, page: int) -> None:
        if key not in self._device:
            self._device[key] = page
            self.pool.share(page)

    def _write_blocks(self, keys: Sequence[bytes]) -> None:
        """Write what is not on disk yet; all these blocks are on the device."""
        new = [key for key in keys if self.disk and not self.disk.has(key)]
        for key, block in self._stored(new):
            if self.disk:
                self.disk.put(key, block)

    def _demote(self, keys: Sequence[bytes]) -> None:
        """Blocks leave the device. Those that would not stay in memory are read only if they are nowhere else."""
        new = [key for key in keys if key not in self.host]
        first = len(new) - self.host.limit // max(self.cache.block_bytes, 1)
        needed = [key for i, key in enumerate(new) if i >= first or (self.disk and not self.disk.has(key))]
        for key, block in self._stored(needed):
            self._keep(key, block)
        for key in keys:
            self.pool.release(self._device.pop(key))

    def _stored(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """The stored form of blocks that are on the device."""
        for some in _slices(len(keys)):
            yield from zip(keys[some], self.cache.blocks([self._device[key] for key in keys[some]]), strict=True)

    def _keep(self, key: bytes, data: bytes, state: bool = False) -> None:
        """In memory; what leaves it goes to disk, where it usually is."""
        for gone, its_data in self.host.put(key, data, state):
            if self.disk:
                self.disk.put(gone, its_data)


def _slices(count: int) -> list[slice]:
    return [slice(first, first + _AT_ONCE) for first in range(0, count, _AT_ONCE)]
