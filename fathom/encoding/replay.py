"""The very ids that were sampled, kept so that a turn which a client sends back as JSON extends the cached prompt.

Text re-tokenised, or a call re-rendered from its JSON, need not give the sampled ids back; from the first difference on
everything would be computed again. Reference api C.4 number 16.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

MOST_TURNS = 100_000

MOST_TOKENS = 32_000_000
"""Of all turns together: 128 MB."""

_SLACK = 1_000
"""Lines that are no longer wanted before the file is written anew, besides as many as are wanted."""

_PAUSE = 60.0
"""Seconds without writing after a write failed."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Said:
    """What a client saw of an answer: the text, the reasoning (None if it dropped it), calls as (name, arguments)."""

    text: str
    reasoning: str | None = None
    calls: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """Of text and calls, arguments compared as JSON; clients trim line ends and write arguments anew."""
        return _digest(self.text.strip("\n"), *(part for name, text in self.calls for part in (name, _canonical(text))))


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer.

    ids: as sampled, behind the header of the turn and without the end of sentence; thinking: it began inside the
    thinking; said, reasoning: digests of what the client saw.
    """

    ids: array[int]
    thinking: bool
    said: str
    reasoning: str

    @staticmethod
    def of(ids: Sequence[int], thinking: bool, said: Said) -> Turn:
        """The turn of these ids that a client saw as `said`."""
        return Turn(array("I", ids), thinking, said.digest(), _reasoning(said))

    def agrees(self, said: Said) -> bool:
        """Whether what a client sent back is this turn. Reasoning may be missing."""
        return said.digest() == self.said and (not said.reasoning or _reasoning(said) == self.reasoning)


class ReplayStore:
    """Turns by the ids of their calls, and by what was said; the least recently used go first.

    path: a file that survives a restart, whose lines have checksums; None keeps turns in memory only. trouble: why
    turns are not written now, if they are not.
    """

    def __init__(self, path: Path | None = None, limit: int = MOST_TURNS, tokens: int = MOST_TOKENS) -> None:
        self._turns: OrderedDict[str, Turn] = OrderedDict()
        self._limit, self._most_tokens, self._tokens = limit, tokens, 0
        self._lock = threading.Lock()
        self._path, self._file, self._lines = path, -1, 0
        self.trouble, self._paused_until = "", 0.0
        if path:
            self._open(path)

    def remember(self, scope: str, question: str, call_ids: Sequence[str], said: Said, turn: Turn) -> None:
        """Keep a turn under its call ids, and under the question that it answered."""
        with self._lock:
            for key in _keys(scope, question, call_ids, said):
                self._put(key, turn)
                self._write(key, turn)
            again = self.trouble and time.monotonic() >= self._paused_until
            if again or self._lines > 2 * len(self._turns) + _SLACK:
                self._compact()

    def find(self, scope: str, question: str, call_ids: Sequence[str], said: Said) -> Turn | None:
        """The turn that a client sent back, if it was sampled here and sent back unchanged."""
        with self._lock:
            for key in _keys(scope, question, call_ids, said):
                turn = self._turns.get(key)
                if turn and turn.agrees(said):
                    self._turns.move_to_end(key)
                    return turn
        return None

    def close(self) -> None:
        """Nothing more is written."""
        with self._lock:
            self._shut()

    def _put(self, key: str, turn: Turn) -> None:
        if old := self._turns.pop(key, None):
            self._tokens -= len(old.ids)
        self._turns[key] = turn
        self._tokens += len(turn.ids)
        while len(self._turns) > self._limit or self._tokens > self._most_tokens:
            self._tokens -= len(self._turns.popitem(last=False)[1].ids)

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for key, turn in _read(path):
                self._put(key, turn)
        except OSError as error:
            self._fail(error)
            self._path = None  # what could not be read is not overwritten
        self._compact()

    def _compact(self) -> None:
        """Write the file anew, aside, then put it in its place."""
        if self._path is None:
            return
        self._shut()
        self.trouble, aside = "", self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            self._lines = 0
            for key, turn in self._turns.items():
                self._write(key, turn)
            if not self.trouble:
                aside.replace(self._path)
        except OSError as error:
            self._fail(error)
        if self.trouble:
            with contextlib.suppress(OSError):
                aside.unlink()

    def _write(self, key: str, turn: Turn) -> None:
        if self._file < 0:
            return
        packed = base64.b64encode(turn.ids.tobytes()).decode()
        text = json.dumps([_VERSION, key, packed, turn.thinking, turn.said, turn.reasoning]).encode()
        try:
            # The leading line end closes a line that a kill or a full disk has cut short.
            os.write(self._file, b"\n%08x %s\n" % (zlib.crc32(text), text))
            self._lines += 1
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._shut()
        self._paused_until = time.monotonic() + _PAUSE
        self.trouble = f"answers are kept in memory only, {self._path} cannot be written: {error.strerror}"

    def _shut(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _read(path: Path) -> Iterator[tuple[str, Turn]]:
    """The whole lines of a file, in order; damaged ones and those of other versions are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not text or checksum != b"%08x" % zlib.crc32(text):
                continue
            fields: list[Any] = json.loads(text)
            if fields[0] == _VERSION:
                _, key, packed, thinking, said, reasoning = fields
                yield key, Turn(array("I", base64.b64decode(packed)), thinking, said, reasoning)


def _keys(scope: str, question: str, call_ids: Sequence[str], said: Said) -> Iterator[str]:
    if call_ids:
        yield _digest("calls", scope, *call_ids)
    yield _digest("turn", scope, question, said.digest())


def _digest(*parts: str) -> str:
    joined = "\0".join(f"{len(part)}:{part}" for part in parts)
    return blake2b(joined.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _reasoning(said: Said) -> str:
    return _digest((said.reasoning or "").strip("\n"))


def _canonical(arguments: str) -> str:
    """One spelling for all JSON texts of a value: some clients sort keys, and write 1.0 as 1."""
    try:
        value = json.loads(arguments, parse_float=_number)
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value
