"""A model becomes a checkpoint folder in the published layout. Reference 3.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fathom.checkpoint.names import Kind, Place, inventory, scale_shape, stored_shape
from fathom.checkpoint.reader import Progress
from fathom.checkpoint.repack import check_choice, described, repack, target
from fathom.checkpoint.writer import Piece, Stored, write_checkpoint
from fathom.model.transformer import Transformer


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    experts: str = "fp4",
    linears: str = "fp8",
    shard_bytes: int | None = None,
    extra: Sequence[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write `model`, float or stored, to `folder`, which must not exist or be empty.

    experts: fp4, fp8 or bf16; linears: fp8 or bf16. What is stored in that form already is written as it is, byte for
    byte; other weights are rounded to it. Norms, embeddings and compressors are BF16, hyper-connections, sinks and
    biases F32. shard_bytes: largest file, by default 15 MiB for a model of at most 64 MiB, else 5 GB.
    Raises FormatError, CheckpointError; then the folder is as it was before.
    """
    check_choice(experts, linears)
    state = model.state_dict()
    pieces = []
    for place in inventory(model.config).values():
        pieces.append(_piece(place, state, target(place.kind, experts, linears)))
    write_checkpoint(Path(folder), described(model.config, experts, linears), pieces, shard_bytes, extra, progress)


def _piece(place: Place, state: Mapping[str, Tensor], dtype: torch.dtype) -> Piece:
    weight = place.of(state[place.parameter])
    whole = state.get(place.scale_parameter) if place.kind in (Kind.EXPERT, Kind.LINEAR) else None
    scale = None if whole is None else place.of(whole)
    kept = weight.dtype == dtype
    tensors = [Stored(place.name, dtype, stored_shape(place.shape, dtype))]
    if (shape := scale_shape(place.shape, dtype)) is not None:
        kind = scale.dtype if kept and scale is not None else torch.float8_e8m0fnu
        tensors.append(Stored(place.scale, kind, shape))

    def make() -> list[Tensor]:
        if kept:
            return [weight] if scale is None else [weight, scale]
        if dtype == torch.int64 or (scale is None and dtype in (torch.bfloat16, torch.float32)):
            return [weight.to(dtype)]
        return repack(place.name, weight, scale, dtype, lossy=True)

    return Piece(tuple(tensors), make)
