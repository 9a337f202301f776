"""The lowest tier of the prefix cache: one file an entry, written by a thread, whole or not there, never trusted.

A file's name is its entry's key, which is a hash of all that the content depends on; so a file is never changed, and
processes that share a folder write the same bytes. A file is written under another name and then renamed: a kill leaves
old files and whole new ones. What the system may still spoil (a crash of the machine, a bad disk) shows itself in the
checksum when the file is read; such a file is removed, counted in `notes`, and its entry is computed again.

    FOLDER/v1-<model>/<first two digits>/<key>      header (magic, version, model, key, length, checksum), data
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from itertools import count
from pathlib import Path

from fathom.errors import ConfigError

VERSION = 1
_MAGIC = b"fathomkv"
_HEADER = struct.Struct("<8sI16s20sQ")
_CHECK = 16
HEADER_BYTES = _HEADER.size + _CHECK
"""What a file has besides its data."""

_WAITING = 256 << 20
"""Bytes that may wait to be written; what comes beyond is not written."""

_PAUSE = 60.0
"""Seconds without writing after a write failed."""

_STALE = 3600.0
"""Seconds after which a file that was begun and not finished is nobody's."""

_NAME = re.compile(r"[0-9a-f]{40}")


class Disk:
    """Entries of one model under `folder`, at most `limit` bytes of files, the least recently used removed first.

    model: 16 bytes that tell models apart. All methods from any thread. Raises ConfigError for a folder that cannot be
    used.
    """

    def __init__(self, folder: Path, model: bytes, limit: int) -> None:
        self.folder, self.limit, self.used = folder / f"v{VERSION}-{model.hex()}", limit, 0
        self._model = model
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._waiting: OrderedDict[bytes, bytes] = OrderedDict()
        self._waiting_bytes = self._damaged = self._foreign = self._dropped = 0
        self._failure, self._paused_until = "", 0.0
        self._changed, self._closed, self._numbers = threading.Condition(), False, count()
        try:
            self._open()
        except OSError as error:
            text = f"the cache folder {folder} cannot be used: {error.strerror}"
            raise ConfigError(f"{text}; name another, or go without") from error
        self._thread = threading.Thread(target=self._work, name="fathom-disk", daemon=True)
        self._thread.start()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, a sentence each."""
        root = self.folder.parent
        said = (
            (self._failure, f"nothing more is written to the cache in {root} for now: {self._failure}"),
            (self._damaged, f"{self._damaged} damaged files were removed from the cache in {root}"),
            (self._foreign, f"{self._foreign} files and folders in {root} are not of this model's cache: left alone"),
            (self._dropped, f"{self._dropped} entries were not written to the cache in {root}: the disk is too slow"),
        )
        return tuple(text for applies, text in said if applies)

    def has(self, key: bytes) -> bool:
        """Whether the entry is there, as far as is known without reading."""
        return key in self._sizes or key in self._waiting

    def get(self, key: bytes) -> bytes | None:
        """The entry, verified; None if it is not there or damaged, and then it is not there any more."""
        with self._changed:
            if (data := self._waiting.get(key)) is not None or key not in self._sizes:
                return data
        path = self._path(key)
        try:
            data = self._unsealed(key, path.read_bytes())
        except OSError:
            self._forget(key)  # another process removed it, or it cannot be read
            return None
        if data is None:
            self._damaged += 1
            self._forget(key)
        with contextlib.suppress(OSError):  # a folder that can only be read serves all the same
            path.unlink() if data is None else os.utime(path)
        return data

    def put(self, key: bytes, data: bytes) -> None:
        """Have the entry written soon."""
        with self._changed:
            if self.has(key) or self._closed or time.monotonic() < self._paused_until:
                return
            if self._waiting_bytes + len(data) > _WAITING:
                self._dropped += 1
                return
            self._waiting[key] = data
            self._waiting_bytes += len(data)
            self._changed.notify_all()

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were used, the last one last."""
        with self._changed:
            for key in keys:
                if key in self._sizes:
                    self._sizes.move_to_end(key)

    def flush(self) -> None:
        """Wait until nothing waits to be written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or not self._thread.is_alive())

    def close(self) -> None:
        """Write what waits, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # --- what is there

    def _open(self) -> None:
        _private(self.folder)
        self._foreign += sum(1 for path in self.folder.parent.iterdir() if path != self.folder)
        found: list[tuple[float, bytes, int]] = []
        for part in self.folder.iterdir():
            if part.is_dir() and len(part.name) == 2:
                found += (item for path in os.scandir(part) if (item := self._found(path)))
            else:
                self._foreign += 1
        for _, key, size in sorted(found):
            self._sizes[key] = size
            self.used += size
        self._shrink(0)

    def _found(self, path: os.DirEntry[str]) -> tuple[float, bytes, int] | None:
        """(time of last use, key, size) of a file of ours."""
        try:
            stat = path.stat()
            if _NAME.fullmatch(path.name) and stat.st_size > HEADER_BYTES:
                return stat.st_mtime, bytes.fromhex(path.name), stat.st_size
            if _NAME.fullmatch(path.name):
                self._damaged += 1
                Path(path).unlink()
            elif not path.name.endswith(".part"):
                self._foreign += 1
            elif time.time() - stat.st_mtime > _STALE:
                Path(path).unlink()
        except FileNotFoundError:  # another process was faster
            pass
        return None

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / name

    def _forget(self, key: bytes) -> None:
        with self._changed:
            self.used -= self._sizes.pop(key, 0)

    def _shrink(self, room: int) -> None:
        """Remove the least recently used until there is room for so many bytes more."""
        while (key := self._oldest(room)) is not None:
            self._path(key).unlink(missing_ok=True)

    def _oldest(self, room: int) -> bytes | None:
        with self._changed:
            if not self._sizes or self.used + room <= self.limit:
                return None
            key, size = self._sizes.popitem(last=False)
            self.used -= size
            return key

    # --- the thread that writes

    def _work(self) -> None:
        while (item := self._next()) is not None:
            key, data = item
            try:
                size = self._write(key, data)
                self._failure = ""
            except OSError as error:
                size = 0
                self._fail(error.strerror or str(error))
            with self._changed:
                self._done(key, size)

    def _next(self) -> tuple[bytes, bytes] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return next(iter(self._waiting.items()), None)

    def _done(self, key: bytes, size: int) -> None:
        """It waits no longer; `size` bytes of it are on disk."""
        if size:
            self._sizes[key] = size
            self.used += size
        if (data := self._waiting.pop(key, None)) is not None:
            self._waiting_bytes -= len(data)
        self._changed.notify_all()

    def _write(self, key: bytes, data: bytes) -> int:
        size = HEADER_BYTES + len(data)
        if size > self.limit:
            return 0
        self._shrink(size)
        path = self._path(key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.{next(self._numbers)}.part")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(self._sealed(key, data))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return size

    def _fail(self, reason: str) -> None:
        """Nothing more is written for a while: what waits is given up."""
        with self._changed:
            self._failure, self._paused_until = reason, time.monotonic() + _PAUSE
            self._waiting.clear()
            self._waiting_bytes = 0

    # --- the file

    def _sealed(self, key: bytes, data: bytes) -> bytes:
        header = _HEADER.pack(_MAGIC, VERSION, self._model, key, len(data))
        return header + _checksum(header, data) + data

    def _unsealed(self, key: bytes, file: bytes) -> bytes | None:
        header, check, data = file[: _HEADER.size], file[_HEADER.size : HEADER_BYTES], file[HEADER_BYTES:]
        fine = header == _HEADER.pack(_MAGIC, VERSION, self._model, key, len(data))
        return data if fine and check == _checksum(header, data) else None


def _checksum(header: bytes, data: bytes) -> bytes:
    digest = blake2b(header, digest_size=_CHECK)
    digest.update(data)
    return digest.digest()


def _private(folder: Path) -> None:
    """A folder that only its owner can open; one that is there is left as it is."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)
