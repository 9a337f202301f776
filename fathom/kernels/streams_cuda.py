"""Hyper-connections for the tokens of a step on Hopper: the launcher of streams.cu. Reference 2.3.

The torch reference is `streams`. `after` also projects its streams for the next mixing weights, if it knows them, and
`before` leaves the rounded form of its result for the products that follow (`quant_triton.note`). A token's result does
not depend on the others. Other shapes go to `streams_triton`.
"""

from __future__ import annotations

import ctypes
import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fathom.kernels import quant_triton, streams_triton
from fathom.kernels.cuda import KernelError, compiles, kernel, pointer
from fathom.kernels.mailbox import NO_BOX, Unsummed, whole

_log = logging.getLogger("fathom.kernels")
_SLICE, _COLUMNS, _STREAMS, _WIDEST, _MOST = 64, 32, 4, 8192, 64
_projected: Any = WeakIdKeyDictionary()
"""Of streams that `after` has made: the mixing weights that it projected them with, and the sums."""


def before(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float, rounds: int
) -> Any:
    """`streams.before`; NotImplemented for others than four or less BF16 streams."""
    if not _has(x, weight):
        return streams_triton.before(x, fn, scale, base, weight, eps, hc_eps, rounds)
    post = torch.empty((len(x), _STREAMS), dtype=torch.float32, device=x.device)
    comb = torch.empty((len(x), _STREAMS, _STREAMS), dtype=torch.float32, device=x.device)
    return _finished(x, fn, scale, base, weight, eps, hc_eps, rounds, post, comb), post, comb


def after(y: Tensor | Unsummed, x: Tensor, post: Tensor, comb: Tensor, following: Tensor | None = None) -> Any:
    """`streams.after`, likewise. A step's y is summed over the ranks on the way."""
    own = y.own if isinstance(y, Unsummed) else y
    if following is None or own.dtype != x.dtype or not _has(x, own):
        return streams_triton.after(whole(y), x, post, comb)
    if isinstance(y, Unsummed) and math.prod(_grid(*own.shape)) > y.box.most_blocks:
        y = whole(y)
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _projected[out] = following, _turn(x, following, (y, post, comb), out)
    return out


def sums(device: torch.device, ranks: int) -> bool:
    """Whether `after` can make the sums of so many ranks here. All of them are to go the same way."""
    try:
        return compiles(device, "streams.cu") and bool(
            kernel("streams.cu", "turn", device, D=4096, ROWS=24, ROUNDS=1, TOKENS=1, RANKS=ranks)
        )
    except KernelError as error:
        _log.warning("sums over ranks: in launches of their own (%s)", error)
        return False


def folded(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float) -> Any:
    """`streams.folded`, likewise."""
    if not _has(x, weight):
        return streams_triton.folded(x, fn, scale, base, weight, eps, hc_eps)
    return _finished(x, fn, scale, base, weight, eps, hc_eps, 0, None, None)


def _has(x: Tensor, other: Tensor) -> bool:
    tokens, n, hidden = x.shape
    fits = n == _STREAMS and 0 < tokens <= _MOST and hidden % 128 == 0 and hidden <= _WIDEST
    return fits and x.dtype == other.dtype == torch.bfloat16 and compiles(x.device, "streams.cu")


def _turn(x: Tensor, fn: Tensor, into: tuple[Tensor | Unsummed, Tensor, Tensor] | None, out: Tensor) -> Tensor:
    """The sums of fn's rows over slices of the new streams, and of squares: float32 [T, slices, 32]."""
    tokens, _, hidden = x.shape
    sums = torch.empty((tokens, hidden // _SLICE, _COLUMNS), dtype=torch.float32, device=x.device)
    y, post, comb = into or (None, None, None)
    own, box = y if isinstance(y, Unsummed) else (y, None)
    ranks, argument = (box.ranks, box.argument) if box else (1, NO_BOX)
    constants = {"D": hidden, "ROWS": len(fn), "ROUNDS": 1, "TOKENS": _together(tokens), "RANKS": ranks}
    try:
        run = kernel("streams.cu", "turn", x.device, **constants)
    except KernelError as error:
        if box:  # the others do not know: another kernel would wait for words that they do not write
            raise RuntimeError(f"this rank cannot make a sum that the others make: {error}") from error
        raise
    own = own if own is None else own.contiguous()
    tensors = (own, x, post, comb, out, fn, sums)
    run(_grid(tokens, hidden), 128, x.device, *map(pointer, tensors), argument, ctypes.c_int(tokens))
    return sums


def _grid(tokens: int, hidden: int) -> tuple[int, int]:
    """Of `turn`: a block has a slice of some tokens."""
    return hidden // _SLICE, -(-tokens // _together(tokens))


def _together(tokens: int) -> int:
    """Tokens of a block of `turn`, which reads its part of fn once for them: one while there are places for all."""
    return 1 if tokens <= 4 else 2 if tokens <= 8 else 4


def _finished(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float, rounds: int,
    post: Tensor | None, comb: Tensor | None,
) -> Tensor:  # fmt: skip
    known, sums = _projected.get(x, (None, None))
    x, (tokens, _, hidden) = x.contiguous(), x.shape
    if known is not fn:
        sums = _turn(x, fn, None, x)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    values = torch.empty((tokens, hidden), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((tokens, hidden // 128), dtype=torch.float32, device=x.device)
    run = kernel("streams.cu", "finish", x.device, D=hidden, ROWS=len(fn), ROUNDS=rounds, TOKENS=1, RANKS=1)
    tensors = (x, sums, scale, base, weight, out, values, scales, post, comb)
    numbers = ctypes.c_float(eps), ctypes.c_float(hc_eps)
    threads = -(-hidden // 256) * 32
    run((2 if rounds else 1, tokens), threads, x.device, *map(pointer, tensors), *numbers)
    quant_triton.note(out, values, scales)
    return out
