"""Small parts that every room of the model uses: numerics, a linear layer of any stored dtype, RMSNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from fathom.kernels import quant
from fathom.kernels.linear import Part, grouped_linear, linear
from fathom.kernels.norm import rms_norm
from fathom.kernels.packed import Packed, pack, pack_all


@dataclass(frozen=True)
class Numerics:
    """Two independent switches: the compute dtype, and whether activations are quantised. Reference 4."""

    dtype: torch.dtype = torch.float32
    quantize: bool = False

    def operand(self, x: Tensor) -> Tensor:
        """The input of an FP8 or FP4 linear: e4m3 with one scale per 128."""
        return quant.fp8_sim(x, quant.WEIGHT_BLOCK) if self.quantize else x

    def row(self, x: Tensor, rope_dims: int) -> Tensor:
        """A cache row [..., C] as it is stored: e4m3 per 64 in front, BF16 in the last `rope_dims`."""
        if not self.quantize:
            return x
        front, rope = x[..., :-rope_dims], x[..., -rope_dims:]
        return torch.cat((quant.fp8_sim(front, 64), quant.bf16_sim(rope)), -1)

    def index(self, x: Tensor) -> Tensor:
        """An index query or key as it is multiplied: Hadamard, then FP4. The rotation alone would cancel."""
        return quant.fp4_sim(quant.hadamard(x)) if self.quantize else x


class Packable(nn.Module):
    """A module with copies of its weights for faster inference, once it was densified to float32.

    packed: of its own; joined: of its own and those of the linear that `both` computes with it.
    """

    packed: Any = None
    joined: Any = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.packed = self.joined = None  # the weights are about to change their dtype or device
        return super()._apply(fn, recurse)


class Linear(Packable):
    """y = W x without bias; W [out, in] in float, or as stored in FP8 with `scale` [ceil(out/128), ceil(in/128)]."""

    scale: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("scale", None)

    def store(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Replace the weight by a stored form of it, which no longer takes gradients."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.packed = self.joined = None

    def densify(self, dtype: torch.dtype) -> None:
        """Replace an FP8 weight by its exact values in `dtype`, any by float32, packed where that is possible."""
        if self.scale is not None:
            self.store(quant.dequantize(self.weight, self.scale).to(dtype))
        if dtype == torch.float32:
            self.store(self.weight.detach().float())
            self.packed = self._pack()

    def _pack(self) -> Packed | list[Packed] | None:
        return pack(self.weight)

    def part(self, quantised: bool = False) -> Part:
        """As one of several linears of the same input; quantised: it reads that input rounded to e4m3."""
        return Part(self.packed or self.weight, self.scale, quantised)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out] in the dtype of x."""
        return linear(x, self.packed or self.weight, self.scale)


def both(x: Tensor, first: Linear, second: Linear, dtype: torch.dtype | None = None) -> Tensor:
    """Two linears of the same input, their outputs end to end: one product where they are packed or on a GPU."""
    part = joined(first, second)
    if part:
        return linear(x, part.weight, part.scale, dtype)
    x = x if dtype is None else x.to(dtype)
    return torch.cat((first(x), second(x)), -1)


def joined(first: Linear, second: Linear) -> Part | None:
    """Two linears of the same input as one, kept with the first; None where they stay two."""
    if first.joined is None:
        first.joined = _joined(first, second) or False
    return Part(*first.joined) if first.joined else None


def _joined(first: Linear, second: Linear) -> tuple[Packed | Tensor | None, ...] | None:
    """Both weights as one, and its scale if it has one; None where they stay two."""
    if first.packed and second.packed:
        whole = pack(torch.cat((first.weight, second.weight)))
        return None if whole is None else (whole,)
    frozen = not (first.weight.requires_grad or second.weight.requires_grad)
    if not (first.weight.is_cuda and frozen and first.weight.dtype == second.weight.dtype):
        return None
    if first.scale is None or second.scale is None:
        return (_end_to_end(first.weight, second.weight),)
    return _end_to_end(first.weight, second.weight), _end_to_end(first.scale, second.scale)


def _end_to_end(first: nn.Parameter, second: nn.Parameter) -> Tensor:
    """Two tensors in one, of which they become parts, so that nothing is in memory twice."""
    with torch.inference_mode(False):
        bytes_of = [p.detach().contiguous().view(torch.uint8) for p in (first, second)]
        whole = torch.cat(bytes_of).view(first.dtype)
        first.data, second.data = whole.split((first.shape[0], second.shape[0]))
    return whole


class GroupedLinear(Linear):
    """`groups` linears side by side: the rows of W are cut into groups, each with its own slice of the input."""

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__(in_features, out_features)
        self.groups = groups

    def _pack(self) -> list[Packed] | None:
        return pack_all(self.weight.unflatten(0, (self.groups, -1)))

    def forward(self, x: Tensor) -> Tensor:
        """[T, ...], groups * in values a row, -> [T, groups * out / groups], flattened as W's rows are."""
        return grouped_linear(x, self.groups, self.packed or self.weight, self.scale)


class RMSNorm(nn.Module):
    """y = weight * x / rms(x), in float32, rounded once at the end. Reference 2.4."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def rms(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight over the last axis."""
    return rms_norm(x, None, eps)
