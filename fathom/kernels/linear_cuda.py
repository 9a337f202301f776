"""Several linears of one input for a few rows, in one launch on tensor cores: the launcher of linear.cu.

The torch reference is `linear.linears`. All of it is one class up to MOST rows: a row of x has the same bits whatever
the others are. Products are exact; sums are float32 in groups of 128 columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fathom.kernels.cuda import compiles, kernel
from fathom.kernels.linear import Part
from fathom.kernels.norm import rms_norm

MOST = 64
"""Rows up to which this is meant; a decode step stays below."""
_QUANTISED, _EIGHT, _SIXTEEN = range(3)
_RESULTS = (None, torch.bfloat16, torch.float32)


class _Part(ctypes.Structure):
    _fields_ = [("w", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("out", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int) for name in ("rows", "kind", "wide", "first")]


def linears(x: Tensor, parts: Sequence[Part], norm: Tensor | None = None, eps: float = 0.0, groups: int = 1) -> Any:
    """`linear.linears` for BF16 x of up to MOST rows and weights in e4m3 or BF16; NotImplemented for others.

    groups: x is [T, groups * K], and as many parts of each weight's rows have their own columns of it.
    """
    weights = [part.weight for part in parts if isinstance(part.weight, Tensor)]
    kinds, columns = [_kind(part) for part in parts], x.shape[1] // groups
    if len(weights) < len(parts) or None in kinds or columns % 128 or not _is_for(x):
        return NotImplemented
    x = x.contiguous() if norm is None else rms_norm(x, norm, eps)
    given = _input(x, kinds)
    out = [
        torch.empty((x.shape[0], w.shape[0]), dtype=p.dtype or x.dtype, device=x.device)
        for p, w in zip(parts, weights, strict=True)
    ]
    described, blocks = _described(parts, kinds, out)
    warps, tiles, room, fit = shape(columns, x.shape[0])
    run = kernel(
        "linear.cu", "few", x.device, K=columns, WARPS=warps, NT=tiles, ROOM=room, PARTS=len(parts), FIT=fit
    )  # fmt: skip
    per_group = weights[0].shape[0] // groups if groups > 1 else 1 << 30
    run(
        (blocks, -(-x.shape[0] // (8 * tiles))), 32 * warps, x.device, described, *map(_pointer, (x, *given)),
        *(ctypes.c_int(n) for n in (*x.shape, per_group)),
    )  # fmt: skip
    return out


def _is_for(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and 0 < x.shape[0] <= MOST and compiles(x.device)


def _kind(part: Part) -> int | None:
    """How a part is multiplied; None where it cannot be."""
    weight, scale = part.weight, part.scale
    if not isinstance(weight, Tensor) or weight.shape[0] % 16 or part.dtype not in _RESULTS:
        return None
    if weight.dtype == torch.float8_e4m3fn and scale is not None and scale.dtype == torch.float8_e8m0fnu:
        return _QUANTISED if part.quantised else _EIGHT
    return _SIXTEEN if weight.dtype == torch.bfloat16 and scale is None and not part.quantised else None


def _input(x: Tensor, kinds: Sequence[int | None]) -> tuple[Tensor | None, Tensor | None]:
    """The quantised form of x and its scales, where a part reads them."""
    if _QUANTISED not in kinds:
        return None, None
    from fathom.kernels.quant_triton import quantise

    return quantise(x)


def _described(parts: Sequence[Part], kinds: Sequence[int | None], out: Sequence[Tensor]) -> tuple[Any, int]:
    """The parts as the kernel reads them, and the blocks of all."""
    described, first = (_Part * len(parts))(), 0
    for i, (part, kind, y) in enumerate(zip(parts, kinds, out, strict=True)):
        assert isinstance(part.weight, Tensor)
        pointers = [_pointer(tensor) for tensor in (part.weight, part.scale, y)]
        described[i] = _Part(*pointers, y.shape[1], kind, y.dtype == torch.float32, first)
        first += y.shape[1] // 16
    return described, first


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def shape(columns: int, rows: int) -> tuple[int, int, int, int]:
    """Warps that share a row's columns, eights of rows, pieces in registers, blocks of a multiprocessor."""
    warps = next(w for w in ((8, 4, 2, 1) if columns > 2048 else (4, 2, 1)) if columns % (128 * w) == 0)
    tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
    return warps, tiles, 8 if tiles == 1 else 4, 16 // warps
