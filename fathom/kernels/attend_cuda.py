"""Attention of a decode step on Hopper: the launcher of attend.cu. Reference 2.6, 2.9.

The torch reference is `decode.attend`; other shapes go to `attend_triton`, which calls this where it can. A token's
bits depend neither on the batch nor on the longest sequence that is allowed.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fathom.kernels.cuda import compiles, kernel, pointer
from fathom.kernels.decode import Memory, Tokens
from fathom.kernels.quant_triton import note_halves

_WIDTH, _ROPE, _HEADS, _THREADS = 512, 64, 16, 512
_ROWS, _CLUSTER, _LIMIT, _MOST = 32, 8, 3, 8
"""Rows of a block at a time, blocks of a cluster, rounds of them before a token has a second cluster, of 8 at most."""
_FEW = 64
"""Blocks of a launch up to which each may have all registers of a multiprocessor; found by measurement."""
_SHARED = sum((
    2 * (_HEADS + _ROWS) * (_WIDTH + 8),  # queries and rows as BF16; then results, which are less
    _HEADS * 4 * (_WIDTH + 8 * _CLUSTER) + 8 * _HEADS * _CLUSTER,  # results and their sums from every block
    _HEADS * (16 * (_ROWS + 2) + 2 * (_ROWS + 8) + 4) + 8,  # logits, probabilities, a barrier
))  # fmt: skip


class _Leave(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("out", "halves", "scales")]


def has(q: Tensor, memory: Memory) -> bool:
    """Whether this device and these shapes have the kernel."""
    fits = (
        q.dtype == torch.bfloat16
        and q.shape[2] == _WIDTH
        and memory.window.rope == _ROPE
        and len(q) > 0
        and q.is_contiguous()
    )
    return fits and compiles(q.device, "attend.cu")


def attend(q: Tensor, sink: Tensor, tokens: Tokens, memory: Memory, most: int, chosen: Tensor | None = None) -> Tensor:
    """`decode.attend`; leaves the result in FP16, too (`quant_triton.note_halves`).

    With `chosen`: queries and window were complete when the launch began that scored the entries. They are read before
    the choice has ended.
    """
    count, heads, width = q.shape
    number = chosen.shape[1] if chosen is not None else most // memory.ratio if memory.ratio else 0
    clusters = _clusters(memory.span, number)
    out, halves = (
        torch.empty((count, heads, width), dtype=dtype, device=q.device) for dtype in (q.dtype, torch.float16)
    )
    scales = torch.empty((count, heads, width // 64), dtype=torch.float32, device=q.device)
    leave = _Leave(*(tensor.data_ptr() for tensor in (out, halves, scales)))
    parts, sums = (
        torch.empty((count, clusters, heads, n) if clusters > 1 else 0, dtype=torch.float32, device=q.device)
        for n in (width, 2)
    )
    held = memory.window if memory.entries is None else memory.entries
    sizes = {"SPAN": memory.span, "RING": memory.window.per, "RATIO": memory.ratio, "PER": held.per, "MOST": clusters}
    sizes["CHOSEN"] = int(chosen is not None)
    where, turn = (tokens.slots, tokens.positions), tokens.turn(memory.ratio)
    tensors = (q, *memory.window.planes, *held.planes, chosen, memory.table, *where, sink, turn)
    numbers = ctypes.c_int(heads), ctypes.c_int(number)
    grid = _CLUSTER * clusters * -(-heads // _HEADS), count
    run = kernel("attend.cu", "attend", q.device, _SHARED, **sizes, FIT=1 if grid[0] * count <= _FEW else 2)
    more = ctypes.c_int(memory.table.shape[1]), ctypes.c_float(width**-0.5)
    run(grid, _THREADS, q.device, *map(pointer, tensors), leave, *map(pointer, (parts, sums)), *numbers, *more)
    if clusters > 1:
        run = kernel("attend.cu", "combine", q.device, **sizes, FIT=1)
        pointers = map(pointer, (parts, sums, sink, turn, *where))
        run((heads, count), width // 2, q.device, *pointers, leave, *numbers)
    note_halves(out, halves, scales)
    return out


def _clusters(span: int, number: int) -> int:
    """Of the longest sequence."""
    blocks = -(-span // _ROWS) + -(-number // _ROWS)
    return max(1, min(_MOST, -(-blocks // (_CLUSTER * _LIMIT))))
