"""What is minimised: next-token and next-but-one cross-entropy on weighted tokens; and how experts are kept busy.

Shapes: T tokens of a packed batch, V vocabulary. Reference training 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.model.moe import Gate
from fathom.model.transformer import Transformer
from fathom.train.data import Packed


class Losses(NamedTuple):
    """main and mtp: weighted means; tokens [R] the cross-entropy of each trained token (no gradient)."""

    main: Tensor
    mtp: Tensor | None
    tokens: Tensor


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(w * l) / sum(w), and 0 when nothing weighs."""
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)


def losses(model: Transformer, pack: Packed, mtp: bool) -> Losses:
    """Both losses of one packed batch. Logits are computed only where the loss has weight."""
    streams = model(pack.tokens, pack.batch)
    rows = pack.weights.nonzero().squeeze(-1)
    each = F.cross_entropy(model.logits(streams[rows]), pack.targets[rows], reduction="none")
    main = weighted_mean(each, pack.weights[rows])
    return Losses(main, _mtp(model, streams, pack) if mtp else None, each.detach())


def _mtp(model: Transformer, streams: Tensor, pack: Packed) -> Tensor:
    """The row at t sees the token at t + 1 and predicts t + 2, inside one document."""
    drafted = model.draft(streams, pack.targets, pack.batch)
    rows = pack.weights_after.nonzero().squeeze(-1)
    each = F.cross_entropy(model.draft_logits(drafted[rows]), pack.targets_after[rows], reduction="none")
    return weighted_mean(each, pack.weights_after[rows])


def gates(model: Transformer) -> list[Gate]:
    """Every router of the model, the prediction block's last."""
    return [m for m in model.modules() if isinstance(m, Gate)]


@torch.no_grad()
def balance(model: Transformer, speed: float) -> float:
    """Move each scored router's bias against the load of its experts and forget the load.

    Returns the largest load of an expert over the mean, over all routers. No gradient is involved: an expert above the
    mean becomes less likely to be chosen, its weight when chosen stays.
    """
    worst = 0.0
    for gate in gates(model):
        load = gate.load
        if load.sum() > 0:
            worst = max(worst, float(load.max() / load.mean()))
            if not gate.by_hash:
                gate.bias += speed * torch.sign(load.mean() - load)
        load.zero_()
    return worst
