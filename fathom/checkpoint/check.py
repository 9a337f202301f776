"""What a folder holds against what its configuration promises, from headers alone. Reference 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fathom.checkpoint.names import DUPLICATES, Kind, Place, scale_shape, stored_shape
from fathom.checkpoint.reader import Entry, Reader
from fathom.config import ModelConfig
from fathom.errors import CheckpointError

_SCALES = (torch.float8_e8m0fnu, torch.float32)
_QUANTISED = (torch.int8, torch.float8_e4m3fn)


def backbone(config: ModelConfig, names: Mapping[str, Entry]) -> ModelConfig:
    """The configuration without its prediction block where the checkpoint's `mtp.*` are a DSpark drafter.

    What tells them apart is `mtp.0.enorm.weight`, which a drafter does not have. Reference 3.4.
    """
    drafter = any(name.startswith("mtp.0.main_proj.") for name in names) and "mtp.0.enorm.weight" not in names
    if not drafter or not config.num_nextn_predict_layers:
        return config
    kept = {"num_nextn_predict_layers": config.num_nextn_predict_layers, "compress_ratios": config.compress_ratios}
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return replace(config, num_nextn_predict_layers=0, compress_ratios=ratios, dspark=kept)


def is_drafter(config: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to a DSpark drafter, which is kept but not run."""
    return config.dspark is not None and name.startswith("mtp.")


def check(reader: Reader, config: ModelConfig, places: Mapping[str, Place]) -> None:
    """Every tensor there, none besides, each of a shape and dtype that can be honoured. Raises CheckpointError."""
    expected = set(DUPLICATES)
    for place in places.values():
        entry = _present(reader, place.name)
        _check_form(place.name, entry, place.kind.value, stored_shape(place.shape, entry.dtype or torch.int64))
        expected.add(place.name)
        if entry.dtype in _QUANTISED:
            _check_form(place.scale, _present(reader, place.scale), _SCALES, scale_shape(place.shape, entry.dtype))
            expected.add(place.scale)
    _check_alike(reader, places)
    for name, entry in reader.entries.items():
        if name not in expected and not is_drafter(config, name):
            raise CheckpointError(f"{entry.file} has {name}, which this config.json does not call for: check both")


def quantised(reader: Reader, places: Mapping[str, Place]) -> bool:
    """Whether any weight is stored in FP8 or FP4."""
    return any(reader.entries[name].dtype in _QUANTISED for name in places)


def needed(reader: Reader, places: Mapping[str, Place]) -> Iterator[Entry]:
    """The entries that the places read, scales included."""
    for place in places.values():
        yield reader.entries[place.name]
        if reader.entries[place.name].dtype in _QUANTISED:
            yield reader.entries[place.scale]


def read_scale(reader: Reader, name: str, out: Tensor | None = None) -> Tensor:
    """A scale, refused if it holds NaN, an infinity or a negative number."""
    scale = reader.read(name, out=out)
    bad = scale.view(torch.uint8) == 255 if scale.dtype == torch.float8_e8m0fnu else ~(scale.isfinite() & (scale >= 0))
    if bad.any():
        text = f"{reader.entries[name].file} has {int(bad.sum())} invalid values (such as NaN) in {name}"
        raise CheckpointError(f"{text}: fetch the file again")
    return scale


def _present(reader: Reader, name: str) -> Entry:
    if name not in reader.entries:
        raise CheckpointError(f"{reader.folder} lacks the tensor {name}: the checkpoint is incomplete, fetch it again")
    return reader.entries[name]


def _check_form(name: str, entry: Entry, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> None:
    if entry.dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        text = f"{entry.file} stores {name} as {entry.dtype_name}"
        raise CheckpointError(f"{text}, but only {known} can be read: bring it to the published form")
    if entry.shape != shape:
        text = f"{entry.file} has {name} of shape {list(entry.shape)}"
        raise CheckpointError(f"{text}, but config.json calls for {list(shape or ())}: they do not belong together")


def _check_alike(reader: Reader, places: Mapping[str, Place]) -> None:
    """The experts of a layer live in one tensor, so they must be stored alike."""
    first: dict[str, Place] = {}
    for place in places.values():
        if place.kind is Kind.EXPERT:
            other = first.setdefault(place.parameter, place)
            if _form(reader, place) != _form(reader, other):
                file = reader.entries[place.name].file
                raise CheckpointError(f"{file} stores {place.name} in another form than {other.name}: convert them")


def _form(reader: Reader, place: Place) -> tuple[torch.dtype | None, torch.dtype | None]:
    scale = reader.entries.get(place.scale)
    return reader.entries[place.name].dtype, scale.dtype if scale else None
