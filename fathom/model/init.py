"""Fresh weights for a model that is to be trained. Reference training 6."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fathom.model.layers import Linear, RMSNorm
from fathom.model.moe import Experts, Gate
from fathom.model.transformer import Transformer

HYPER_GATING = 0.01
"""The factor on the token-dependent part of the mixing weights: at 1 the connections are noise from the first step."""

HYPER_DIAGONAL = 4.0
"""The static logit of a stream's own path: streams begin nearly unmixed, as in a plain residual network."""


def init_weights(model: Transformer, seed: int, std: float = 0.02) -> None:
    """Fill every parameter and table of `model` in place, reproducibly by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _init_module(module, std, generator)
        for name, parameter in model.named_parameters():
            if ".hc_" in f".{name}":
                _init_hyper(name.rsplit(".", 1)[-1], parameter, model.config.hc_mult, std, generator)


def _init_module(module: nn.Module, std: float, generator: torch.Generator) -> None:
    if isinstance(module, Linear | nn.Embedding):
        module.weight.normal_(0.0, std, generator=generator)
    elif isinstance(module, Experts):
        module.w13.normal_(0.0, std, generator=generator)
        module.w2.normal_(0.0, std, generator=generator)
    elif isinstance(module, RMSNorm):
        module.weight.fill_(1.0)
    elif isinstance(module, Gate):
        module.weight.normal_(0.0, std, generator=generator)
        if module.by_hash:
            module.tid2eid.copy_(_balanced_table(module.tid2eid, module.config.n_routed_experts, generator))


def _init_hyper(name: str, parameter: Tensor, n: int, std: float, generator: torch.Generator) -> None:
    """Start as a plain residual network: the input is the mean of the streams, each keeps its own path."""
    if name.endswith("fn"):
        parameter.normal_(0.0, std, generator=generator)
    elif name.endswith("scale"):
        parameter.fill_(HYPER_GATING)
    else:
        parameter.zero_()
        parameter[:n] = -math.log(n - 1)
        if parameter.numel() > n:
            parameter[2 * n :].view(n, n).fill_diagonal_(HYPER_DIAGONAL)


def _balanced_table(table: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """Distinct experts for each token id, every expert equally often up to rounding."""
    rows, k = table.shape
    order = torch.randperm(rows, generator=generator)
    start = torch.empty(rows, dtype=torch.int64)
    start[order] = torch.arange(rows) % experts
    shuffle = torch.randperm(experts, generator=generator)
    return shuffle[(start.unsqueeze(1) + torch.arange(k)) % experts]
