"""FP4 experts for the few tokens of a step on Hopper: the launcher of experts.cu. Reference 2.10 and 4.

The torch reference is `experts.experts` on the stored weights. All of it is one class: a token's result has the same
bits whatever else is in the batch. Tensor cores sum 32 products of e5m2 weights and e4m3 activations, which is exact to
about 2e-4 of the result; everything above is float32.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.kernels.cuda import compiles, kernel, pointer
from fathom.kernels.experts import Down
from fathom.kernels.experts_pairs_triton import Fp4Experts, combine
from fathom.kernels.linear_cuda import gated_linear
from fathom.kernels.quant_triton import known, quantise

MOST_PAIRS = 512
"""Pairs of a token and an expert that a block can look through."""
_FEW_PAIRS = 64
"""Pairs of a step that is filled up with few rows of nobody's, or none."""


class Shape(NamedTuple):
    """How a launch is cut, which changes no bit: tiles of 64 rows in a block, stages of its rings, pairs multiplied at
    once."""

    tiles: int
    stages: int
    together: int = 4


def shape(pairs: int, up: bool) -> Shape:
    """What measured best on an H200.

    A larger step may have many rows of nobody's (`engine.graphs`), all alike, which choose the same experts. A block
    goes through its weights once for all pairs that it multiplies together, so there it takes eight instead of four.
    """
    if pairs > _FEW_PAIRS:
        return Shape(4, 4, 8)
    return Shape(1 if pairs <= (12 if up else 6) else 2, 4)


def has(x: Tensor, chosen: Tensor, weights: Fp4Experts) -> bool:
    """Whether this device and these shapes have the kernel."""
    hidden, width = x.shape[1], weights.w2.shape[2] * 8
    fits = hidden % 128 == 0 and width % 128 == 0 and chosen.numel() <= MOST_PAIRS
    return fits and compiles(x.device, "experts.cu") and torch.cuda.get_device_capability(x.device)[0] == 9


def gate_up(
    x: Tensor, scales: Tensor, chosen: Tensor, shares: Tensor, weights: Fp4Experts, limit: float,
    form: Shape | None = None, ready: bool = False,
) -> Tensor:  # fmt: skip
    """shares * silu(min(a, limit)) * clamp(b, -limit, limit), [a, b] = w13[e] x, for every pair: BF16 [P, I].

    x e4m3 [T, D] and scales [T, D / 128] from `quantise`; chosen int32 and shares float32 [T, k].
    ready: x was complete before the launch began that made `chosen`.
    """
    width = weights.w13.shape[1] // 2
    out = torch.empty((chosen.numel(), width), dtype=torch.bfloat16, device=x.device)
    tensors = (weights.w13, weights.s13, x, scales, chosen, shares, out)
    _run(tensors, width, width // 32, limit, form or shape(chosen.numel(), True), up=True, ready=ready)
    return out


def down(x: Tensor, chosen: Tensor, weights: Fp4Experts, form: Shape | None = None) -> Tensor:
    """w2[e] x for every pair, float32 [P, D]; x BF16 [P, I], which is rounded to e4m3 per 128.

    `chosen` is read at once: it must have been complete when the kernel launched last began, as it was for `gate_up`.
    """
    hidden = weights.w2.shape[1]
    out = torch.empty((chosen.numel(), hidden), dtype=torch.float32, device=x.device)
    tensors = (weights.w2, weights.s2, x, x, chosen, x, out)
    _run(tensors, hidden, hidden // 64, 0.0, form or shape(chosen.numel(), False), up=False)
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
    # Routers begin when all before them has ended; who left x rounded did so before they were launched.
    hidden = gate_up(*quantise(x), chosen, shares, weights, limit, ready=known(x) is not None)
    added = _beside(shared, room)
    return combine(down(hidden, chosen, weights), chosen.shape[1], added)


def _beside(shared: Tensor | Down | None, room: Tensor) -> Tensor | None:
    if not isinstance(shared, Down):
        return shared
    out = gated_linear(shared.gate_up, shared.part, shared.limit, shared.quantize, room)
    return shared.product() if out is NotImplemented else room


def _run(
    tensors: tuple[Tensor, ...], rows: int, tiles: int, limit: float, form: Shape, up: bool, ready: bool = False
) -> None:
    """tensors: as the kernel names them; rows: of a result; tiles: of 64 rows of an expert."""
    x, chosen = tensors[2], tensors[4]
    columns, pairs, each = x.shape[1], chosen.numel(), math.gcd(tiles, form.tiles)
    tokens, top = chosen.shape
    together = 1 if tokens == 1 else form.together
    shared = together * columns + each * 64 * (columns // 32 + 16) + 4 * form.stages * 2048
    sizes = {"K": columns, "TILES": each, "STAGES": form.stages, "UP": int(up), "TOP": top, "PAIRS": together}
    alone = {"ONE": int(tokens == 1), "READY": int(ready and tokens == 1)}
    run = kernel("experts.cu", "experts", x.device, shared, **sizes, **alone)
    pointers = map(pointer, tensors)
    numbers = ctypes.c_int(pairs), ctypes.c_int(rows), ctypes.c_float(limit)
    # Down of one token is all waiting for x: begun early it would only be in the way.
    run((tiles // each, pairs), 128, x.device, *pointers, *numbers, early=up or tokens > 1)
