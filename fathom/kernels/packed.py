"""A float32 product that reads its weights as FP16, without rounding one of them. For inference on a CPU.

FP8, FP4 and BF16 weights are FP16 numbers up to one power of two, and FBGEMM, which comes with torch on x86, multiplies
float32 rows by FP16 weights in float32. A decode step reads half the bytes, and the sum of a row does not depend on how
many rows are beside it: what takes four padded rows elsewhere (see `linear.pad_rows`) takes one with AVX-512. With AVX2
FBGEMM sums one or two rows, also those left over from sixes, in another order than more: it is given up to two more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FEW_ROWS = 64
"""Up to so many rows are computed by one thread: sharing them out costs more."""
_MORE = 8
"""Rows up to which `_room` looks; three are enough for FBGEMM as it is."""


class Packed:
    """W [N, K], to be multiplied by rows [T, K] in float32."""

    def __init__(self, weight: Tensor, shift: int) -> None:
        self._weight, self._shift, self._back = weight, shift, 2.0**-shift
        self._tiles = torch.fbgemm_pack_gemm_matrix_fp16(self._shifted())

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], both float32."""
        rows = x.shape[0]
        room = _room(rows)
        out = self._product(x if room == rows else torch.nn.functional.pad(x, (0, 0, 0, room - rows)))[:rows]
        return out.mul_(self._back) if self._shift else out

    def _product(self, x: Tensor) -> Tensor:
        """Without the shift, and as FBGEMM sums so many rows."""
        if x.shape[0] > _FEW_ROWS and torch.get_num_threads() > 1:
            return torch.ops.quantized.linear_dynamic_fp16(x, self._shared)
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self._tiles, None)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Packed, (self._weight, self._shift)

    @cached_property
    def _shared(self) -> Any:
        """The same for the call that shares the rows out to all threads, with the same bits as result."""
        return torch.ops.quantized.linear_prepack_fp16(self._shifted(), None)

    def _shifted(self) -> Tensor:
        return self._weight.detach() * 2.0**self._shift


def pack(weight: Tensor) -> Packed | None:
    """`weight` [N, K] float32 in this form; None where its values do not fit exactly, or the machine lacks it."""
    if weight.device.type != "cpu" or not _available():
        return None
    for shift in (0, 15 - _exponent(weight)):
        shifted = weight.detach() * 2.0**shift
        if torch.equal(shifted.half().float(), shifted):
            return Packed(weight, shift)
    return None


class PackedSum:
    """W [N, K] in float32 as the sum of three packed matrices, to 2^-40 of its largest value."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        shift = 15 - _exponent(weight)
        rest, pieces = self._weight * 2.0**shift, []
        for _ in range(3):
            pieces.append(rest.half().float())
            rest = rest - pieces[-1]
        self._packed = Packed(torch.cat(pieces) * 2.0**-shift, shift)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], both float32."""
        pieces = self._packed(x).numpy().reshape(x.shape[0], 3, self._weight.shape[0])
        return torch.from_numpy(np.add.reduce(pieces, 1))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return PackedSum, (self._weight,)


def pack_sum(weight: Tensor) -> PackedSum | None:
    """A small float32 `weight` [N, K] in this form, where the machine has it: three times the work, but no padding."""
    return PackedSum(weight) if weight.device.type == "cpu" and _available() else None


def _exponent(weight: Tensor) -> int:
    return int(torch.frexp(weight.detach().abs().max()).exponent)


def pack_all(weights: Tensor) -> list[Packed] | None:
    """Each of `weights` [E, N, K], or None if one of them cannot be packed."""
    packed: list[Packed] = []
    for weight in weights:
        one = pack(weight)
        if one is None:
            return None
        packed.append(one)
    return packed


@lru_cache(maxsize=4096)
def _room(rows: int) -> int:
    """The least number of rows, not below `rows`, of which FBGEMM sums every one in the same order here: tried."""
    return next((room for room in range(rows, rows + _MORE) if _is_even(room)), rows)


def _is_even(rows: int) -> bool:
    """Whether a row's product among so many copies of it is the one among three, wherever it stands."""
    product, x = _probe()
    three = product._product(x.expand(3, -1).contiguous())[:1]
    return torch.equal(product._product(x.expand(rows, -1).contiguous()), three.expand(rows, -1))


@lru_cache(maxsize=1)
def _probe() -> tuple[Packed, Tensor]:
    """A product and a row whose sums differ in their last bits when they are taken in another order."""
    g = torch.Generator().manual_seed(0)
    return Packed(torch.randn(64, 256, generator=g).half().float(), 0), torch.randn(1, 256, generator=g)


@lru_cache(maxsize=1)
def _available() -> bool:
    """Whether this torch can do it. The first call of each function warns that it may go away one day: not news."""
    one = torch.ones(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(Packed(one, 0)(one) == one)
        except (AttributeError, RuntimeError):
            return False
