"""Manifold-constrained hyper-connections: n residual streams, mixed before and after each sublayer. Reference 2.3.

Shapes: T tokens, n streams, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels import streams
from fathom.kernels.mailbox import Unsummed
from fathom.kernels.packed import PackedSum, pack_sum
from fathom.model.layers import Packable, RMSNorm


def hc_pre(
    x_TnD: Tensor, fn: Tensor | PackedSum, scale: Tensor, base: Tensor, norm: RMSNorm, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's normalised input [T, D], and what `hc_post` needs: post [T, n] and comb [T, n, n]."""
    rounds = config.hc_sinkhorn_iters
    return streams.before(x_TnD, fn, scale, base, norm.weight, config.rms_norm_eps, config.hc_eps, rounds)


def hc_post(
    y_TD: Tensor | Unsummed, x_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor, following: Tensor | PackedSum | None
) -> Tensor:
    """The streams after the sublayer's output y: each takes its part of y and of all streams.

    following: fn of the hyper-connection that comes next, if that is known.
    """
    return streams.after(y_TD, x_TnD, post_Tn, comb_Tnn, following)


class HyperParameters(Packable):
    """Declares `hc_<name>_{fn,base,scale}` on a module, all float32: the names are the checkpoint's."""

    def declare(self, name: str, config: ModelConfig, weights: int, scales: int) -> None:
        """`weights` mixing weights computed from all streams, with `scales` gating factors."""
        self.register_parameter(f"{name}_fn", nn.Parameter(torch.empty(weights, config.hc_mult * config.hidden_size)))
        self.register_parameter(f"{name}_base", nn.Parameter(torch.zeros(weights)))
        self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(scales)))

    def pack_mixing(self) -> None:
        """Pack the module's own mixing weights, which are float32 whatever the model computes in."""
        own = self.named_parameters(recurse=False)
        self.packed = {name: pack_sum(parameter) for name, parameter in own if name.endswith("_fn")}

    def mixing(self, name: str) -> tuple[Tensor | PackedSum, Tensor, Tensor]:
        """fn, scale and base of the hyper-connection `name`."""
        fn = self.packed and self.packed[f"{name}_fn"]
        return fn or getattr(self, f"{name}_fn"), getattr(self, f"{name}_scale"), getattr(self, f"{name}_base")


def hc_head(
    x_TnD: Tensor, fn: Tensor | PackedSum, scale: Tensor, base: Tensor, norm: RMSNorm, config: ModelConfig
) -> Tensor:
    """The streams folded into one and normalised [T, D], for the output head: no Sinkhorn, no factor 2. 2.11."""
    return streams.folded(x_TnD, fn, scale, base, norm.weight, config.rms_norm_eps, config.hc_eps)
