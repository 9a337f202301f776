"""Write a checkpoint in the published layout: planned first, then streamed, then renamed into place.

What will be written is known before the first byte, so headers come first, the disk's free space is checked, and no
more than one tensor is in memory. Nothing appears under the folder's name until all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fathom.checkpoint.names import DTYPES, Entry, Spec, entries, specs, stored_config
from fathom.checkpoint.reader import INDEX, Meter, Progress
from fathom.checkpoint.recode import chosen_form, recode
from fathom.config import ModelConfig
from fathom.errors import CheckpointError
from fathom.model.transformer import Transformer

LARGE_SHARD = 5_000_000_000
SMALL_SHARD = 15 * 2**20
"""The largest file of a checkpoint that lives in a source tree: below what code hosts refuse."""
SMALL_TOTAL = 64 * 2**20

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "fathom.json",
)
"""Files beside the weights that belong to the model."""

_HEADER_ENTRY = 120  # bytes of a header's JSON for a tensor, besides its name


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that are made together, a weight and its scales, with what will be made known in advance."""

    specs: tuple[Spec, ...]
    make: Callable[[], tuple[Tensor, ...]]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return sum(spec.bytes for spec in self.specs)

    @property
    def room(self) -> int:
        """Size in a file, header included, rounded up."""
        return self.bytes + sum(len(spec.name) + _HEADER_ENTRY for spec in self.specs)


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    experts: str | None = None,
    linears: str | None = None,
    max_shard: int | None = None,
    companions: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write `model` to `folder`, which must be empty or not exist.

    experts, linears: fp4, fp8 or bf16 (linears: fp8 or bf16); None keeps what the model holds, floats as BF16.
    max_shard: bytes of a file (one tensor with its scales is never split); by default 15 MiB for a model of up to 64
    MiB, else 5 GB. companions: a folder whose tokenizer and `fathom.json` are copied.
    Raises CheckpointError (folder not empty, disk full, NaN in a weight); then nothing is left behind.
    """
    items = [_model_item(model, entry, experts, linears) for entry in entries(model.config)]
    forms = {kind: _form_of(items, kind) for kind in ("expert", "linear")}
    config = stored_config(model.config, forms["expert"], forms["linear"])
    files = companion_files(companions) if companions else {}
    write_checkpoint(folder, [item for item, _ in items], config, files, max_shard=max_shard, progress=progress)


def write_checkpoint(
    folder: str | Path,
    items: Sequence[Item],
    config: ModelConfig,
    files: Mapping[str, bytes] | None = None,
    *,
    max_shard: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write shards, index, config.json and `files` aside, then rename. Raises as `save_model`."""
    total = sum(item.bytes for item in items)
    shards = _shards(items, max_shard or (SMALL_SHARD if total <= SMALL_TOTAL else LARGE_SHARD))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    meter = Meter(total, progress)
    with _aside(Path(folder), total) as aside:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(aside / name, shard, meter)
        places = {spec.name: name for name, shard in zip(names, shards, strict=True) for i in shard for spec in i.specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        for name, data in {INDEX: _json(index), "config.json": _json(config.to_dict()), **(files or {})}.items():
            with _durable(aside / name) as f:
                f.write(data)


def companion_files(folder: str | Path) -> dict[str, bytes]:
    """The contents of the files in `folder` that belong beside the weights."""
    return {name: (Path(folder) / name).read_bytes() for name in COMPANIONS if (Path(folder) / name).is_file()}


def _model_item(
    model: Transformer, entry: Entry, experts: str | None, linears: str | None
) -> tuple[Item, tuple[str, str]]:
    """How to write one tensor of the model, and its kind and form."""
    weight, scale = _of_model(model, entry)
    form = "bf16" if scale is None else "fp4" if weight.dtype == torch.int8 else "fp8"
    wanted = chosen_form(entry, form, experts, linears)
    scales = "F32" if scale is not None and scale.dtype == torch.float32 and form == wanted else "F8_E8M0"

    def make() -> tuple[Tensor, ...]:
        weight, scale = _of_model(model, entry)
        if form == "bf16" and not torch.isfinite(weight.float()).all():
            raise CheckpointError(f"{entry.name} has values that are NaN or infinite: this model cannot be saved")
        return recode(entry, weight.cpu(), None if scale is None else scale.cpu(), form, wanted)

    return Item(specs(entry, wanted, scales), make), (entry.kind, wanted)


def _of_model(model: Transformer, entry: Entry) -> tuple[Tensor, Tensor | None]:
    """The part of the model's parameter that an official tensor is, and its scales."""
    module, leaf = model.get_submodule(entry.module), entry.parameter.rpartition(".")[2]
    weight = getattr(module, leaf).detach()
    if entry.expert is None:
        return weight, getattr(module, "scale", None) if leaf == "weight" else None
    weight, scale = weight[entry.expert], getattr(module, leaf + "_scale")
    halves = weight.shape[0] // entry.shape[0]
    which = (entry.rows.start or 0) // entry.shape[0]
    return weight.chunk(halves)[which], None if scale is None else scale.detach()[entry.expert].chunk(halves)[which]


def _form_of(items: Sequence[tuple[Item, tuple[str, str]]], kind: str) -> str:
    return next(form for _, (found, form) in items if found == kind)


def _shards(items: Sequence[Item], most: int) -> list[list[Item]]:
    """Consecutive items, as many in a file as fit."""
    shards: list[list[Item]] = [[]]
    room = 0
    for item in items:
        if shards[-1] and room + item.room > most:
            shards.append([])
            room = 0
        shards[-1].append(item)
        room += item.room
    return shards


def _write_shard(path: Path, items: Sequence[Item], meter: Meter) -> None:
    places, header = _header([spec for item in items for spec in item.specs])
    with _durable(path) as f:
        f.write(header)
        for item in items:
            for spec, tensor in zip(item.specs, item.make(), strict=True):
                assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[spec.dtype], spec.shape), spec
                f.seek(len(header) + places[spec.name])
                f.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            meter.add(item.bytes)


def _header(found: Sequence[Spec]) -> tuple[dict[str, int], bytes]:
    """The place of each tensor's data and the file's beginning. Wide elements first, so that all stay aligned."""
    places: dict[str, int] = {}
    raw: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in sorted(found, key=lambda s: (-DTYPES[s.dtype].itemsize, s.name)):
        places[spec.name] = end
        raw[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.bytes]}
        end += spec.bytes
    text = json.dumps(raw, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return places, len(text).to_bytes(8, "little") + text


@contextmanager
def _aside(folder: Path, total: int) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name at the end, or vanishes. Raises CheckpointError."""
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder: choose another, or remove it first")
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        if (free := shutil.disk_usage(aside).free) < total:
            raise CheckpointError(f"{folder} needs {total:,} bytes, {free:,} are free: make room or use another disk")
        yield aside
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        text = f"cannot write {folder}: {error.strerror or error}"
        raise CheckpointError(f"{text}; make room, or choose a folder that can be written") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """A new file whose bytes are on the disk when the block ends."""
    with path.open("wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
