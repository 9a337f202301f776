"""The lightning indexer's scores and its exact, deterministic top-k. Reference 2.8."""

from __future__ import annotations

import torch
from torch import Tensor

# Scratch of one tile of scores before the heads are summed: 2^24 float32 = 64 MiB.
_SCRATCH_ELEMENTS = 1 << 24


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """sum_h w[t,h] * relu(q[t,h] . keys[b]), float32 [..., T, N].

    q [..., T, H, D], weights [..., T, H], keys [..., N, D]. N is cut into tiles, so that the scores of all heads take
    bounded scratch.
    """
    step = max(128, _SCRATCH_ELEMENTS // q.shape[:-1].numel())
    tiles = [_tile(q, weights, keys[..., i : i + step, :]) for i in range(0, keys.shape[-2], step)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, -1)


def _tile(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    dots = (q.flatten(-3, -2) @ keys.mT).relu().unflatten(-2, q.shape[-3:-1])
    return (weights.float().unsqueeze(-2) @ dots.float()).squeeze(-2)


def select_topk(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row of `scores` [..., N] (-inf: not to be chosen) as a mask; ties go to lower columns.

    Every row marks min(k, number of finite scores) columns.
    """
    finite = scores > float("-inf")
    if k >= scores.shape[-1]:
        return finite
    bar = scores.topk(k, -1).values[..., -1:]
    above = scores > bar
    room = k - above.sum(-1, keepdim=True)
    level = scores == bar
    return (above | (level & (level.cumsum(-1) <= room))) & finite
