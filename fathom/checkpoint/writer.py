"""Writes a checkpoint folder: shards in order, one tensor in memory at a time; all of it or nothing.

Everything goes to a hidden folder beside the target, which is renamed when it is complete. Sizes are known before the
first byte, so that a disk without room is refused at once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fathom.checkpoint.reader import DTYPES, INDEX, Meter, Progress
from fathom.errors import CheckpointError

EMBEDDED_SHARD = 15 << 20
"""Largest file of a model small enough to live in a repository."""

GENERAL_SHARD = 5 * 10**9
"""Largest file of any other model; a tensor that is larger has a file of its own."""

_EMBEDDED_TOTAL = 64 << 20
_HEADER_BYTES = 160
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that are made together, such as a weight and its scale, and the function that makes them when needed."""

    tensors: tuple[Stored, ...]
    make: Callable[[], Sequence[Tensor]]

    @property
    def size(self) -> int:
        """Bytes in a file, about: data and a line of header for each tensor."""
        return sum(t.size + len(t.name) + _HEADER_BYTES for t in self.tensors)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    pieces: Sequence[Piece],
    shard_bytes: int | None = None,
    extra: Sequence[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write `config` and all pieces to `folder`, which must not exist or be empty, with copies of the files `extra`.

    shard_bytes: largest file; by default 15 MiB for a model of at most 64 MiB, else 5 GB. Raises CheckpointError:
    a folder with something in it, a full disk. Whatever is raised, the folder is as it was before.
    """
    shards = _shards(pieces, shard_bytes)
    with _aside(folder, sum(piece.size for piece in pieces)) as aside:
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in extra:
            shutil.copyfile(path, aside / path.name)
        _write_index(aside, shards)
        meter = Meter(sum(t.size for piece in pieces for t in piece.tensors), progress)
        for file, held in shards.items():
            with (aside / file).open("wb") as out:
                _write_shard(out, held, meter)
                out.flush()
                os.fsync(out.fileno())


@contextmanager
def _aside(folder: Path, size: int) -> Iterator[Path]:
    """A folder beside `folder`, renamed to it at the end of the block, or removed if the block raises."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder, and nothing is overwritten: choose another one")
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_room(folder.parent, size)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        aside.chmod(0o755)
        yield aside
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except OSError as error:
        raise _explained(error, folder, size) from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)


def _check_room(parent: Path, size: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < size:
        raise CheckpointError(f"{parent} has {free:,} bytes free, but {size:,} are needed: make room, or go elsewhere")


def _explained(error: OSError, folder: Path, size: int) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"the disk is full: {folder} needs {size:,} bytes"
        return CheckpointError(f"{text}; nothing is left of it, make room or choose another disk")
    return CheckpointError(f"{folder} cannot be written ({error.strerror or error}); nothing is left of it")


def _shards(pieces: Sequence[Piece], limit: int | None) -> dict[str, list[Piece]]:
    """Pieces by file, in order; within a file wide dtypes come first, so that every tensor is aligned."""
    if limit is None:
        limit = EMBEDDED_SHARD if sum(p.size for p in pieces) <= _EMBEDDED_TOTAL else GENERAL_SHARD
    groups: list[list[Piece]] = [[]]
    room = limit
    for piece in pieces:
        if piece.size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(piece)
        room -= piece.size
    for group in groups:
        group.sort(key=lambda piece: -max(t.dtype.itemsize for t in piece.tensors))
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _write_index(folder: Path, shards: Mapping[str, Sequence[Piece]]) -> None:
    where = {t.name: file for file, held in shards.items() for piece in held for t in piece.tensors}
    total = sum(t.size for held in shards.values() for piece in held for t in piece.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(out: IO[bytes], pieces: Sequence[Piece], meter: Meter) -> None:
    out.write(_header([t for piece in pieces for t in piece.tensors]))
    for piece in pieces:
        for want, tensor in zip(piece.tensors, piece.make(), strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (want.dtype, want.shape), want.name
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data)
            meter.add(want.size)


def _header(tensors: Sequence[Stored]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        offsets = [at, at + t.size]
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        at += t.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
