"""Sharded safetensors, read lazily: headers at once, then one slice of one tensor at a time.

A file is 8 bytes of header length, a JSON header (dtype, shape and place of each tensor), and the data. Reading the
headers ourselves is what lets an error name the tensor and the file, and a slice cost only its own bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom.checkpoint.names import DTYPES, Shape
from fathom.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a read or write is: bytes done and in total, and seconds since it began."""

    done: int
    total: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second so far."""
        return self.done / max(self.seconds, 1e-9)


class Meter:
    """Counts bytes and reports them to a callback."""

    def __init__(self, total: int, report: Callable[[Progress], None] | None) -> None:
        self.done, self.total, self.report, self.begin = 0, total, report, time.perf_counter()

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        if self.report:
            self.report(Progress(self.done, self.total, time.perf_counter() - self.begin))


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: file, first byte and size in bytes; dtype by its safetensors name."""

    name: str
    dtype: str
    shape: Shape
    file: Path
    offset: int
    size: int


class Reader:
    """The tensors of a folder: `model.safetensors.index.json` and its shards, or one `model.safetensors`.

    Opening reads and checks every header and no data. Raises CheckpointError that names the file, and the tensor.
    `bytes_read` counts the data read since.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors = _tensors(self.folder)
        self.bytes_read = 0

    def read(self, name: str, *index: slice) -> Tensor:
        """A tensor, or the part of it that `index` (a slice an axis, without steps) cuts out; always a copy.

        Only the rows of the first slice are read; further slices are cut from them.
        """
        stored = self.tensors[name]
        first, last, _ = (index[0] if index else slice(None)).indices(stored.shape[0] if stored.shape else 1)
        row = stored.size // (stored.shape[0] if stored.shape else 1)
        count = max(last - first, 0) * row
        if not count:
            return torch.empty(0, *stored.shape[1:], dtype=DTYPES[stored.dtype])
        data = np.fromfile(stored.file, np.uint8, count, offset=stored.offset + first * row)
        if data.size != count:
            raise CheckpointError(f"{stored.file} was cut off while {name} was read: fetch it again")
        self.bytes_read += count
        whole = torch.from_numpy(data).view(DTYPES[stored.dtype])
        rows = whole.view(last - first, *stored.shape[1:]) if stored.shape else whole.view(())
        return rows[(slice(None), *index[1:])].contiguous() if index[1:] else rows


def _tensors(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    if index.is_file():
        return _sharded(folder, _weight_map(index))
    if (folder / SINGLE).is_file():
        return {stored.name: stored for stored in _header(folder / SINGLE)}
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}: give the folder with config.json and weights")
    raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}: fetch the checkpoint's weights")


def _weight_map(index: Path) -> dict[str, str]:
    found = _json(index, index.read_bytes())
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not all(isinstance(f, str) and Path(f).name == f for f in names.values()):
        raise CheckpointError(f"{index} has no usable weight_map (tensor names to file names): fetch it again")
    return names


def _sharded(folder: Path, places: dict[str, str]) -> dict[str, Stored]:
    out: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            first = next(name for name, place in places.items() if place == file)
            raise CheckpointError(f"{folder / file} is missing ({first} should be in it): fetch it again")
        for stored in _header(folder / file):
            if (place := places.get(stored.name)) != file:
                where = f"places it in {place}" if place else "does not list it"
                raise CheckpointError(f"{folder / file} holds {stored.name}, but {INDEX} {where}: fetch both again")
            out[stored.name] = stored
    if lost := sorted(set(places) - set(out)):
        file = places[lost[0]]
        raise CheckpointError(f"{INDEX} places {lost[0]} in {folder / file}, which lacks it: fetch both again")
    return out


def _header(file: Path) -> list[Stored]:
    """The tensors of one file, in the order of their data. Raises CheckpointError for a damaged file."""
    total = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(total - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{file} is cut off or no safetensors file ({total} bytes): fetch it again")
        raw = _json(file, f.read(length))
    found = [_stored(file, 8 + length, name, entry) for name, entry in raw.items() if name != "__metadata__"]
    found.sort(key=lambda stored: stored.offset)
    end = 8 + length
    for stored in found:
        if stored.offset != end:
            raise CheckpointError(f"{file} has a damaged header (the place of {stored.name}): fetch it again")
        end += stored.size
        if end > total:
            text = f"{file} is cut off: {total} bytes, {stored.name} ends at {end}"
            raise CheckpointError(f"{text}; fetch it again")
    if end != total:
        raise CheckpointError(f"{file} has {total - end} bytes more than its header describes: fetch it again")
    return found


def _stored(file: Path, data: int, name: str, raw: Any) -> Stored:
    try:
        dtype, shape, (first, last) = str(raw["dtype"]), tuple(map(int, raw["shape"])), map(int, raw["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} has a damaged header (at {name}): fetch it again") from None
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} in {file} has the dtype {dtype}: only {', '.join(DTYPES)} are known")
    if last - first != torch.Size(shape).numel() * DTYPES[dtype].itemsize or min((*shape, first)) < 0:
        raise CheckpointError(f"{name} in {file} has {last - first} bytes for {dtype} {list(shape)}: fetch it again")
    return Stored(name, dtype, shape, file, data + first, last - first)


def _json(file: Path, raw: bytes) -> Any:
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged (no JSON object): fetch it again")
    return found
