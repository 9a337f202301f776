"""The very ids that were sampled, kept so that a turn which a client sends back as JSON extends the cached prompt.

Text re-tokenised, or a call re-rendered from its JSON, need not give the sampled ids back; from the first difference on
everything would be computed again. Reference api C.4 number 16.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

MOST_TURNS = 100_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer.

    ids: as sampled, without the end of sentence; thinking: it began inside the thinking; the rest is what the client
    saw: text, reasoning and the calls as (name, arguments).
    """

    ids: tuple[int, ...]
    thinking: bool
    text: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]

    def agrees(self, text: str, reasoning: str | None, calls: Sequence[tuple[str, str]]) -> bool:
        """Whether what a client sent back is this turn. Reasoning may be missing; arguments are compared as JSON."""
        if reasoning and reasoning.strip("\n") != self.reasoning.strip("\n"):
            return False
        said = [(name, _canonical(arguments)) for name, arguments in calls]
        return text.strip("\n") == self.text.strip("\n") and said == [(n, _canonical(a)) for n, a in self.calls]


class ReplayStore:
    """Turns by the ids of their calls, or by what was said; the least recently used go first.

    path: a file that survives a restart, whose lines have checksums; None keeps turns in memory only.
    """

    def __init__(self, path: Path | None = None, limit: int = MOST_TURNS) -> None:
        self._turns: OrderedDict[str, Turn] = OrderedDict()
        self._limit, self._lock = limit, threading.Lock()
        self._file: int | None = None
        if path:
            self._open(path)

    def remember(self, namespace: str, question: str, call_ids: Sequence[str], turn: Turn) -> None:
        """Keep a turn under its call ids, and under the question that it answered."""
        for key in _keys(namespace, question, turn.text, call_ids):
            with self._lock:
                self._put(key, turn)
                if self._file is not None:
                    self._write(key, turn)

    def find(
        self,
        namespace: str,
        question: str,
        call_ids: Sequence[str],
        text: str,
        reasoning: str | None,
        calls: Sequence[tuple[str, str]],
    ) -> Turn | None:
        """The turn that a client sent back, if it was sampled here and sent back unchanged."""
        for key in _keys(namespace, question, text, call_ids):
            turn = self._turns.get(key)
            if turn and turn.agrees(text, reasoning, calls):
                with self._lock:
                    self._turns.move_to_end(key)
                return turn
        return None

    def close(self) -> None:
        """Nothing more is written."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _put(self, key: str, turn: Turn) -> None:
        self._turns[key] = turn
        self._turns.move_to_end(key)
        if len(self._turns) > self._limit:
            self._turns.popitem(last=False)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for key, turn in _read(path):
            self._put(key, turn)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        for key, turn in self._turns.items():
            self._write(key, turn)
        aside.replace(path)

    def _write(self, key: str, turn: Turn) -> None:
        fields = [key, list(turn.ids), turn.thinking, turn.text, turn.reasoning, turn.calls]
        text = json.dumps(fields, separators=(",", ":")).encode()
        assert self._file is not None
        try:
            # The leading line end closes a line that a kill or a full disk has cut short.
            os.write(self._file, b"\n%08x %s\n" % (zlib.crc32(text), text))
        except OSError:
            self.close()  # a full disk: turns are kept in memory only


def _read(path: Path) -> Iterator[tuple[str, Turn]]:
    """The whole lines of a file, in order."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if checksum == b"%08x" % zlib.crc32(text) and text:
                key, ids, thinking, said, reasoning, calls = json.loads(text)
                yield key, Turn(tuple(ids), thinking, said, reasoning, tuple((n, a) for n, a in calls))


def _keys(namespace: str, question: str, text: str, call_ids: Sequence[str]) -> Iterator[str]:
    parts = [f"call:{id}" for id in call_ids] or [f"turn:{question}\0{text.strip(chr(10))}"]
    for part in parts:
        yield blake2b(f"{namespace}\0{part}".encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _canonical(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, Mapping | list) else arguments
