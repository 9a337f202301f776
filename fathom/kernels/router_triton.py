"""Routing on a GPU, one program a token. Reference 2.10; the torch reference is `router`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import options, power_of_two


def route(logits: Tensor, bias: Tensor | None, table: Tensor | None, tokens: Tensor, k: int, factor: float) -> Any:
    """Experts int32 [T, k] and their shares float32 [T, k], which sum to `factor`.

    logits float32 [T, E]; by score: the k largest sqrt(softplus) + bias [E], equal ones to the lower id, largest first;
    by hash: table int64 [V, k] at `tokens` [T].
    """
    if logits.dtype != torch.float32 or not logits.shape[0]:
        return NotImplemented
    rows, experts = logits.shape
    chosen = torch.empty((rows, k), dtype=torch.int32, device=logits.device)
    shares = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    by_hash = table is not None
    _route[(rows,)](
        logits, table if by_hash else bias, tokens, chosen, shares, experts, power_of_two(experts), k, power_of_two(k),
        factor, by_hash, **options(logits, 1, early=False),
    )  # fmt: skip
    return chosen, shares


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 < e <= 1: what 1 + e rounds away is put back by the ratio."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _route(
    logits, given, tokens, chosen, shares, E, EB: tl.constexpr, TOPK: tl.constexpr, KB: tl.constexpr, FACTOR,
    BY_HASH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    rk = tl.arange(0, KB)
    r = tl.arange(0, EB)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits + t * E + r, mask=r < E, other=0.0)
    scores = tl.sqrt_rn(_log1p(tl.exp(-tl.abs(x))) + tl.maximum(x, 0.0))
    ids = tl.zeros((KB,), tl.int32)
    if BY_HASH:
        token = tl.load(tokens + t).to(tl.int64)
        ids = tl.load(given + token * TOPK + rk, mask=rk < TOPK, other=0).to(tl.int32)
    else:
        left = tl.where(r < E, scores + tl.load(given + r, mask=r < E, other=0.0), float("-inf"))
        for i in tl.static_range(TOPK):
            best = tl.max(left, 0)
            where = tl.minimum(tl.min(tl.where(left == best, r, EB), 0), E - 1)  # nothing equals NaN
            ids = tl.where(rk == i, where, ids)
            left = tl.where(r == where, float("-inf"), left)
    own = tl.sum(tl.where(r[None, :] == ids[:, None], scores[None, :], 0.0), 1)
    own = tl.where(rk < TOPK, own, 0.0)
    tl.store(chosen + t * TOPK + rk, ids, mask=rk < TOPK)
    tl.store(shares + t * TOPK + rk, own / tl.sum(own, 0) * FACTOR, mask=rk < TOPK)
