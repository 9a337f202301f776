"""Stored form of cache rows: the bytes that lower tiers keep. Reference 5.2.

A row that the model keeps with its quantisers on lies on the grid of its stored format already, so packing loses
nothing: the scale is found again from the values (at most one step finer, where they allow it) and every value, its
sign included, comes back bit for bit.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from fathom.config import ModelConfig
from fathom.kernels import quant
from fathom.model.layers import Numerics

_BLOCK = 64
"""Values under one scale of a row (reference 4, fp8sim64)."""


class Packing(Protocol):
    """Rows of `width` values as `size` bytes each."""

    width: int
    size: int

    def pack(self, rows: Tensor) -> Tensor:
        """[n, width] -> uint8 [n, size]."""

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 [n, size] -> [n, width] in the dtype of the rows, on the same device."""


class Raw:
    """Rows as they are."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype, self.size = width, dtype, width * dtype.itemsize

    def pack(self, rows: Tensor) -> Tensor:
        """[n, width] -> uint8 [n, size]."""
        return rows.contiguous().view(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 [n, size] -> [n, width]."""
        return packed.contiguous().view(self.dtype)


class KeyValueRow:
    """e4m3 in front, BF16 in the last `rope` values, then a scale byte for each 64, padded to 8."""

    def __init__(self, width: int, rope: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self.front, self.blocks = width - rope, -(-(width - rope) // _BLOCK)
        self.size = self.front + 2 * rope + -(-self.blocks // 8) * 8

    def pack(self, rows: Tensor) -> Tensor:
        """[n, width] -> uint8 [n, size]."""
        front = pad(rows[:, : self.front].float(), (0, self.blocks * _BLOCK - self.front)).unflatten(1, (-1, _BLOCK))
        scale = quant.ceil_pow2(front.abs().amax(-1).clamp_min(quant.FP8_FLOOR) / quant.FP8_MAX)
        codes = (front / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)[:, : self.front]
        rope = rows[:, self.front :].to(torch.bfloat16).contiguous().view(torch.uint8)
        scales = pad(quant.to_e8m0(scale).view(torch.uint8), (0, -self.blocks % 8))
        return torch.cat((codes, rope, scales), 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 [n, size] -> [n, width]."""
        rope_end = self.size - -(-self.blocks // 8) * 8
        values = packed[:, : self.front].contiguous().view(torch.float8_e4m3fn).float()
        scale = packed[:, rope_end : rope_end + self.blocks].contiguous().view(torch.float8_e8m0fnu)
        front = values * quant.from_scale(scale).repeat_interleave(_BLOCK, 1)[:, : self.front]
        rope = packed[:, self.front : rope_end].contiguous().view(torch.bfloat16)
        return torch.cat((front.to(self.dtype), rope.to(self.dtype)), 1)


class IndexKey:
    """FP4, two values a byte, then a scale byte for each 32."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self.size = width // 2 + width // quant.FP4_BLOCK

    def pack(self, rows: Tensor) -> Tensor:
        """[n, width] -> uint8 [n, size]."""
        codes, scale = quant.quantize_fp4(rows)
        return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 [n, size] -> [n, width]."""
        codes, scale = packed[:, : self.width // 2], packed[:, self.width // 2 :]
        scales = scale.contiguous().view(torch.float8_e8m0fnu)
        return quant.dequantize_fp4(codes.contiguous().view(torch.int8), scales).to(self.dtype)


def key_value_rows(config: ModelConfig, numerics: Numerics) -> Packing:
    """How window rows and compressed entries are stored."""
    if not numerics.quantize:
        return Raw(config.head_dim, numerics.dtype)
    return KeyValueRow(config.head_dim, config.qk_rope_head_dim, numerics.dtype)


def index_keys(config: ModelConfig, numerics: Numerics) -> Packing:
    """How the indexer's keys are stored."""
    if not numerics.quantize:
        return Raw(config.index_head_dim, numerics.dtype)
    return IndexKey(config.index_head_dim, numerics.dtype)
