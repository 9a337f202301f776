"""The indexer's choice on Hopper: the launcher of index.cu. Reference 2.8.

The same choice as that of `index_triton`, which has the contract and calls this where it can. It is one launch: up to
8192 scores a block has a token, above a cluster of eight. That depends on the longest sequence that is allowed, the
choice does not.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fathom.kernels.cuda import compiles, kernel, pointer
from fathom.kernels.decode import Tokens

_THREADS, _ALONE, _CLUSTER, _EACH = 1024, 8, 8, 32
"""Threads of a block, scores that a thread has at most in a block that is alone, blocks of a cluster, scores that a
thread has at most in one: its registers hold no more."""


def has(scores: Tensor, k: int) -> bool:
    """Whether this device and these shapes have the kernel. Its loads are of four scores."""
    number = scores.shape[1]
    fits = k > 0 and 0 < number <= _THREADS * _CLUSTER * _EACH and number % 4 == 0 and scores.data_ptr() % 16 == 0
    return fits and compiles(scores.device, "index.cu")


def choose(scores: Tensor, tokens: Tokens, table: Tensor, per: int, k: int) -> Tensor:
    """`index_triton.choose`."""
    count, number = scores.shape
    out = torch.empty((count, k), dtype=torch.int32, device=scores.device)
    cluster, each = _shares(number)
    pointers = map(pointer, (scores, out, tokens.slots, tokens.positions, table))
    numbers = [ctypes.c_int(n) for n in (table.shape[1], number, k, per)]
    run = kernel("index.cu", "choose", scores.device, EACH=each, CLUSTER=cluster)
    run((cluster, count), _THREADS, scores.device, *pointers, *numbers)
    return out


def _shares(number: int) -> tuple[int, int]:
    """Blocks of a token, and a power of two of scores for each of their threads."""
    cluster = 1 if number <= _ALONE * _THREADS else _CLUSTER
    each = 1 << (-(-number // (cluster * _THREADS)) - 1).bit_length()
    return cluster, each if cluster == 1 else max(4, each)
