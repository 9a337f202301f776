"""One token for each row of logits by its share: temperature, the k likeliest, the nucleus, a uniform number.

All sums are of integers, so that they are exact: no order of adding, and no neighbour, changes a row's token. A token
lies some steps of 2^-19 below the row's maximum (logits over temperature), and its weight depends on that number of
steps alone: exp(-steps / 2^19), in units of 2^-44. Tokens of one number of steps are equals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.kernels.dispatch import beside

STEPS = 1 << 19
"""Steps of a logit: float32 is no finer above 16."""
LAST = (1 << 24) - 1
"""This many steps and more are one: 32 below the maximum there is no weight left."""
UNIT = 1 << 44
"""The weight of the likeliest token. A row's sum fits an int64 for half a million tokens."""


def wish(temperature: float, top_k: int | None, top_p: float, uniform: float) -> tuple[float, float, float, float]:
    """A row's column of `draw`'s wishes: steps of one logit, k (0: all), p, a number in [0, 1). Temperature above 0."""
    return min(STEPS / max(temperature, 1e-300), 1e30), float(min(top_k or 0, 1 << 31)), top_p, uniform


@beside("sample_triton")
def draw(logits: Tensor, wishes: Tensor, cut: bool, counted: bool) -> Tensor:
    """Token ids int64 [S] of logits float32 [S, V] by wishes float64 [4, S] (see `wish`).

    The tokens stand likeliest first, equals in the order of their ids; all by their ids where a row cuts none off. Of
    the k likeliest the fewest that reach p of their sum are kept; the uniform number is a point in what they weigh.
    cut: whether any row has k or p; counted: whether any has k (what no row wants need not be computed).
    """
    scale, k, p, uniform = wishes.unsqueeze(-1)
    below = steps(logits, scale)
    weights = weight(below)
    order = below.argsort(stable=True, dim=-1)
    order = torch.where((k == 0) & (p >= 1), torch.arange(logits.shape[1], device=logits.device), order)
    sums = weights.gather(-1, order).cumsum(-1)
    whole = torch.where(k == 0, logits.shape[1], k).long().clamp(max=logits.shape[1])
    total = sums.gather(-1, whole - 1)
    limit = (p * total.double()).ceil().long().minimum(total).clamp(min=1)
    kept = sums.gather(-1, _place(sums, limit - 1))
    point = (uniform * kept.double()).long().minimum(kept - 1)
    return order.gather(-1, _place(sums, point)).squeeze(-1)


def steps(logits: Tensor, scale: Tensor) -> Tensor:
    """How far below its row's maximum each token lies, int32 [S, V]; scale: steps of one logit [S, 1]."""
    below = (logits.amax(-1, keepdim=True) - logits) * scale.float()
    return torch.where(below < LAST, below, LAST).int()


def weight(below: Tensor) -> Tensor:
    """The weight int64 of a token so many steps below the maximum."""
    return ((below.double() * (-1 / STEPS)).exp() * UNIT).long()


def log_total(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) of rows [S, V], float64 [S, 1], by an exact sum of weights like those above."""
    peak = logits.amax(-1, keepdim=True).double()
    sums = ((logits.double() - peak).exp() * UNIT).long().sum(-1, keepdim=True)
    return peak + (sums.double() / UNIT).log()


def _place(sums: Tensor, point: Tensor) -> Tensor:
    """The first place [S, 1] whose running sum exceeds the point."""
    return torch.searchsorted(sums, point, right=True).clamp(max=sums.shape[1] - 1)
