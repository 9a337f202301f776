"""From logits to token ids: greedy, temperature, top-k and top-p, guided, reproducible by seed.

Shapes: S rows of a step, one a request; V vocabulary. What costs most is done for all rows at once; no row's result
depends on the others. Logits on the CPU are handled here, in float64; those of another device stay there
(`device_sampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom.api import Guide, Logprob, SamplingParams
from fathom.engine import device_sampler
from fathom.errors import SamplingError

Choice: TypeAlias = tuple[int, Logprob | None]
Floats: TypeAlias = NDArray[np.float64]
Masks: TypeAlias = Mapping[int, NDArray[np.uint8]]
"""By row, a bit for each id, as a guide gives them."""


class Sampler:
    """The choices of one request: its parameters, its guide and its own stream of random numbers, one number a token.

    The stream does not depend on what else is in the batch, so a seed gives the same answer alone and in company.
    """

    def __init__(self, params: SamplingParams, guide: Guide | None = None) -> None:
        self.params, self.guide = params, guide
        self.random = Random(params.seed)

    def allowed(self, size: int) -> NDArray[np.uint8] | None:
        """The guide's bits of the ids below `size`; None: it allows all. SamplingError if it allows none."""
        bits = self.guide.allowed() if self.guide else None
        if bits is None:
            return None
        allowed = np.frombuffer(bits[: -(-size // 8)].ljust(-(-size // 8), b"\0"), np.uint8).copy()
        allowed[-1] &= 0xFF >> -size % 8
        if not allowed.any():
            raise SamplingError("no token fits what the answer must look like: change the schema or the tool choice")
        return allowed

    def draw(self, shares_V: Floats) -> int:
        """A token by its share: the distribution, cut to what top-k and top-p keep, inverted at a uniform number."""
        ids, kept = nucleus(shares_V, self.params.top_k, self.params.top_p)
        mass = kept.cumsum()
        # Rounding must not point at or behind the end: what is found there may have no share at all.
        point = min(self.random.random() * mass[-1], np.nextafter(mass[-1], 0))
        return int(ids[np.searchsorted(mass, point, side="right")])


Pick: TypeAlias = Callable[[Tensor, Sequence[Sampler], Masks], tuple[list[int], dict[int, Logprob]]]


def choose(logits_SV: Tensor, samplers: Sequence[Sampler], pick: Pick | None = None) -> list[Choice | Exception]:
    """A token for each row of float32 logits [S, V], chosen by the row's own sampler and told to its guide, with its
    log probability if that is wanted; or what went wrong. Guide and parameters are its request's own affair.

    pick: how; None: as is best where the logits are.
    """
    errors: dict[int, Exception] = {}
    masks = _masks(samplers, logits_SV.shape[1], errors)
    on_host = partial(pick_on_host, errors=errors)
    pick = pick or (on_host if logits_SV.device.type == "cpu" else device_sampler.pick)
    tokens, logprobs = pick(logits_SV, samplers, masks)
    for n, (sampler, token) in enumerate(zip(samplers, tokens, strict=True)):
        try:
            if sampler.guide and n not in errors:
                sampler.guide.accept(token)
        except Exception as error:
            errors[n] = error
    return [errors.get(n) or (token, logprobs.get(n)) for n, token in enumerate(tokens)]


def pick_on_host(
    logits_SV: Tensor, samplers: Sequence[Sampler], masks: Masks, errors: dict[int, Exception]
) -> tuple[list[int], dict[int, Logprob]]:
    """The rows' tokens, and by row the log probabilities that are wanted; logits [S, V] on the CPU. What goes wrong
    with a row is added to `errors`."""
    tokens = _tokens(_masked(logits_SV, masks), samplers, errors)
    return tokens, _logprobs(logits_SV, samplers, tokens)


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


def _masks(samplers: Sequence[Sampler], size: int, errors: dict[int, Exception]) -> Masks:
    """What the guides allow, of those that do not allow everything."""
    masks = {}
    for n, sampler in enumerate(samplers):
        try:
            bits = sampler.allowed(size)
        except Exception as error:
            errors[n] = error
        else:
            masks.update({} if bits is None else {n: bits})
    return masks


def _masked(logits_SV: Tensor, masks: Masks) -> Tensor:
    """The logits, those of tokens that a guide does not allow at -inf."""
    if not masks:
        return logits_SV
    rows, size = list(masks), logits_SV.shape[1]
    allowed = np.unpackbits(np.stack(list(masks.values())), axis=1, count=size, bitorder="little")
    out_SV = logits_SV.clone()
    out_SV[rows] = out_SV[rows].masked_fill(torch.from_numpy(allowed) == 0, float("-inf"))
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
