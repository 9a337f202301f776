"""Hyper-connections: what stands before a sublayer, after it, and before the head. Reference 2.3 and 2.11.

Shapes: T tokens, n streams, D hidden size. On a GPU `before`, `after` and `folded` are kernels (`streams_cuda`; where
that lacks a shape, `streams_triton`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fathom.kernels.dispatch import beside
from fathom.kernels.elementwise import sigmoid
from fathom.kernels.linear import linear
from fathom.kernels.mailbox import Unsummed, whole
from fathom.kernels.norm import normalised, rms_norm
from fathom.kernels.packed import PackedSum
from fathom.kernels.sinkhorn import mixing


@beside("streams_cuda")
def before(
    x: Tensor,
    fn: Tensor | PackedSum,
    scale: Tensor,
    base: Tensor,
    weight: Tensor,
    eps: float,
    hc_eps: float,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's normalised input [T, D] in the dtype of x, and what `after` needs: post [T, n], comb [T, n, n].

    x [T, n, D]; fn [(2 + n) n, n D], scale [3] and base [(2 + n) n] float32; weight [D] and eps of the sublayer's norm.
    """
    pre, post, comb = mixing(_projected(x, fn, eps), scale, base, x.shape[1], rounds, hc_eps)
    return rms_norm(fold(pre, x.float()).to(x.dtype), weight, eps), post, comb


@beside("streams_cuda")
def after(
    y: Tensor | Unsummed, x: Tensor, post: Tensor, comb: Tensor, following: Tensor | PackedSum | None = None
) -> Tensor:
    """The streams after the sublayer's output y [T, D]: each takes its part of y and of all streams x [T, n, D].

    following: the mixing weights that the result will be projected with, which a kernel may do at once.
    """
    return spread(whole(y).float(), x.float(), post, comb).to(x.dtype)


@beside("streams_cuda")
def folded(
    x: Tensor, fn: Tensor | PackedSum, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float
) -> Tensor:
    """The streams folded into one and normalised [T, D], for the head: no Sinkhorn, no factor 2."""
    pre = sigmoid(_projected(x, fn, eps) * scale + base) + hc_eps
    return rms_norm(fold(pre, x.float()).to(x.dtype), weight, eps)


def _projected(x: Tensor, fn: Tensor | PackedSum, eps: float) -> Tensor:
    """The dynamic part of every mixing weight: fn times the RMS-normalised streams, float32 [T, rows of fn]."""
    return linear(normalised(x.flatten(1).float(), eps), fn)


# Without gradients on a CPU in numpy: one small product a token, the same for any number of tokens, where torch takes a
# call for every stream.


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
