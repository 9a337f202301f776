"""The mixing weights of manifold-constrained hyper-connections: sigmoids and truncated Sinkhorn rounds. Reference 2.3.

A decode step needs two sets of them a layer for one or a few tokens, so the number of calls is the whole cost. Without
gradients on a CPU everything runs in numpy, whose calls on small arrays cost a third of torch's, and a sum plus epsilon
is one product with a 0/1 matrix.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fathom.kernels.elementwise import sigmoid

Array = npt.NDArray[np.float32]

_TOGETHER = 4


def mixing(m: Tensor, scale: Tensor, base: Tensor, n: int, rounds: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """From the projected streams m [T, (2 + n) n] and the gate's scale [3] and base [(2 + n) n], all float32:

    pre [T, n] = sigmoid + eps, post [T, n] = 2 sigmoid, comb [T, n, n] nearly doubly stochastic.
    """
    if m.is_cuda or torch.is_grad_enabled():
        return _mixing_torch(m, scale, base, n, rounds, eps)
    logits = m.numpy() * scale.float().numpy()[_gate_of(n)] + base.float().numpy()
    gates = 1 / (1 + np.exp(-logits[:, : 2 * n]))
    comb = _sinkhorn_numpy(logits[:, 2 * n :], n, rounds, np.float32(eps))
    pre, post = gates[:, :n] + np.float32(eps), 2 * gates[:, n:]
    return torch.from_numpy(pre), torch.from_numpy(post), torch.from_numpy(comb).view(-1, n, n)


def _mixing_torch(
    m: Tensor, scale: Tensor, base: Tensor, n: int, rounds: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    parts, bases = m.split((n, n, n * n), -1), base.split((n, n, n * n))
    pre, post, comb = (part * scale[i] + b for i, (part, b) in enumerate(zip(parts, bases, strict=True)))
    return sigmoid(pre) + eps, 2 * sigmoid(post), sinkhorn(comb.unflatten(-1, (n, n)), rounds, eps)


def sinkhorn(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """Nearly doubly stochastic matrices from `logits` [..., n, n], float32.

    A row softmax + eps, then column and row normalisations in turn, ending on columns: `rounds` of them, not more, not
    until convergence.
    """
    c = logits.softmax(-1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


@lru_cache(maxsize=8)
def _gate_of(n: int) -> npt.NDArray[np.intp]:
    """Which of the three scales each mixing weight has: pre, post, comb."""
    return np.repeat(np.arange(3), (n, n, n * n))


@lru_cache(maxsize=8)
def _summers(n: int, eps: np.float32) -> tuple[Array, Array]:
    """[n*n + 1, n*n + 1]: a flat matrix followed by a 1, times this, gives every entry its row's (column's) sum + eps,
    and the 1 again, so that matrices and sums divide as whole arrays."""
    eye, ones = np.eye(n, dtype=np.float32), np.ones((n, n), np.float32)
    sums = np.zeros((2, n * n + 1, n * n + 1), np.float32)
    sums[:, -1], sums[:, -1, -1] = eps, 1.0
    sums[0, :-1, :-1], sums[1, :-1, :-1] = np.kron(eye, ones), np.kron(ones, eye)
    return sums[0], sums[1]


def _sinkhorn_numpy(logits: Array, n: int, rounds: int, eps: np.float32) -> Array:
    tokens = logits.shape[0]
    # A product for every four tokens, not one for all: what BLAS makes of a row can depend on its place among more.
    c = np.ones((-(-tokens // _TOGETHER), _TOGETHER, n * n + 1), np.float32)
    flat = c.reshape(-1, n * n + 1)
    square = logits.reshape(tokens, n, n)
    square = np.exp(square - square.max(-1, keepdims=True))
    square = square / square.sum(-1, keepdims=True) + eps
    flat[:tokens, :-1] = square.reshape(tokens, n * n)
    rows, cols = _summers(n, eps)
    sums = np.empty_like(c)
    for summer in (cols, *(rows, cols) * (rounds - 1)):
        if len(c) == 1:
            c[0].dot(summer, sums[0])  # the same product by a shorter way
        else:
            np.matmul(c, summer, sums)
        np.divide(c, sums, c)
    return np.ascontiguousarray(flat[:tokens, :-1])
