"""The two products between residual streams and their mixing weights. Reference 2.3.

Shapes: T tokens, n streams, D hidden size; all float32. Without gradients on a CPU in numpy: one small product a token,
the same for any number of tokens, where torch takes a call for every stream.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def fold(weights_Tn: Tensor, x_TnD: Tensor) -> Tensor:
    """sum_i weights_i X_i: [T, D]."""
    if x_TnD.is_cuda or torch.is_grad_enabled():
        return (weights_Tn.unsqueeze(-1) * x_TnD).sum(1)
    return torch.from_numpy(np.matmul(weights_Tn.numpy()[:, None], x_TnD.numpy())[:, 0])


def spread(y_TD: Tensor, x_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    """X'_j = post_j y + sum_i comb[i, j] X_i: [T, n, D]. The sum runs over the first index of comb."""
    if x_TnD.is_cuda or torch.is_grad_enabled():
        out = post_Tn.unsqueeze(-1) * y_TD.unsqueeze(1)
        for i, row_Tn in enumerate(comb_Tnn.unbind(1)):
            out = torch.addcmul(out, row_Tn.unsqueeze(-1), x_TnD[:, i : i + 1])
        return out
    mixed = np.matmul(comb_Tnn.numpy().swapaxes(1, 2), x_TnD.numpy())
    mixed += post_Tn.numpy()[:, :, None] * y_TD.numpy()[:, None]
    return torch.from_numpy(mixed)
