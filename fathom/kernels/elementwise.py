"""Sigmoid, SiLU and softplus whose value does not depend on where an element stands in its tensor.

The library's own versions compute the last few elements of a tensor with scalar code that rounds differently from the
vector code, so a token's result would change with the number of its neighbours. `exp` and `log1p` do not have this
flaw. Training takes the library's versions: their gradients are fused.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def _training(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return x.sigmoid() if _training(x) else x.neg().exp_().add_(1.0).reciprocal_()


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return F.silu(x) if _training(x) else sigmoid(x).mul_(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    if _training(x):
        return F.softplus(x)
    if x.is_cuda:
        return x.abs().neg_().exp_().log1p_().add_(x.clamp_min(0.0))
    y = x.detach().numpy()
    return torch.from_numpy(np.log1p(np.exp(-np.abs(y))) + np.maximum(y, np.float32(0)))
