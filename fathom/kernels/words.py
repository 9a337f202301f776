"""FP4 weights in the order that the GPU kernels read: the same bytes, the bits of a 32-bit word in another order.

Stored, bits 4j..4j+3 of a word are the code of weight j of eight: three bits of magnitude and the sign above them. In a
word the magnitudes stay where they are; the sign of weight j moves to bit 8j + 7 for j < 4, to bit 8(j - 4) + 3 above.
Two byte permutations then look four magnitudes up each, and the signs stand where the looked-up bytes have theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE = 16
"""Experts rearranged at a time: what bounds the scratch."""
_MAGNITUDES = 0x77777777


def to_words(stored: Tensor) -> Tensor:
    """Stored FP4, int8 [E, N, K / 2], rearranged in its own memory: int32 [E, N, K / 8]."""
    words = stored.view(torch.int32)
    for part in words.split(_SLICE):
        signs = _spread(part & 0x8888) << 4 | _spread(part >> 16 & 0x8888)
        part.bitwise_and_(_MAGNITUDES).bitwise_or_(signs)
    return words


def from_words(words: Tensor) -> Tensor:
    """A copy of `words`, int32 [E, N, K / 8], in the stored form, int8 [E, N, K / 2]."""
    signs = _gather(words >> 4 & 0x08080808) | _gather(words & 0x08080808) << 16
    return (words & _MAGNITUDES | signs).view(torch.int8)


def _spread(signs: Tensor) -> Tensor:
    """Bits 3, 7, 11, 15 to bits 3, 11, 19, 27."""
    signs = (signs | signs << 8) & 0x00880088
    return (signs | signs << 4) & 0x08080808


def _gather(signs: Tensor) -> Tensor:
    """Back."""
    signs = (signs | signs >> 4) & 0x00880088
    return (signs | signs >> 8) & 0x8888
