"""From logits to token ids: greedy, temperature, top-k and top-p, guided, reproducible by seed.

Shapes: S rows of a step, one a request; V vocabulary. What costs most is done for all rows at once; no row's result
depends on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom.api import Guide, Logprob, SamplingParams
from fathom.errors import SamplingError

Choice: TypeAlias = tuple[int, Logprob | None]
Floats: TypeAlias = NDArray[np.float64]


class Sampler:
    """The choices of one request: its parameters, its guide and its own stream of random numbers, one number a token.

    The stream does not depend on what else is in the batch, so a seed gives the same answer alone and in company.
    """

    def __init__(self, params: SamplingParams, guide: Guide | None = None) -> None:
        self.params, self.guide = params, guide
        self.random = Random(params.seed)

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits, those of tokens that the guide does not allow at -inf. SamplingError if it allows none."""
        bits = self.guide.allowed() if self.guide else None
        if bits is None:
            return logits_V
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=logits_V.shape[0], bitorder="little")
        if not allowed.any():
            raise SamplingError("no token fits what the answer must look like: change the schema or the tool choice")
        return logits_V.masked_fill(torch.from_numpy(allowed) == 0, float("-inf"))

    def draw(self, shares_V: Floats) -> int:
        """A token by its share: the distribution, cut to what top-k and top-p keep, inverted at a uniform number."""
        ids, kept = nucleus(shares_V, self.params.top_k, self.params.top_p)
        mass = kept.cumsum()
        # Rounding must not point at or behind the end: what is found there may have no share at all.
        point = min(self.random.random() * mass[-1], np.nextafter(mass[-1], 0))
        return int(ids[np.searchsorted(mass, point, side="right")])


def choose(logits_SV: Tensor, samplers: Sequence[Sampler]) -> list[Choice | Exception]:
    """A token for each row of float32 logits [S, V] on the CPU, chosen by the row's own sampler and told to its guide,
    with its log probability if that is wanted; or what went wrong. Guide and parameters are its request's own affair.
    """
    errors: dict[int, Exception] = {}
    tokens = _tokens(_guided(logits_SV, samplers, errors), samplers, errors)
    for n, (sampler, token) in enumerate(zip(samplers, tokens, strict=True)):
        try:
            if sampler.guide and n not in errors:
                sampler.guide.accept(token)
        except Exception as error:
            errors[n] = error
    logprobs = _logprobs(logits_SV, samplers, tokens)
    return [errors.get(n) or (token, logprobs.get(n)) for n, token in enumerate(tokens)]


def nucleus(shares_V: Floats, top_k: int | None, top_p: float) -> tuple[NDArray[np.int64], Floats]:
    """The ids that are kept, and their shares: of the `top_k` likeliest the fewest that reach `top_p` of their sum.

    Likeliest first, equal ones in the order of their ids; all, in that order alone, when nothing is cut.
    """
    if top_k is None and top_p >= 1:
        return np.arange(shares_V.size), shares_V
    ids = _largest(shares_V, top_k) if top_k else _above(shares_V, (1 - top_p) / shares_V.size)
    shares = shares_V[ids]
    before = shares.cumsum() - shares
    count = np.searchsorted(before, top_p * (shares.sum() if top_k else 1.0), side="left")
    return ids[: max(1, count)], shares[: max(1, count)]


def logprob(log_V: Floats, token: int, alternatives: int) -> Logprob:
    """The log probability of a token and of the likeliest ones; equal ones in the order of their ids."""
    best = _largest(log_V, alternatives).tolist() if alternatives else ()
    return Logprob(float(log_V[token]), tuple((i, float(log_V[i])) for i in best))


def _guided(logits_SV: Tensor, samplers: Sequence[Sampler], errors: dict[int, Exception]) -> Tensor:
    """The logits with every guide's mask on them."""
    if not any(sampler.guide for sampler in samplers):
        return logits_SV
    out_SV = logits_SV.clone()
    for n, sampler in enumerate(samplers):
        try:
            out_SV[n] = sampler.mask(out_SV[n])
        except Exception as error:
            errors[n] = error
    return out_SV


def _tokens(logits_SV: Tensor, samplers: Sequence[Sampler], errors: dict[int, Exception]) -> list[int]:
    """The likeliest token of each row, or a drawn one where the temperature is above 0."""
    tokens: list[int] = logits_SV.argmax(-1).tolist()
    rows = [n for n, sampler in enumerate(samplers) if sampler.params.temperature]
    if rows:
        heat = torch.tensor([[samplers[n].params.temperature] for n in rows], dtype=torch.float64)
        wide = logits_SV[rows].double()
        # Below the maximum, however small the temperature: an infinite logit would leave no share that is a number.
        shares = torch.softmax((wide - wide.amax(-1, keepdim=True)) / heat, -1).numpy()
        for n, shares_V in zip(rows, shares, strict=True):
            try:
                tokens[n] = samplers[n].draw(shares_V)
            except Exception as error:
                errors.setdefault(n, error)
    return tokens


def _logprobs(logits_SV: Tensor, samplers: Sequence[Sampler], tokens: Sequence[int]) -> dict[int, Logprob]:
    """By row, for those that want one: the model's own, before guide, temperature and cuts."""
    wanted = {n: s.params.logprobs for n, s in enumerate(samplers) if s.params.logprobs is not None}
    if not wanted:
        return {}
    logs = torch.log_softmax(logits_SV[list(wanted)].double(), -1).numpy()
    return {n: logprob(log_V, tokens[n], k) for (n, k), log_V in zip(wanted.items(), logs, strict=True)}


def _largest(values: Floats, k: int) -> NDArray[np.int64]:
    """Where the k largest values are, the largest first, equal ones in order."""
    k = min(k, values.size)
    return _above(values, np.partition(values, values.size - k)[values.size - k])[:k]


def _above(values: Floats, least: float) -> NDArray[np.int64]:
    """Where values are at least `least`, the largest first. Few are, so that the vocabulary is not sorted."""
    ids = np.flatnonzero(values >= least)
    return ids[np.argsort(-values[ids], kind="stable")]
