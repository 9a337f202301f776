"""A checkpoint folder becomes a model: everything is checked first, then each tensor is read once, into its place."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from fathom.checkpoint.check import backbone, check, needed, quantised, read_scale
from fathom.checkpoint.names import Kind, Place, inventory, scale_shape, skeleton, stored_shape
from fathom.checkpoint.reader import Meter, Progress, Reader
from fathom.config import ModelConfig
from fathom.errors import CheckpointError
from fathom.kernels.quant import WEIGHT_BLOCK, dequantize
from fathom.model.layers import Linear, Numerics
from fathom.model.moe import Experts, Gate
from fathom.model.transformer import Transformer

Form = tuple[Tensor, Tensor | None]
"""A stored weight and its scale."""


def load_model(
    folder: str | Path,
    *,
    numerics: Numerics | None = None,
    device: str | torch.device = "cpu",
    dense: bool = True,
    progress: Progress | None = None,
) -> Transformer:
    """The model of a folder in the published layout, in evaluation mode, its weights frozen.

    numerics: by default float32, with activations quantised iff the checkpoint's weights are.
    dense: widen FP8 and FP4 weights to the compute dtype, exactly; otherwise they stay as stored.
    Raises ConfigError, and CheckpointError that names tensor and file, before anything large is read.
    """
    config = ModelConfig.load(folder)
    with Reader(folder) as reader:
        config = backbone(config, reader.entries)
        places = inventory(config)
        check(reader, config, places)
        reader.meter = Meter(sum(entry.size for entry in needed(reader, places)), progress)
        numerics = numerics or Numerics(quantize=quantised(reader, places))
        model = skeleton(config, numerics)
        _fill(model, reader, places, torch.device(device))
    if dense:
        model.densify()
    return model.eval()


def check_drafting(model: Transformer) -> None:
    """Raises CheckpointError if the model cannot draft: without an MTP block, or with a DSpark drafter in its place."""
    if model.config.dspark is not None:
        text = "this checkpoint drafts with DSpark blocks, which are not implemented"
        raise CheckpointError(f"{text}: generate without drafts, or use the checkpoint with the MTP block")
    if not model.mtp:
        raise CheckpointError("this checkpoint has no MTP block to draft with: generate without drafts")


def _fill(model: Transformer, reader: Reader, places: Mapping[str, Place], device: torch.device) -> None:
    w13: Form | None = None
    for parameter, group in groupby(places.values(), key=lambda place: place.parameter):
        own = list(group)
        weight, scale = _parameter(reader, own)
        form = weight.to(device), None if scale is None else scale.to(device)
        path, leaf = parameter.rpartition(".")[::2]
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            if leaf == "w13":
                w13 = form
            elif w13:
                module.store(*w13, *form)
        elif isinstance(module, Linear):
            module.store(*form)
        else:
            _set(module, leaf, form[0])
    for module in model.modules():
        if isinstance(module, Gate):
            module.load = torch.zeros(module.load.shape, device=device)


def _set(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _parameter(reader: Reader, places: list[Place]) -> Form:
    """One parameter of ours as it is stored, all its parts in one tensor."""
    first, dtype = places[0], reader.entries[places[0].name].dtype
    assert dtype is not None
    if dtype == torch.float8_e4m3fn and first.parts > 1 and first.shape[0] % WEIGHT_BLOCK:
        return _widened(reader, places), None
    weight = torch.empty(_stack(places, stored_shape(first.shape, dtype)), dtype=dtype)
    for place in places:
        reader.read(place.name, out=place.of(weight))
    if (shape := scale_shape(first.shape, dtype)) is None:
        return _checked(reader, first, weight), None
    scale = torch.empty(_stack(places, shape), dtype=reader.entries[first.scale].dtype)
    for place in places:
        read_scale(reader, place.scale, place.of(scale))
    return weight, scale


def _stack(places: list[Place], shape: tuple[int, ...]) -> tuple[int, ...]:
    first = places[0]
    if first.expert is None:
        return shape
    return (len(places) // first.parts, first.parts * shape[0], *shape[1:])


def _checked(reader: Reader, place: Place, tensor: Tensor) -> Tensor:
    if place.kind is Kind.TABLE:
        experts = _experts(reader, place)
        if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < experts:
            file = reader.entries[place.name].file
            raise CheckpointError(f"{file} has expert ids outside 0 to {experts - 1} in {place.name}: fetch it again")
    return tensor.float() if place.kind is Kind.FULL else tensor


def _experts(reader: Reader, place: Place) -> int:
    """How many experts the router beside a table knows."""
    return reader.entries[place.name.removesuffix("tid2eid") + "weight"].shape[0]


def _widened(reader: Reader, places: list[Place]) -> Tensor:
    """Experts whose FP8 blocks would straddle the border of w1 and w3, as exact float32 values."""
    out = torch.empty(_stack(places, places[0].shape))
    for place in places:
        place.of(out).copy_(dequantize(reader.read(place.name), read_scale(reader, place.scale)))
    return out
