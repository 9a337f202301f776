"""Manifold-constrained hyper-connections: n residual streams, mixed before and after each sublayer. Reference 2.3.

Shapes: T tokens, n streams, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels.elementwise import sigmoid
from fathom.kernels.linear import linear
from fathom.kernels.norm import normalised
from fathom.kernels.sinkhorn import mixing


def _projected(x_TnD: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The dynamic part of every mixing weight: fn times the RMS-normalised streams, float32 [T, rows of fn]."""
    flat = x_TnD.flatten(1).float()
    return linear(normalised(flat, eps), fn)


def hc_pre(
    x_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input [T, D], and what `hc_post` needs: post [T, n] and comb [T, n, n]."""
    n, eps = config.hc_mult, config.hc_eps
    m = _projected(x_TnD, fn, config.rms_norm_eps)
    pre, post, comb = mixing(m, scale, base, n, config.hc_sinkhorn_iters, eps)
    return _weighted(pre, x_TnD), post, comb


def hc_post(y_TD: Tensor, x_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    """X'_j = post_j * y + sum_i comb[i, j] X_i: the sum runs over the first index of comb."""
    out = post_Tn.unsqueeze(-1) * y_TD.float().unsqueeze(1)
    for i, row_Tn in enumerate(comb_Tnn.unbind(1)):
        out = torch.addcmul(out, row_Tn.unsqueeze(-1), x_TnD[:, i : i + 1].float())
    return out.to(x_TnD.dtype)


def _weighted(pre_Tn: Tensor, x_TnD: Tensor) -> Tensor:
    return (pre_Tn.unsqueeze(-1) * x_TnD.float()).sum(1).to(x_TnD.dtype)


class HyperParameters(nn.Module):
    """Declares `hc_<name>_{fn,base,scale}` on a module, all float32: the names are the checkpoint's."""

    def declare(self, name: str, config: ModelConfig, weights: int, scales: int) -> None:
        """`weights` mixing weights computed from all streams, with `scales` gating factors."""
        self.register_parameter(f"{name}_fn", nn.Parameter(torch.empty(weights, config.hc_mult * config.hidden_size)))
        self.register_parameter(f"{name}_base", nn.Parameter(torch.zeros(weights)))
        self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(scales)))


def hc_head(x_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, config: ModelConfig) -> Tensor:
    """The streams folded into one [T, D] for the output head: no Sinkhorn, no factor 2. Reference 2.11."""
    m = _projected(x_TnD, fn, config.rms_norm_eps)
    return _weighted(sigmoid(m * scale + base) + config.hc_eps, x_TnD)
