"""RMS normalisation without a weight. Reference 2.4."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, float32 [..., D].

    Without gradients on a CPU in numpy, whose calls on a decode step's few rows cost half of torch's; for any number of
    rows, because the two round differently.
    """
    if x.is_cuda or x.requires_grad:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = x.numpy()
    mean = np.square(y).sum(-1, keepdims=True) / np.float32(y.shape[-1])
    return torch.from_numpy(y / np.sqrt(mean + np.float32(eps)))
