"""y = x W^T for a weight in any stored form. Reference 4: products are exact in float32, sums are float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.kernels.dispatch import beside
from fathom.kernels.norm import rms_norm
from fathom.kernels.packed import Packed, PackedSum
from fathom.kernels.quant import WEIGHT_BLOCK, dequantize, fp8_sim

# BLAS picks another reduction order below four rows and for odd remainders. Padding the rows makes the result of a row
# independent of its neighbours, which is what "alone or in a batch, the same bits" needs.
_ROW_MULTIPLE = 4


def pad_rows(x: Tensor) -> Tensor:
    """`x` [T, K] with copies of its last row added until the row count selects the one reduction order.

    Only for inference in float32 on a CPU; the BF16 product has one order for any number of rows.
    """
    missing = -x.shape[0] % _ROW_MULTIPLE
    if not missing or x.dtype != torch.float32 or x.is_cuda or (torch.is_grad_enabled() and x.requires_grad):
        return x
    return torch.cat((x, x[-1:].expand(missing, -1))) if x.shape[0] > 1 else x.expand(_ROW_MULTIPLE, -1)


@beside("linear_triton")
def linear(
    x: Tensor, weight: Tensor | Packed | PackedSum, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """x [T, K] times weight [N, K] (float, packed, FP8, or FP4 [N, K/2]; these two with `scale`) -> [T, N].

    dtype: of the operands and of the result, x's own by default.
    """
    x = x if dtype is None else x.to(dtype)
    if isinstance(weight, Packed | PackedSum):
        return weight(x)
    if scale is not None:
        weight = dequantize(weight, scale).to(x.dtype)
    elif weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    padded = pad_rows(x)
    out = F.linear(padded, weight)
    return out if padded is x else out[: x.shape[0]]


@beside("linear_triton")
def grouped_linear(x: Tensor, groups: int, weight: Tensor | list[Packed], scale: Tensor | None = None) -> Tensor:
    """x [T, ...] of G * K values a row times weight [G * N, K], group g of it with rows g*N..(g+1)*N -> [T, G * N]."""
    x = x.flatten(1).unflatten(1, (groups, -1))
    if isinstance(weight, list):
        return torch.cat([packed(part) for packed, part in zip(weight, x.unbind(1), strict=True)], -1)
    if scale is not None:
        weight = dequantize(weight, scale)
    parts = weight.to(x.dtype).unflatten(0, (groups, -1))
    out = torch.bmm(pad_rows(x.flatten(1)).unflatten(1, x.shape[1:]).transpose(0, 1), parts.transpose(1, 2))
    return out.transpose(0, 1).flatten(1)[: x.shape[0]]


@dataclass(frozen=True)
class Part:
    """One of several linears of the same input: weight [N, K] in any stored form, and its scale.

    quantised: whether it reads the input rounded to e4m3 per 128; dtype: of the result, the input's by default.
    """

    weight: Tensor | Packed | PackedSum
    scale: Tensor | None = None
    quantised: bool = False
    dtype: torch.dtype | None = None


@beside("linear_triton")
def linears(x: Tensor, parts: Sequence[Part], norm: Tensor | None = None, eps: float = 0.0) -> list[Tensor]:
    """Several linears of x [T, K], RMS-normalised first where there is a `norm` [K]: one [T, N] for each part."""
    x = x if norm is None else rms_norm(x, norm, eps)
    rounded = fp8_sim(x, WEIGHT_BLOCK) if any(part.quantised for part in parts) else x
    return [linear(rounded if part.quantised else x, part.weight, part.scale, part.dtype) for part in parts]
