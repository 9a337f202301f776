"""Rows and index keys as a device holds them: bytes in one plane, scales in another. Reference 4 and 5.2.

A row is e4m3 in front and BF16 in its last (rope) dims, with one exponent byte for 64 values, padded to 8 bytes: 576
and 8 for 512 values. Data and scales lie apart, so that both are aligned. The values of an index key lie on the FP4
grid and are stored in one of two ways: packed (two a byte, an exponent byte for 32), or as e4m3 with a float32 scale,
which is faster to read. The scales of a key may spread over 2^14 before that rounds its smallest values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.kernels import quant

BLOCK = 64
"""Values under one scale of a row."""
SCALES = 8
"""Scale bytes are padded to multiples of this."""
_TINY = 2.0**-100
"""Stands for the largest magnitude of a key that is zero."""


def row_sizes(width: int, rope: int) -> tuple[int, int]:
    """Bytes of a row of `width` values, `rope` of them BF16: data, scales."""
    front = width - rope
    return front + 2 * rope, -(-front // (BLOCK * SCALES)) * SCALES


@dataclass(frozen=True)
class Rows:
    """Rows of values, keys and values in one: data uint8 [N, n, front + 2 rope], scales uint8 [N, n, S]."""

    data: Tensor
    scales: Tensor
    rope: int

    @staticmethod
    def empty(groups: int, per: int, width: int, rope: int, device: torch.device) -> Rows:
        """Zeros: N groups of `per` rows of `width` values."""
        data, scales = (torch.zeros(groups, per, n, dtype=torch.uint8, device=device) for n in row_sizes(width, rope))
        return Rows(data, scales, rope)

    @property
    def planes(self) -> tuple[Tensor, Tensor]:
        """Data and scales."""
        return self.data, self.scales

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.data.shape[2] - self.rope

    @property
    def per(self) -> int:
        """Rows of a group."""
        return self.data.shape[1]

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """BF16 [..., C] -> data and scales of one row each, rounded as `fp8_sim` over 64 does."""
        front = x[..., : -self.rope].float().unflatten(-1, (-1, BLOCK))
        scale = quant.ceil_pow2(front.abs().amax(-1).clamp_min(quant.FP8_FLOOR) / quant.FP8_MAX)
        codes = (front / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)
        rope = x[..., -self.rope :].to(torch.bfloat16).contiguous().view(torch.uint8)
        room = self.scales.shape[2] - scale.shape[-1]
        exponents = torch.nn.functional.pad(quant.to_e8m0(scale).view(torch.uint8), (0, room))
        return torch.cat((codes, rope), -1), exponents

    def read(self, index: Tensor) -> Tensor:
        """Rows by number, as if groups were laid end to end: BF16 [..., C]."""
        data, scales = self.data.flatten(0, 1)[index], self.scales.flatten(0, 1)[index]
        front = self.width - self.rope
        scale = quant.from_scale(scales[..., : front // BLOCK].contiguous().view(torch.float8_e8m0fnu))
        values = data[..., :front].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, BLOCK))
        rope = data[..., front:].contiguous().view(torch.bfloat16)
        return torch.cat(((values * scale.unsqueeze(-1)).flatten(-2).to(torch.bfloat16), rope), -1)


@dataclass(frozen=True)
class Keys:
    """Index keys: packed, data uint8 [N, n, d / 2], scales uint8 [N, n, d / 32]; else [N, n, d], float32 [N, n, 1]."""

    data: Tensor
    scales: Tensor

    @staticmethod
    def empty(groups: int, per: int, width: int, packed: bool, device: torch.device) -> Keys:
        """Zeros: N groups of `per` keys of `width` values, packed or as e4m3."""
        size, kind = (width // 2, torch.uint8) if packed else (width, torch.float32)
        data = torch.zeros(groups, per, size, dtype=torch.uint8, device=device)
        return Keys(data, torch.zeros(groups, per, width // 32 if packed else 1, dtype=kind, device=device))

    @property
    def planes(self) -> tuple[Tensor, Tensor]:
        """Data and scales."""
        return self.data, self.scales

    @property
    def packed(self) -> bool:
        """Whether two values share a byte."""
        return self.scales.dtype == torch.uint8

    @property
    def width(self) -> int:
        """Values of a key."""
        return self.data.shape[2] * (2 if self.packed else 1)

    @property
    def per(self) -> int:
        """Keys of a group."""
        return self.data.shape[1]

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed (Hadamard) BF16 [..., d] -> data and scales, rounded as `fp4_sim` does."""
        if self.packed:
            codes, scale = quant.quantize_fp4(x)
            return codes.view(torch.uint8), scale.view(torch.uint8)
        values = quant.fp4_sim(x).float()
        scale = quant.ceil_pow2(values.abs().amax(-1, keepdim=True).clamp_min(_TINY) / quant.FP8_MAX)
        return (values / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale

    def read(self, index: Tensor) -> Tensor:
        """Keys by number, as if groups were laid end to end: BF16 [..., d]."""
        data, scales = self.data.flatten(0, 1)[index], self.scales.flatten(0, 1)[index]
        if self.packed:
            return quant.dequantize_fp4(data.view(torch.int8), scales.view(torch.float8_e8m0fnu)).to(torch.bfloat16)
        return (data.view(torch.float8_e4m3fn).float() * scales).to(torch.bfloat16)
