"""Sharded safetensors, lazily: headers at first, then one slice of one tensor at a time.

A safetensors file is eight bytes of header length, a JSON header {name: dtype, shape, data_offsets}, and the bytes.
Opening reads headers only and finds what is missing, truncated or misplaced before anything large is touched.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from fathom.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: Mapping[str, torch.dtype] = {
    "I64": torch.int64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
}
"""The dtypes of the published checkpoints, by their names in a safetensors header."""

_LONGEST_HEADER = 100_000_000
_PIECE = 16 << 20
_REPORT_SECONDS = 0.1

Progress = Callable[[int, int, float], None]
"""Called with the bytes done, the bytes in all, and bytes a second so far."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file: `begin` and `size` in bytes; a dtype that no checkpoint of the family has is None."""

    file: Path
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    size: int


class Meter:
    """Reports progress in bytes, at most ten times a second, and at the end."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.total, self.done, self._report = total, 0, report
        self._start = self._last = time.monotonic()

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        now = time.monotonic()
        if self._report and (now - self._last > _REPORT_SECONDS or self.done >= self.total):
            self._last = now
            self._report(self.done, self.total, self.done / max(now - self._start, 1e-9))


class Reader:
    """The tensors of a checkpoint folder: `entries` by official name, `meter` counts the bytes read.

    Raises CheckpointError, naming tensor and file, for what is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries = _entries(self.folder)
        self.meter = Meter(0, None)
        self._open: tuple[Path, IO[bytes]] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open."""
        if self._open:
            self._open[1].close()
            self._open = None

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """A tensor, or its rows begin..end of the first axis, or of these the columns begin..end of the last.

        Only the rows asked for are read, at most 16 MiB at a time where columns are cut. `out` (contiguous, on the CPU,
        of the right shape and dtype) is filled in place of a new tensor.
        """
        entry = self.entries[name]
        begin, end = rows or (0, entry.shape[0] if entry.shape else 1)
        if columns is not None:
            return self._columns(name, (begin, end), columns, out)
        shape = (end - begin, *entry.shape[1:]) if entry.shape else ()
        out = torch.empty(shape, dtype=entry.dtype) if out is None else out
        assert out.shape == shape and out.dtype == entry.dtype and out.is_contiguous()
        self._fill(name, begin * self._row_bytes(entry), out)
        return out

    def _columns(self, name: str, rows: tuple[int, int], columns: tuple[int, int], out: Tensor | None) -> Tensor:
        entry, (begin, end) = self.entries[name], rows
        shape = (end - begin, *entry.shape[1:-1], columns[1] - columns[0])
        out = torch.empty(shape, dtype=entry.dtype) if out is None else out
        step = max(1, _PIECE // max(1, self._row_bytes(entry)))
        for at in range(begin, end, step):
            piece = self.read(name, (at, min(end, at + step)))
            out[at - begin : at - begin + len(piece)] = piece[..., columns[0] : columns[1]]
        return out

    @staticmethod
    def _row_bytes(entry: Entry) -> int:
        return entry.size // entry.shape[0] if entry.shape and entry.shape[0] else entry.size

    def _fill(self, name: str, offset: int, out: Tensor) -> None:
        entry = self.entries[name]
        if not out.numel():
            return
        into = out.reshape(-1).view(torch.uint8).numpy().data
        file = self._file(entry.file)
        file.seek(entry.begin + offset)
        while into:
            count = file.readinto(into)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{entry.file} ends inside {name}: it was cut while being read; fetch it again")
            self.meter.add(count)
            into = into[count:]

    def _file(self, path: Path) -> IO[bytes]:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = path, path.open("rb", buffering=0)
        return self._open[1]


def _entries(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give the folder of a checkpoint")
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}: fetch the weights")
        return _header(folder / SINGLE)
    where = _weight_map(index)
    found: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).exists():
            name = min(n for n, f in where.items() if f == file)
            raise CheckpointError(f"{folder / file} is missing ({INDEX} places {name} there): fetch it again")
        for name, entry in _header(folder / file).items():
            if name not in where:
                raise CheckpointError(f"{entry.file} has {name}, which {INDEX} does not list: fetch both again")
            if name in found:
                raise CheckpointError(f"{name} is in {found[name].file} and in {entry.file}: keep one of the copies")
            found[name] = entry
    _check_index(folder, where, found)
    return found


def _check_index(folder: Path, where: Mapping[str, str], found: Mapping[str, Entry]) -> None:
    for name, file in where.items():
        if name not in found:
            raise CheckpointError(f"{INDEX} places {name} in {folder / file}, which does not have it: fetch both again")
        if found[name].file.name != Path(file).name:
            actual = found[name].file
            raise CheckpointError(f"{INDEX} places {name} in {folder / file}, but it is in {actual}: fetch both again")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        inside = all(Path(file).name == file for file in where.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} has no readable weight_map: fetch it again") from None
    if not inside:
        raise CheckpointError(f"{index} names files outside its folder: fetch it again")
    return dict(where)


def _header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is cut inside its header, or is no safetensors file: fetch it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        out = {name: _entry(path, 8 + length, value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"the header of {path} is damaged: fetch it again") from None
    for name, entry in out.items():
        _check_extent(name, entry, size)
    return out


def _entry(path: Path, data: int, value: Mapping[str, Any]) -> Entry:
    begin, end = value["data_offsets"]
    name = value["dtype"]
    return Entry(path, DTYPES.get(name), name, tuple(value["shape"]), data + begin, end - begin)


def _check_extent(name: str, entry: Entry, size: int) -> None:
    if entry.begin + entry.size > size:
        missing = entry.begin + entry.size - size
        raise CheckpointError(f"{entry.file} is truncated: {name} needs {missing:,} bytes past its end; fetch it again")
    if entry.dtype is not None and entry.size != math.prod(entry.shape) * entry.dtype.itemsize:
        raise CheckpointError(f"{entry.file} gives {name} a length that its shape does not have: fetch it again")
