"""The mixing weights of manifold-constrained hyper-connections: sigmoids and 20 truncated Sinkhorn rounds. Reference 2.3."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fathom.kernels.linear import pad_rows


@lru_cache(maxsize=8)
def _summers(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0/1 matrices [n*n, n*n]: c @ rows gives every entry the sum of its row, c @ cols that of its column."""
    eye, ones = torch.eye(n, device=device), torch.ones(n, n, device=device)
    return torch.kron(eye, ones), torch.kron(ones, eye)


def sinkhorn(logits: Tensor, n: int, rounds: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices [T, n*n] (row-major) from `logits` [T, n*n], float32.

    A row softmax + eps, then column and row normalisations in turn, ending on columns: `rounds` of them, not more, not
    until convergence. Sums are products with 0/1 matrices: one call each, where a reduction over 4 values costs three.
    """
    rows, cols = _summers(n, logits.device)
    floor = torch.full((n * n,), eps, device=logits.device)
    c = (pad_rows(logits).unflatten(-1, (n, n)).softmax(-1) + eps).flatten(-2)
    c = c / torch.addmm(floor, c, cols)
    for _ in range(rounds - 1):
        c = c / torch.addmm(floor, c, rows)
        c = c / torch.addmm(floor, c, cols)
    return c[: logits.shape[0]]
