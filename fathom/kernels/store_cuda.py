"""What stands between a step's projections and its attention on Hopper: store.cu's launcher. Reference 2.5 to 2.8, 4.

The torch reference is `store.prepare`; other shapes go to `store_triton`. A token's bits depend neither on the batch
nor on whether those before it in its sequence came with it (drafts) or earlier.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fathom.kernels import store_triton
from fathom.kernels.cuda import compiles, kernel, pointer
from fathom.kernels.decode import Memory, Tokens
from fathom.kernels.store import Norms, Pooling, Projected
from fathom.kernels.stored import Keys, Rows

_WARPS, _ROPE, _WIDEST, _PART = 8, 64, 512, 256
"""Of a block; turned columns; columns of a row at most; floats of a tail that a warp keeps."""
_CLUSTER = 4
"""Blocks, at most, that share an entry of 128 items: half a megabyte, which one multiprocessor would load for 5 us."""


class _Compressor(ctypes.Structure):
    """As store.cu has it; all zero where a layer has none."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("projected", "tail", "bias", "norm", "data", "scales")),
        ("stride", ctypes.c_int),
    ]


def prepare(made: Projected, tokens: Tokens, memory: Memory, norms: Norms) -> Any:
    """`store.prepare`."""
    if not _has(made, memory, norms):
        return store_triton.prepare(made, tokens, memory, norms)
    count, heads, width = made.q.shape
    q, out = made.q.contiguous(), torch.empty_like(made.q, memory_format=torch.contiguous_format)
    index_q = index_out = None
    if made.index_q is not None:
        index_q = made.index_q.contiguous()
        index_out = torch.empty_like(index_q)
    index_heads, dim = (0, 128) if index_q is None else index_q.shape[1:]
    cluster = _cluster(width) if memory.ratio == 128 else 1
    run = kernel(
        "store.cu", "prepare", q.device, C=width, D=dim, RATIO=memory.ratio, PER=128 // max(memory.ratio, 1),
        RING=memory.window.per, TAIL=_tail(memory),
        PACKED=int(memory.keys is not None and memory.keys.packed), CLUSTER=cluster,
    )  # fmt: skip
    turns = tokens.turn(memory.ratio), tokens.turn(memory.ratio, block=True)
    where = tokens.slots, tokens.positions, memory.table
    tensors = (q, out, index_q, index_out, made.kv, norms.kv, *memory.window.planes, *turns, *where)
    entries = _compressor(made.entries, memory.tail, norms.entries, memory.entries)
    keys = _compressor(made.keys, memory.key_tail, norms.keys, memory.keys)
    numbers = map(ctypes.c_int, (heads, index_heads, memory.table.shape[1]))
    more = ctypes.c_longlong(made.kv.stride(0)), *numbers, ctypes.c_float(norms.eps)
    grid = _blocks(memory.ratio, heads, width, index_heads, dim, cluster), count
    run(grid, _WARPS * 32, q.device, *map(pointer, tensors), entries, keys, *more)
    return out, index_out


def _cluster(width: int) -> int:
    """Every block has columns in multiples of 64."""
    cluster = _CLUSTER
    while width % (64 * cluster):
        cluster //= 2
    return cluster


def _blocks(ratio: int, heads: int, width: int, index_heads: int, dim: int, cluster: int) -> int:
    """Of a token: those that pool, and those whose warps have heads, a row and parts of tails; whole clusters."""
    kept, pools = {0: (0, 0), 4: (4 * width, cluster + 1), 128: (2 * width, cluster)}[ratio]
    warps = heads + 1 - (-kept // _PART)
    if ratio == 4:
        warps += 4 * dim // _PART - (-index_heads * dim // 256)
    return -(-(pools - (-warps // _WARPS)) // cluster) * cluster


def _compressor(
    projected: Tensor | None, tail: Tensor | None, weights: Pooling | None, store: Rows | Keys | None
) -> _Compressor:
    if projected is None or tail is None or weights is None or store is None:
        return _Compressor()
    tensors = (projected, tail, weights.ape, weights.norm, *store.planes)
    return _Compressor(*map(pointer, tensors), projected.stride(0))


def _has(made: Projected, memory: Memory, norms: Norms) -> bool:
    """Whether this device and these shapes have the kernel."""
    count, _, width = made.q.shape
    fits = _ROPE < width <= _WIDEST and width % 64 == 0 and memory.window.rope == _ROPE and memory.ratio in (0, 4, 128)
    fits = fits and 0 < count < 1 << 16 and _are(torch.bfloat16, made.q, made.kv, norms.kv) and _aligned(made.kv)
    if made.index_q is not None:
        fits = fits and made.index_q.shape[2] in (64, 128) and _are(torch.bfloat16, made.index_q)
    for projected, tail, weights in (
        (made.entries, memory.tail, norms.entries),
        (made.keys, memory.key_tail, norms.keys),
    ):
        if projected is not None and tail is not None and weights is not None:
            fits = fits and _are(torch.float32, projected, tail, weights.ape) and _are(torch.bfloat16, weights.norm)
            fits = fits and _aligned(projected) and _tail(memory) == tail.shape[1] >= max(8, memory.ratio)
    return fits and compiles(made.q.device, "store.cu")


def _are(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether tensors are of a type, and begin where they can be read 16 bytes at a time."""
    return all(t.dtype == dtype and t.data_ptr() % 16 == 0 for t in tensors)


def _aligned(rows: Tensor) -> bool:
    """Whether all rows [T, n] begin so."""
    return rows.stride(1) == 1 and rows.stride(0) * rows.element_size() % 16 == 0


def _tail(memory: Memory) -> int:
    """Rows of a slot's tails."""
    return 1 if memory.tail is None else memory.tail.shape[1]
