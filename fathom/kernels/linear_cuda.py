"""Several linears of one input for a few rows, in one launch on tensor cores: the launcher of linear.cu.

The torch reference is `linear.linears`. All of it is one class up to MOST rows: a row of x has the same bits whatever
the others are. Products are exact; sums are float32 in groups of 128 columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fathom.kernels.cuda import compiles, kernel, pointer
from fathom.kernels.linear import Part
from fathom.kernels.norm import rms_norm
from fathom.kernels.quant_triton import known

MOST = 64
"""Rows up to which this is meant; a decode step stays below."""
_QUANTISED, _EIGHT, _SIXTEEN, _HALVES = range(4)
_PLAIN, _NORMALISED, _GATED = range(3)
_RESULTS = (None, torch.bfloat16, torch.float32)
_Codes = tuple[Tensor | None, Tensor | None]
_NO_CODES: _Codes = (None, None)


class _Part(ctypes.Structure):
    _fields_ = [("w", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("out", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int) for name in ("rows", "kind", "wide", "first")]


def linears(
    x: Tensor, parts: Sequence[Part], norm: Tensor | None = None, eps: float = 0.0, groups: int = 1,
    halves: tuple[Tensor, Tensor] | None = None,
) -> Any:  # fmt: skip
    """`linear.linears` for BF16 x of up to MOST rows and weights in e4m3 or BF16; NotImplemented for others.

    groups: x is [T, groups * K], and as many parts of each weight's rows have their own columns of it.
    halves: x in FP16 (`quant_triton.halves`), which e4m3 is multiplied with in fewer instructions than with BF16.
    """
    kinds, columns = [_kind(part) for part in parts], x.shape[1] // groups
    if None in kinds or columns % 128 or not _is_for(x):
        return NotImplemented
    x, codes = x.contiguous(), _NO_CODES
    if norm is not None and set(kinds) != {_QUANTISED}:
        x, norm = rms_norm(x, norm, eps), None
    if _QUANTISED in kinds:
        codes = _rounded(x, norm, eps)
    out = [_result(x, part) for part in parts]
    if halves is not None and set(kinds) == {_EIGHT}:
        x, codes, kinds = halves[0].view(x.shape), (None, halves[1]), [_HALVES] * len(kinds)
    per_group = out[0].shape[1] // groups if groups > 1 else 1 << 30
    _run(x, columns, parts, kinds, out, codes, per_group)
    return out


def gated_linear(gate_up: Tensor, part: Part, limit: float, quantize: bool, out: Tensor | None = None) -> Any:
    """`experts.gated_linear`, likewise.

    out: where the result goes, and a promise that gate_up is complete before the kernel launched last lets this one
    begin: they then run side by side.
    """
    columns, kind = gate_up.shape[1] // 2, _kind(replace(part, quantised=quantize))
    if kind != _QUANTISED or columns % 128 or not _is_for(gate_up):
        return NotImplemented
    y = _result(gate_up, part) if out is None else out
    _run(gate_up.contiguous(), columns, [part], [kind], [y], limit=limit, early=out is not None)
    return y


def _run(
    x: Tensor, columns: int, parts: Sequence[Part], kinds: Sequence[int | None], out: Sequence[Tensor],
    codes: _Codes = _NO_CODES, per_group: int = 1 << 30, limit: float | None = None,
    early: bool = False,
) -> None:  # fmt: skip
    described, blocks = _described(parts, kinds, out)
    sizes = _sizes(columns, len(x))
    tokens = 8 * sizes["NT"]
    room = 0 if limit is None else tokens * (columns + 64 + columns // 32)
    form = _PLAIN if limit is None else _GATED
    present = sum(1 << kind for kind in {kind for kind in kinds if kind is not None})
    sizes |= {"PARTS": len(parts), "FORM": form, "EARLY": int(early), "ONE": int(len(x) == 1), "KINDS": present}
    run = kernel("linear.cu", "few", x.device, room, **sizes)
    run(
        (blocks, -(-len(x) // tokens)), 32 * sizes["WARPS"], x.device, described, *map(pointer, (x, *codes)),
        ctypes.c_float(limit or 0.0), *(ctypes.c_int(n) for n in (*x.shape, per_group)),
    )  # fmt: skip


def _rounded(x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """x, or its norm, in e4m3 [T, K] with scales [T, K / 128]; what its maker left, if that is so."""
    codes = known(x) if norm is None else None
    if codes is not None:
        return codes
    rows, k = x.shape
    values = torch.empty((rows, k), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, k // 128), dtype=torch.float32, device=x.device)
    form = _PLAIN if norm is None else _NORMALISED
    own = norm if norm is None else norm.to(x.dtype)
    run = kernel("linear.cu", "rounded", x.device, **_sizes(k, 1), PARTS=1, FORM=form, EARLY=0, ONE=0, KINDS=0)
    run(
        (-(-k // 512), rows),
        32,
        x.device,
        *map(pointer, (x, own, values, scales)),
        ctypes.c_float(eps),
        early=own is norm,
    )
    return values, scales


def _result(x: Tensor, part: Part) -> Tensor:
    assert isinstance(part.weight, Tensor)
    return torch.empty((x.shape[0], part.weight.shape[0]), dtype=part.dtype or x.dtype, device=x.device)


def _is_for(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and 0 < x.shape[0] <= MOST and compiles(x.device, "linear.cu")


def _kind(part: Part) -> int | None:
    """How a part is multiplied; None where it cannot be."""
    weight, scale = part.weight, part.scale
    if not isinstance(weight, Tensor) or weight.shape[0] % 16 or part.dtype not in _RESULTS:
        return None
    if weight.dtype == torch.float8_e4m3fn and scale is not None and scale.dtype == torch.float8_e8m0fnu:
        return _QUANTISED if part.quantised else _EIGHT
    return _SIXTEEN if weight.dtype == torch.bfloat16 and scale is None and not part.quantised else None


def _described(parts: Sequence[Part], kinds: Sequence[int | None], out: Sequence[Tensor]) -> tuple[Any, int]:
    """The parts as the kernel reads them, and the blocks of all."""
    described, first = (_Part * len(parts))(), 0
    for i, (part, kind, y) in enumerate(zip(parts, kinds, out, strict=True)):
        assert isinstance(part.weight, Tensor)
        pointers = [pointer(tensor) for tensor in (part.weight, part.scale, y)]
        described[i] = _Part(*pointers, y.shape[1], kind, y.dtype == torch.float32, first)
        first += y.shape[1] // 16
    return described, first


def shape(columns: int, rows: int) -> tuple[int, int, int, int]:
    """Warps that share a row's columns, eights of rows, pieces in registers, blocks of a multiprocessor."""
    warps = next(w for w in ((8, 4, 2, 1) if columns > 2048 else (4, 2, 1)) if columns % (128 * w) == 0)
    tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
    return warps, tiles, 8 if tiles == 1 else 4, 16 // warps


def _sizes(columns: int, rows: int) -> dict[str, int]:
    warps, tiles, room, fit = shape(columns, rows)
    return {"K": columns, "WARPS": warps, "NT": tiles, "ROOM": room, "FIT": fit}
