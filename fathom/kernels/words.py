"""FP4 weights in the order that the GPU kernels read: the same bytes, the bits of each in another order.

A stored byte is two codes of three bits of magnitude and the sign above them: sign and magnitude of weight 1, then of
weight 0. Here it is sign 1, sign 0, magnitude 1, magnitude 0. So the even weights of a word, moved by one bit and
masked, are numbers in e5m2 (and in FP16's high byte), 2^14 times too small; the odd ones need an operation more.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE = 16
"""Experts rearranged at a time: what bounds the scratch."""


def to_words(stored: Tensor) -> Tensor:
    """Stored FP4, int8 [E, N, K / 2], rearranged in its own memory: int32 [E, N, K / 8]."""
    for part in stored.view(torch.uint8).split(_SLICE):
        moved = part >> 1 & 0x38 | part << 3 & 0x40
        part.bitwise_and_(0x87).bitwise_or_(moved)
    return stored.view(torch.int32)


def from_words(words: Tensor) -> Tensor:
    """A copy of `words`, int32 [E, N, K / 8], in the stored form, int8 [E, N, K / 2]."""
    some = words.view(torch.uint8)
    return (some & 0x87 | some << 1 & 0x70 | some >> 3 & 0x08).view(torch.int8)
