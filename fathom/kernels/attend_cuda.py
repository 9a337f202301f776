"""The second launch of a step's attention on Hopper: the launcher of attend.cu. Reference 2.6, 2.9.

The same sum as that of `attend_triton`, which has the contract and calls this where it can.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from fathom.kernels.cuda import compiles, kernel
from fathom.kernels.decode import Tokens

_COLUMNS, _THREADS, _MOST_PARTS = 256, 128, 64


def has(parts: Tensor, rope: int) -> bool:
    """Whether this device and these shapes have the kernel; parts [T, parts, H, C]."""
    count, width = parts.shape[1], parts.shape[3]
    return width % _COLUMNS == 0 and rope % 2 == 0 and count <= _MOST_PARTS and compiles(parts.device)


def combine(
    parts: Tensor, sums: Tensor, sink: Tensor, tokens: Tokens, out: Tensor, number: int, *, rope: int, span: int,
    ratio: int, rows: int, splits: int, chosen: bool,
) -> None:  # fmt: skip
    """parts float32 [T, n, H, C] over blocks of `rows`, their largest logits and sums [T, n, H, 2] -> out BF16 [T, H, C].

    number: entries at most, in `splits`; chosen: as many as are chosen.
    """
    count, all_parts, heads, width = parts.shape
    run = kernel(
        "attend.cu", "combine", parts.device, C=width, ROPE=rope, SPAN=span, RATIO=ratio, ROWS=rows, MOST_SPLITS=splits,
        CHOSEN=int(chosen),
    )  # fmt: skip
    tensors = (parts, sums, sink, tokens.turn(ratio), tokens.slots, tokens.positions, out)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    numbers = [ctypes.c_int(n) for n in (heads, all_parts, number)]
    run((heads * (width // _COLUMNS), count), _THREADS, parts.device, *pointers, *numbers, early=False)
