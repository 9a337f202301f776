"""RMS normalisation. Reference 2.4."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fathom.kernels.dispatch import beside


@beside("norm_triton")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS normalisation over the last axis of x, times `weight` if given: in float32, rounded once to x's dtype."""
    return normalised(x.float(), eps, None if weight is None else weight.float()).to(x.dtype)


def normalised(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times `weight` [D] if there is one; float32 [..., D].

    Without gradients on a CPU in numpy, whose calls on a decode step's few rows cost half of torch's; for any number of
    rows, because the two round differently.
    """
    if x.is_cuda or torch.is_grad_enabled():
        y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return y if weight is None else y * weight
    values = x.numpy()
    mean = np.add.reduce(np.square(values), -1, keepdims=True) / np.float32(values.shape[-1])
    out = values / np.sqrt(mean + np.float32(eps))
    return torch.from_numpy(out if weight is None else np.multiply(out, weight.numpy(), out))
