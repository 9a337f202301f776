"""From logits to token ids: greedy, temperature, top-k and top-p, guided, reproducible by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fathom.api import Guide, Logprob, SamplingParams
from fathom.errors import SamplingError

Choice = tuple[int, Logprob | None]


class Sampler:
    """The choices of one request: its parameters, its guide and its own stream of random numbers, one number a token.

    The stream does not depend on what else is in the batch, so a seed gives the same answer alone and in company.
    """

    def __init__(self, params: SamplingParams, guide: Guide | None = None) -> None:
        self.params, self.guide = params, guide
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def choose(self, logits_V: Tensor) -> int:
        """One token id from float logits [V] on the CPU, by inverting the distribution at a uniform number.

        Raises SamplingError when the guide allows nothing.
        """
        logits_V = self._allowed(logits_V)
        token = int(logits_V.argmax()) if self.params.temperature == 0 else self._draw(logits_V)
        if self.guide:
            self.guide.accept(token)
        return token

    def _draw(self, logits_V: Tensor) -> int:
        p = self.params
        mass_V = probabilities(logits_V, p.temperature, p.top_p, p.top_k).cumsum(0)
        uniform = torch.rand((), generator=self._random, dtype=torch.float64)
        # The last mass stands for 1: rounding in the sum can then not point behind the last token.
        return int(torch.searchsorted(mass_V, uniform * mass_V[-1], right=True))

    def _allowed(self, logits_V: Tensor) -> Tensor:
        """The logits, those of tokens that the guide does not allow at -inf."""
        bits = self.guide.allowed() if self.guide else None
        if bits is None:
            return logits_V
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=logits_V.shape[0], bitorder="little")
        if not mask.any():
            raise SamplingError("no token fits what the answer must look like: change the schema or the tool choice")
        return logits_V.masked_fill(torch.from_numpy(mask) == 0, float("-inf"))


def sample(logits_RV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token id for each row of logits [R, V], chosen by its own sampler."""
    return [sampler.choose(row) for sampler, row in zip(samplers, logits_RV.float().cpu(), strict=True)]


def choose(logits_V: Tensor, sampler: Sampler) -> Choice:
    """A token for one row of float logits on the CPU, with its log probability if that was asked for."""
    token, wanted = sampler.choose(logits_V), sampler.params.logprobs
    return token, None if wanted is None else logprob(logits_V, token, wanted)


def logprob(logits_V: Tensor, token: int, alternatives: int) -> Logprob:
    """The model's own log probability of a token and of the likeliest ones; equal ones in the order of their ids."""
    log_V = torch.log_softmax(logits_V.double(), -1)
    order = log_V.sort(descending=True, stable=True).indices[:alternatives].tolist()
    return Logprob(float(log_V[token]), tuple((i, float(log_V[i])) for i in order))


def probabilities(logits_V: Tensor, temperature: float, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """softmax(logits / temperature) in float64, zero outside the k likeliest and outside the smallest set that then
    reaches top_p of what they hold.

    Equal probabilities are taken in the order of their ids. The result [V] sums to 1.
    """
    p_V = torch.softmax(logits_V.double() / temperature, -1)
    if top_p >= 1 and top_k is None:
        return p_V
    sorted_V, order_V = p_V.sort(descending=True, stable=True)
    if top_k is not None:
        sorted_V = sorted_V.where(torch.arange(sorted_V.shape[0]) < top_k, 0.0)
        sorted_V = sorted_V / sorted_V.sum()
    before_V = sorted_V.cumsum(0) - sorted_V
    kept_V = torch.zeros_like(p_V).scatter(0, order_V, sorted_V * (before_V < top_p))
    return kept_V / kept_V.sum()
