"""Sampling on the device that has the logits: nothing but ids, and log probabilities where wanted, comes to the host.

All rows' results come in one copy, and nothing before it waits for the device: what the host adds (parameters, random
numbers, guides' bits) goes there from pinned memory, and no shape depends on a value. Sums over the vocabulary are of
integers (`kernels.sample`), so that no row's result depends on the others. Shapes as in `sampler`; L rows that want log
probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fathom.api import Logprob
from fathom.kernels.sample import draw, log_total, wish

if TYPE_CHECKING:
    from fathom.engine.sampler import Sampler


@torch.inference_mode()
def pick(
    logits_SV: Tensor, samplers: Sequence[Sampler], masks: Mapping[int, NDArray[np.uint8]]
) -> tuple[list[int], dict[int, Logprob]]:
    """A token for each row of float32 logits [S, V], and by row the log probabilities that are wanted.

    masks: by row, a bit for each id that may be chosen, lowest first. Runs on any device.
    """
    wanted = {n: s.params.logprobs for n, s in enumerate(samplers) if s.params.logprobs is not None}
    most = min(max(wanted.values(), default=0), logits_SV.shape[1])
    tokens_S = _tokens(_masked(logits_SV, masks), samplers)
    parts = [tokens_S, *_logprobs(logits_SV, tokens_S, list(wanted), most)] if wanted else [tokens_S]
    found = torch.cat([part.double().flatten() for part in parts]).cpu().numpy()  # float64 holds ids exactly
    rest = found[len(samplers) :].reshape(1 + 2 * most, len(wanted))
    tops = zip(wanted.items(), rest[0], rest[1 : 1 + most].T, rest[1 + most :].T, strict=True)
    logprobs = {n: Logprob(float(own), _pairs(ids[:k], logs[:k])) for (n, k), own, ids, logs in tops}
    return found[: len(samplers)].astype(int).tolist(), logprobs


def _masked(logits_SV: Tensor, masks: Mapping[int, NDArray[np.uint8]]) -> Tensor:
    """The logits, those that a mask does not allow at -inf."""
    if not masks:
        return logits_SV
    device, size = logits_SV.device, logits_SV.shape[1]
    rows, bytes_GB = _sent(list(masks), device), _sent(np.stack(list(masks.values())), device)
    bits_GV = (bytes_GB.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=device) & 1).flatten(1)[:, :size]
    masked_GV = logits_SV.index_select(0, rows).masked_fill(bits_GV == 0, float("-inf"))
    return logits_SV.index_copy(0, rows, masked_GV)


def _tokens(logits_SV: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The likeliest token of each row (of equals the lowest id), or a drawn one where the temperature is above 0."""
    warm = [(n, s) for n, s in enumerate(samplers) if s.params.temperature]
    if not warm:
        return logits_SV.argmax(-1)
    asked = [s.params for _, s in warm]
    wishes = [wish(s.params.temperature, s.params.top_k, s.params.top_p, s.random.random()) for _, s in warm]
    wishes_4W = _sent(np.array(wishes).T.copy(), logits_SV.device)
    counted = any(p.top_k for p in asked)
    cut = counted or any(p.top_p < 1 for p in asked)
    if len(warm) == len(samplers):
        return draw(logits_SV, wishes_4W, cut, counted)
    rows = _sent([n for n, _ in warm], logits_SV.device)
    return logits_SV.argmax(-1).index_copy(0, rows, draw(logits_SV.index_select(0, rows), wishes_4W, cut, counted))


def _logprobs(logits_SV: Tensor, tokens_S: Tensor, rows: Sequence[int], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' log probabilities [1, L]; the `most` likeliest tokens and theirs [most, L]; the model's own."""
    at = _sent(rows, logits_SV.device)
    logits_LV = logits_SV.index_select(0, at)
    total_L1, ids_LK = log_total(logits_LV), _likeliest(logits_LV, most)
    own_L1 = logits_LV.gather(1, tokens_S.index_select(0, at).unsqueeze(1)).double() - total_L1
    return own_L1.T, ids_LK.T, (logits_LV.gather(1, ids_LK).double() - total_L1).T


def _likeliest(logits_LV: Tensor, k: int) -> Tensor:
    """The ids of the k largest, equal ones in order: largest of integers in which the id follows the value."""
    bits = (logits_LV + 0.0).view(torch.int32)  # + 0: both zeros are one value
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(logits_LV.shape[1], device=logits_LV.device)
    return ((order << 32) - ids).topk(k, -1).indices


def _sent(values: ArrayLike, device: torch.device) -> Tensor:
    """The values on the device, from pinned memory: with any other the host would wait for what runs there."""
    tensor = torch.from_numpy(np.asarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _pairs(ids: NDArray[np.float64], logs: NDArray[np.float64]) -> tuple[tuple[int, float], ...]:
    return tuple((int(i), float(log)) for i, log in zip(ids, logs, strict=True))
