"""A checkpoint's folder, opened and checked against its configuration: what `load` and `convert` both read from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fathom.checkpoint.names import (
    ALLOWED,
    FORMS,
    SCALES,
    Entry,
    Shape,
    entries,
    foreign_entry,
    is_foreign,
    specs,
    with_drafter,
)
from fathom.checkpoint.reader import Reader
from fathom.config import ModelConfig
from fathom.errors import CheckpointError
from fathom.kernels.quant import FP4_BLOCK, WEIGHT_BLOCK

_STEPS = {"fp4": (1, 2, 1, FP4_BLOCK), "fp8": (1, 1, WEIGHT_BLOCK, WEIGHT_BLOCK), "bf16": (1, 1, 1, 1)}
"""Logical rows and columns of one stored element of the weight, and of one scale."""


class Checkpoint:
    """A folder in the published layout. Opening checks every name, shape and dtype, and reads no data.

    config: of the folder, told what its tensors are (a DSpark drafter). entries: what our model has. foreign: what it
    may have besides. Raises ConfigError and CheckpointError, which name the tensor and the file.
    """

    def __init__(self, folder: str | Path) -> None:
        config = ModelConfig.load(folder)
        self.reader = Reader(folder)
        self.config = with_drafter(config, self.reader.tensors)
        self.entries = entries(self.config)
        self._forms = {entry.name: self._checked(entry) for entry in self.entries}
        self.foreign = self._foreign()

    def form(self, entry: Entry) -> str:
        """How a tensor is stored: fp4, fp8 or bf16 (any float)."""
        return self._forms[entry.name]

    def is_known(self, entry: Entry) -> bool:
        """Whether the tensor can be read as a weight; a foreign one without scales is bytes only."""
        return entry.name in self._forms

    def scales(self, entry: Entry) -> str:
        """The dtype of a quantised tensor's scales."""
        return self.reader.tensors[entry.scale].dtype

    @property
    def quantised(self) -> bool:
        """Whether any weight is FP4 or FP8: whether the model was trained with quantised activations."""
        return any(form != "bf16" for form in self._forms.values())

    def read(
        self, entry: Entry, rows: slice = slice(None), columns: slice = slice(None), *, verify: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """A weight and its scales (None where it has none), or the part of logical `rows` and `columns` of both.

        A cut of a quantised weight must fall on its blocks. verify: look for NaN and infinity in the values as well;
        scales and hash tables are always checked. Raises CheckpointError.
        """
        form = self._forms[entry.name]
        cuts = self._cuts(entry, form, (rows, columns)[: len(entry.shape)])
        weight = self.reader.read(entry.name, *cuts[0])
        self._check_values(entry, weight, verify)
        if form == "bf16":
            return weight, None
        scale = self.reader.read(entry.scale, *cuts[1])
        self._check_scale(entry, scale)
        return weight, scale

    def _cuts(self, entry: Entry, form: str, index: Sequence[slice]) -> list[list[slice]]:
        out: list[list[slice]] = [[], []]
        for axis, cut in enumerate(index):
            first, last, _ = cut.indices(entry.shape[axis])
            for kind, per in enumerate(_STEPS[form][axis::2]):
                if first % per or (last % per and last != entry.shape[axis]):
                    raise CheckpointError(f"{entry.name} cannot be cut at {first}:{last}: its blocks are {per} wide")
                out[kind].append(slice(first // per, -(-last // per)))
        return out

    def _checked(self, entry: Entry) -> str:
        """The stored form of an entry whose tensor and scales are as they must be."""
        stored = self.reader.tensors.get(entry.name)
        if stored is None:
            raise self._missing(entry.name)
        if stored.dtype not in ALLOWED[entry.kind]:
            text = f"{entry.name} in {stored.file} is {stored.dtype}, expected {' or '.join(ALLOWED[entry.kind])}"
            raise CheckpointError(f"{text}; bring it to the published layout first")
        form = FORMS.get(stored.dtype, "bf16")
        for spec in specs(entry, form):
            self._check_shape(spec.name, spec.shape, scale=spec.name != entry.name)
        return form

    def _check_shape(self, name: str, shape: Shape, scale: bool) -> None:
        stored = self.reader.tensors.get(name)
        if stored is None:
            raise self._missing(name)
        if stored.shape != shape:
            text = f"{name} in {stored.file} has the shape {list(stored.shape)}, config.json asks for {list(shape)}"
            raise CheckpointError(f"{text}; take both from the same checkpoint")
        if scale and stored.dtype not in SCALES:
            raise CheckpointError(f"{name} in {stored.file} is {stored.dtype}, expected {' or '.join(SCALES)}")

    def _missing(self, name: str) -> CheckpointError:
        hint = "; or set num_nextn_predict_layers to 0 in config.json" if name.startswith("mtp.") else ""
        return CheckpointError(f"{self.reader.folder} lacks the tensor {name}: fetch the checkpoint again{hint}")

    def _foreign(self) -> list[Entry]:
        """What is there besides. Raises CheckpointError where nothing accounts for it."""
        known = {name for e in self.entries for name in self._names(e)}
        out = []
        for name, stored in self.reader.tensors.items():
            if name in known:
                continue
            if not is_foreign(self.config, name):
                text = f"{stored.file} holds the tensor {name}, which this configuration does not have"
                raise CheckpointError(f"{text}; take config.json from the same checkpoint")
            entry = foreign_entry(name, stored.dtype, stored.shape)
            if self._is_quantised(entry, stored.dtype):
                self._forms[name] = FORMS[stored.dtype]
            out.append(entry)
        scales = {e.scale for e in out if e.name in self._forms}
        return [e for e in out if e.name not in scales]

    def _is_quantised(self, entry: Entry, dtype: str) -> bool:
        """Whether a foreign tensor is a weight with scales as we know them."""
        if entry.kind not in ("linear", "expert") or len(entry.shape) != 2 or entry.scale not in self.reader.tensors:
            return False
        scale = self.reader.tensors[entry.scale]
        return scale.dtype in SCALES and specs(entry, FORMS[dtype])[1].shape == scale.shape

    def _names(self, entry: Entry) -> tuple[str, ...]:
        return (entry.name,) if self._forms[entry.name] == "bf16" else (entry.name, entry.scale)

    def _check_scale(self, entry: Entry, scale: Tensor) -> None:
        if scale.dtype == torch.float8_e8m0fnu:
            bad = scale.view(torch.uint8) == 255
        else:
            bad = ~(torch.isfinite(scale) & (scale > 0))
        if bad.any():
            self._refuse(entry.scale, bad, "no scale (NaN, infinite or not positive)")

    def _check_values(self, entry: Entry, weight: Tensor, verify: bool) -> None:
        if entry.kind == "table":
            bad = (weight < 0) | (weight >= self.config.n_routed_experts)
            if bad.any():
                self._refuse(entry.name, bad, f"no expert (0 to {self.config.n_routed_experts - 1})")
        elif verify and weight.dtype != torch.int8:
            bad = ~torch.isfinite(weight.float())
            if bad.any():
                self._refuse(entry.name, bad, "NaN or infinite")

    def _refuse(self, name: str, bad: Tensor, what: str) -> None:
        where, file = bad.nonzero()[0].tolist(), self.reader.tensors[name].file
        raise CheckpointError(
            f"{name} in {file}: {int(bad.sum())} values, first at {where}, are {what}; fetch it again"
        )
