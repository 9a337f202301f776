"""FP4 experts for the few tokens of a step on Hopper: the launcher of experts.cu. Reference 2.10 and 4.

The torch reference is `experts.experts` on the stored weights. All of it is one class: a token's result has the same
bits whatever else is in the batch. Tensor cores sum 32 products of e4m3 values, which is exact to about 2e-4 of the
result; everything above is float32.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fathom.kernels.cuda import Kernel, compiles, kernel
from fathom.kernels.experts import Down
from fathom.kernels.experts_pairs_triton import Fp4Experts, combine
from fathom.kernels.linear_cuda import gated_linear
from fathom.kernels.quant_triton import quantise

MOST_PAIRS = 512
"""Pairs of a token and an expert that a block can look through."""
_TOGETHER = 8
"""Pairs of an expert that are multiplied at once."""
_STAGES = 3


def has(x: Tensor, chosen: Tensor, weights: Fp4Experts) -> bool:
    """Whether this device and these shapes have the kernel."""
    hidden, width = x.shape[1], weights.w2.shape[2] * 8
    fits = hidden % 128 == 0 and width % 128 == 0 and chosen.numel() <= MOST_PAIRS
    return fits and compiles(x.device) and torch.cuda.get_device_capability(x.device)[0] == 9


def gate_up(
    x: Tensor, scales: Tensor, chosen: Tensor, shares: Tensor, weights: Fp4Experts, limit: float, tiles: int = 1
) -> Tensor:
    """shares * silu(min(a, limit)) * clamp(b, -limit, limit), [a, b] = w13[e] x, for every pair: BF16 [P, I].

    x e4m3 [T, D] and scales [T, D / 128] from `quantise`; chosen int32 and shares float32 [T, k]; tiles: of 64 rows in
    a block, which changes no bit.
    """
    width = weights.w13.shape[1] // 2
    out = torch.empty((chosen.numel(), width), dtype=torch.bfloat16, device=x.device)
    tiles = math.gcd(width // 32, tiles)
    run = _kernel(x, chosen, True, tiles)
    arguments = (weights.w13, weights.s13, x, scales, chosen, shares, out)
    run((width // 32 // tiles, chosen.numel()), 128, x.device, *_arguments(arguments, chosen.numel(), width, limit))
    return out


def down(x: Tensor, chosen: Tensor, weights: Fp4Experts, tiles: int = 0) -> Tensor:
    """w2[e] x for every pair, float32 [P, D]; x BF16 [P, I], which is rounded to e4m3 per 128."""
    hidden = weights.w2.shape[1]
    out = torch.empty((chosen.numel(), hidden), dtype=torch.float32, device=x.device)
    tiles = math.gcd(hidden // 64, tiles or (2 if chosen.numel() <= 64 else 4))
    run = _kernel(x, chosen, False, tiles)
    arguments = (weights.w2, weights.s2, x, x, chosen, x, out)
    run((hidden // 64 // tiles, chosen.numel()), 128, x.device, *_arguments(arguments, chosen.numel(), hidden, 0.0))
    return out


def few(
    x: Tensor, chosen: Tensor, shares: Tensor, weights: Fp4Experts, limit: float, shared: Tensor | Down | None = None
) -> Tensor:
    """The whole of it: x [T, D], chosen [T, k], shares float32 [T, k] -> [T, D], `shared` added.

    What of `shared` is still to be done runs beside gate and up. Its input was complete before `chosen` was computed.
    """
    chosen = chosen.int()
    # Memory that is free now was last used by kernels that have ended when gate and up begin; later it may not be.
    room = torch.empty_like(x)
    hidden = gate_up(*quantise(x), chosen, shares, weights, limit)
    added = _beside(shared, room)
    return combine(down(hidden, chosen, weights), chosen.shape[1], added)


def _beside(shared: Tensor | Down | None, room: Tensor) -> Tensor | None:
    if not isinstance(shared, Down):
        return shared
    out = gated_linear(shared.gate_up, shared.part, shared.limit, shared.quantize, room)
    return shared.product() if out is NotImplemented else room


def _kernel(x: Tensor, chosen: Tensor, up: bool, tiles: int) -> Kernel:
    columns = x.shape[1]
    shared = _TOGETHER * columns + tiles * 64 * (columns // 32 + 16) + 4 * _STAGES * 2048
    sizes = {"K": columns, "TILES": tiles, "STAGES": _STAGES, "UP": int(up), "TOP": chosen.shape[1]}
    return kernel("experts.cu", "experts", x.device, shared, **sizes)


def _arguments(tensors: tuple[Tensor, ...], pairs: int, rows: int, limit: float) -> list[Any]:
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    return [*pointers, ctypes.c_int(pairs), ctypes.c_int(rows), ctypes.c_float(limit)]
