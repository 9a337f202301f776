"""RMS normalisation without a weight. Reference 2.4."""

from __future__ import annotations

from torch import Tensor


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32 [..., D]."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
