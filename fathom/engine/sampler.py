"""From logits to token ids: greedy, temperature and top-p, reproducible by seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.api import SamplingParams


class Sampler:
    """The choices of one request: its parameters and its own stream of random numbers, one number a token.

    The stream does not depend on what else is in the batch, so a seed gives the same answer alone and in company.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def choose(self, logits_V: Tensor) -> int:
        """One token id from float logits [V] on the CPU, by inverting the distribution at a uniform number."""
        if self.params.temperature == 0:
            return int(logits_V.argmax())
        mass_V = probabilities(logits_V, self.params.temperature, self.params.top_p).cumsum(0)
        uniform = torch.rand((), generator=self._random, dtype=torch.float64)
        # The last mass stands for 1: rounding in the sum can then not point behind the last token.
        return int(torch.searchsorted(mass_V, uniform * mass_V[-1], right=True))


def sample(logits_RV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token id for each row of logits [R, V], chosen by its own sampler."""
    return [sampler.choose(row) for sampler, row in zip(samplers, logits_RV.float().cpu(), strict=True)]


def probabilities(logits_V: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """softmax(logits / temperature) in float64, zero outside the smallest set of likeliest tokens that reaches top_p.

    Equal probabilities are taken in the order of their ids. The result [V] sums to 1.
    """
    p_V = torch.softmax(logits_V.double() / temperature, -1)
    if top_p >= 1:
        return p_V
    sorted_V, order_V = p_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    kept_V = torch.zeros_like(p_V).scatter(0, order_V, sorted_V * (before_V < top_p))
    return kept_V / kept_V.sum()
