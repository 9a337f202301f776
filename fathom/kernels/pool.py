"""Gated pooling of token windows, the heart of the compressors. Reference 2.7."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(values: Tensor, gates: Tensor) -> Tensor:
    """sum_i softmax_i(gates) * values, per channel: [..., items, D] twice -> [..., D]. Gates of -inf drop an item."""
    return (gates.softmax(-2) * values).sum(-2)


def overlap(x: Tensor, first: bool, fill: float) -> Tensor:
    """Windows of the overlapping compressor: x [..., (B+1) * r, 2 * D] -> [..., B, 2 * r, D].

    Window b holds the low half of block b-1 and the high half of block b. `first` says that x begins with block 0
    itself (no earlier block: its place is `fill`), so x is [..., B * r, 2 * D].
    """
    ratio = 4
    low, high = x.unflatten(-2, (-1, ratio)).chunk(2, -1)
    if first:
        return _join(F.pad(low[..., :-1, :, :], (0, 0, 0, 0, 1, 0), value=fill), high)
    return _join(low[..., :-1, :, :], high[..., 1:, :, :])


def _join(low: Tensor, high: Tensor) -> Tensor:
    return torch.cat((low, high), -2)
