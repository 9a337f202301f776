"""From a checkpoint's folder to a model, module by module: never more than one of them twice in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from fathom.checkpoint.folder import Checkpoint
from fathom.checkpoint.names import DTYPES, Entry, specs, with_drafter
from fathom.checkpoint.reader import Meter, Progress, Reader
from fathom.config import ModelConfig
from fathom.errors import CheckpointError
from fathom.kernels import dispatch
from fathom.kernels.quant import WEIGHT_BLOCK, to_e8m0
from fathom.model.hyper import HyperParameters
from fathom.model.layers import Linear, Numerics
from fathom.model.moe import Experts, Gate
from fathom.model.transformer import Transformer
from fathom.parallel.plan import cut_of, expert_share, rank_model
from fathom.parallel.plan import share as rank_share


def load_config(folder: str | Path) -> ModelConfig:
    """The folder's configuration, `dspark` set where its `mtp.*` are a drafter. Raises ConfigError, CheckpointError."""
    config = ModelConfig.load(folder)
    return with_drafter(config, Reader(folder).tensors)


def load_model(
    folder: str | Path,
    *,
    numerics: Numerics | None = None,
    device: str | torch.device = "cpu",
    dense: bool = True,
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Transformer:
    """A checkpoint in the published layout as a model, in evaluation mode, its parameters frozen.

    numerics: by default float32, with the activation quantisers on exactly if a weight is stored quantised.
    dense: widen FP8 and FP4 weights to the compute dtype, exactly, as `Transformer.densify` does; else they stay as is,
    but for the order of FP4 experts' bits and for power-of-two float32 scales where there are kernels.
    verify: also look for NaN and infinity in weights, not only in scales. share: of which rank of how many.
    Raises ConfigError and CheckpointError; names, shapes and dtypes are checked before any data is read.
    """
    checkpoint = Checkpoint(folder)
    numerics = numerics or Numerics(quantize=checkpoint.quantised)
    with torch.device("meta"):
        model = rank_model(checkpoint.config, numerics, share[1])
    loader = _Loader(checkpoint, torch.device(device), verify, Meter(share_bytes(checkpoint, 1), progress), share)
    groups = [(path, list(group)) for path, group in groupby(checkpoint.entries, key=lambda entry: entry.module)]
    for _, group in groups:
        loader.check(group)
    for path, group in groups:
        module = model.get_submodule(path)
        loader.fill(module, group)
        if dense:
            _widen(module, numerics.dtype)
        elif dispatch.on(torch.device(device)):
            _suit_kernels(module)
    _empty_buffers(model, torch.device(device))
    return model.eval()


def share_bytes(checkpoint: Checkpoint, tp: int) -> int:
    """Bytes of the tensors that one of `tp` ranks has, scales included, as stored."""
    tensors, total = checkpoint.reader.tensors, 0
    for entry in checkpoint.entries:
        stored = sum(tensors[name].size for name in {entry.name, entry.scale} if name in tensors)
        total += stored // tp if cut_of(entry.parameter) else stored
    return total


def check_drafting(config: ModelConfig) -> None:
    """Raises CheckpointError where a model of this configuration has no MTP block to draft with. Reference 3.4."""
    if config.dspark is not None:
        text = "this checkpoint drafts by DSpark, which is not implemented"
        raise CheckpointError(f"{text}: generate without drafts, or use the checkpoint that has an MTP block")
    if not config.num_nextn_predict_layers:
        raise CheckpointError("this checkpoint has no MTP block to draft with: generate without drafts")


class _Loader:
    """Fills modules from a checkpoint, with what one rank of several holds."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, verify: bool, meter: Meter, share: tuple[int, int]
    ) -> None:
        self.checkpoint, self.device, self.verify, self.meter = checkpoint, device, verify, meter
        self.share = share

    def check(self, group: Sequence[Entry]) -> None:
        """Whether the experts of a layer can be stacked as they are stored. Raises CheckpointError."""
        if group[0].kind == "expert":
            for name in ("w13", "w2"):
                self._common_form([entry for entry in group if entry.parameter.endswith(name)])

    def fill(self, module: nn.Module, group: Sequence[Entry]) -> None:
        """Put the tensors of `group`, which are all `module`'s own, into it."""
        if isinstance(module, Experts):
            module.store(*self._stack(group, "w13"), *self._stack(group, "w2"))
            return
        for entry in group:
            weight, scale = self._read(entry)
            if isinstance(module, Linear):
                module.store(weight, scale)
            else:
                _assign(module, entry.parameter.rpartition(".")[2], weight)

    def _read(self, entry: Entry) -> tuple[Tensor, Tensor | None]:
        weight, scale = self.checkpoint.read(entry, verify=self.verify)
        self.meter.add(weight.nbytes + (0 if scale is None else scale.nbytes))
        if entry.kind == "f32":
            weight = weight.float()
        if entry.kind == "table":
            weight = weight.long()
        return self._placed(entry, weight), None if scale is None else self._placed(entry, scale)

    def _placed(self, entry: Entry, tensor: Tensor) -> Tensor:
        cut = rank_share if entry.expert is None else expert_share
        return cut(entry.parameter, tensor, *self.share).to(self.device)

    def _stack(self, group: Sequence[Entry], name: str) -> tuple[Tensor, Tensor | None]:
        """The experts' matrices of one parameter in one tensor, and their scales in another."""
        parts = [entry for entry in group if entry.parameter.endswith(name)]
        form, stored = self._common_form(parts)
        halves = 2 if name == "w13" else 1
        whole = (torch.empty(spec.shape, dtype=torch.uint8, device="meta") for spec in specs(parts[0], form))
        shapes = [expert_share(parts[0].parameter, tensor, *self.share).shape for tensor in whole]
        stacks = [
            torch.empty(len(parts) // halves, halves * rows, columns, dtype=dtype, device=self.device)
            for (rows, columns), dtype in zip(shapes, stored, strict=True)
        ]
        for i, entry in enumerate(parts):
            for stack, tensor in zip(stacks, self._read(entry), strict=False):
                assert tensor is not None
                stack[i // halves].chunk(halves)[i % halves].copy_(tensor)
        return stacks[0], stacks[1] if len(stacks) > 1 else None

    def _common_form(self, parts: Sequence[Entry]) -> tuple[str, list[torch.dtype]]:
        """The form of all `parts` and the dtypes of weight and scales. Raises CheckpointError where they differ."""
        tensors = self.checkpoint.reader.tensors
        form = self.checkpoint.form(parts[0])
        names = [(e.name,) if form == "bf16" else (e.name, e.scale) for e in parts]
        dtypes = [[tensors[name].dtype for name in pair if name in tensors] for pair in names]
        for entry, found in zip(parts, dtypes, strict=True):
            if found != dtypes[0]:
                text = (
                    f"{entry.name} in {tensors[entry.name].file} is stored as {found}, the layer's first as {dtypes[0]}"
                )
                raise CheckpointError(f"{text}; bring all experts of a layer to one form with `fathom convert`")
        if form == "fp8" and parts[0].shape[0] % WEIGHT_BLOCK:
            text = f"{parts[0].name} has {parts[0].shape[0]} rows: FP8 experts need a multiple of {WEIGHT_BLOCK}"
            raise CheckpointError(f"{text}; use `fathom convert --experts bf16`")
        return form, [DTYPES[dtype] for dtype in dtypes[0]]


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    is_parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def _suit_kernels(module: nn.Module) -> None:
    """The same weights as kernels read them: FP4 in words, scales as exponents where float32 ones are powers of two."""
    if isinstance(module, Experts):
        module.store(module.w13.data, _exponents(module.w13_scale), module.w2.data, _exponents(module.w2_scale))
        module.place()
    elif isinstance(module, Linear):
        module.store(module.weight.data, _exponents(module.scale))


def _exponents(scale: Tensor | None) -> Tensor | None:
    if scale is None or scale.dtype != torch.float32 or (scale.view(torch.int32) & 0x807FFFFF).any():
        return scale
    return to_e8m0(scale.data)


def _widen(module: nn.Module, dtype: torch.dtype) -> None:
    """What `Transformer.densify` does, for one module, so that no more than one is in memory twice."""
    if isinstance(module, Linear | Experts | Gate):
        module.densify(dtype)
    elif isinstance(module, HyperParameters):
        module.pack_mixing()
    if dtype == torch.float32:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float() if parameter.dtype == torch.bfloat16 else parameter.data


def _empty_buffers(model: Transformer, device: torch.device) -> None:
    """Zero what is counted while training and not stored."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
