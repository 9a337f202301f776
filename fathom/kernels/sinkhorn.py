"""The mixing weights of manifold-constrained hyper-connections: 20 truncated Sinkhorn rounds. Reference 2.3.

A decode step runs two of these a layer on a few 4 x 4 matrices, so the number of calls is the whole cost. Without
gradients on a CPU the rounds run in numpy, whose calls on small arrays cost a third of torch's, and a sum is a product
with a 0/1 matrix.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SMALL_ROWS = 8


@lru_cache(maxsize=8)
def _summers(n: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """0/1 matrices [n*n, n*n]: c @ rows gives every entry the sum of its row, c @ cols that of its column."""
    eye, ones = np.eye(n, dtype=np.float32), np.ones((n, n), np.float32)
    return np.kron(eye, ones), np.kron(ones, eye)


def sinkhorn(logits: Tensor, n: int, rounds: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices [T, n*n] (row-major) from `logits` [T, n*n], float32.

    A row softmax + eps, then column and row normalisations in turn, ending on columns: `rounds` of them, not more, not
    until convergence.
    """
    c = logits.unflatten(-1, (n, n)).softmax(-1) + eps
    if logits.is_cuda or torch.is_grad_enabled():
        return _rounds(c, rounds, eps).flatten(-2)
    return torch.from_numpy(_rounds_in_place(c.flatten(-2).numpy(), n, rounds, eps))


def _rounds(c: Tensor, rounds: int, eps: float) -> Tensor:
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


def _rounds_in_place(c: npt.NDArray[np.float32], n: int, rounds: int, eps: float) -> npt.NDArray[np.float32]:
    rows, cols = _summers(n)
    tokens = c.shape[0]
    if tokens < _SMALL_ROWS:  # one reduction order for any number of rows, see linear.pad_rows
        c = np.concatenate((c, np.ones((_SMALL_ROWS - tokens, n * n), np.float32)))
    sums, floor = np.empty_like(c), np.float32(eps)
    for summer in (cols, *(rows, cols) * (rounds - 1)):
        np.dot(c, summer, out=sums)
        np.add(sums, floor, out=sums)
        np.divide(c, sums, out=c)
    return c[:tokens]
