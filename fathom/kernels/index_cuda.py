"""The indexer's choice on Hopper: the launcher of index.cu. Reference 2.8.

The same choice as that of `index_triton`, which has the contract and calls this where it can: rounds of a search cost a
barrier each, and Triton takes three.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fathom.kernels.cuda import compiles, kernel
from fathom.kernels.decode import Tokens

CHUNK = 8192
"""Scores that a block chooses among."""
_MOST, _THREADS = 32768, 1024


def has(scores: Tensor, k: int) -> bool:
    """Whether this device and these shapes have the kernel."""
    fits = 0 < k <= CHUNK and -(-scores.shape[1] // CHUNK) * k <= _MOST
    return fits and compiles(scores.device)


def choose(scores: Tensor, tokens: Tokens, table: Tensor, per: int, k: int) -> Tensor:
    """`index_triton.choose`."""
    count, number = scores.shape
    chunks = -(-number // CHUNK)
    out = torch.empty((count, k), dtype=torch.int32, device=scores.device)
    best = out if chunks == 1 else torch.empty((count, chunks, k), dtype=torch.int32, device=scores.device)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (scores, best, out, tokens.slots, tokens.positions, table)]
    numbers = [ctypes.c_int(n) for n in (table.shape[1], number, chunks, k, per)]
    for name, blocks, most in (("choose", chunks, min(number, CHUNK)), ("last", 1, chunks * k)):
        if name == "choose" or chunks > 1:
            each = 1 << max(0, -(-most // _THREADS) - 1).bit_length()
            run = kernel("index.cu", name, scores.device, EACH=each, CHUNK=CHUNK)
            run((blocks, count), _THREADS, scores.device, *pointers, *numbers)
    return out
