"""Hyper-connections on a GPU for the tokens of a step. Reference 2.3; the torch reference is `streams`.

`before` is two launches: partial sums of the projected streams over slices of their width, then per token one program
that folds and normalises beside one that does the Sinkhorn rounds. `after` is one. A token's result does not depend on
the others: every sum has one order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import options, power_of_two

_SLICE = 256
"""Values of the streams that a program projects."""
_COLUMNS = 32
"""Room of a slice's sums: the mixing weights, then the sum of squares."""


def before(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float, rounds: int
) -> Any:
    """`streams.before` for four BF16 streams, two or one; NotImplemented for others."""
    if not _has(x):
        return NotImplemented
    x, (tokens, n, hidden) = x.contiguous(), x.shape
    sums, slices = _sums(x, fn)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    post = torch.empty((tokens, n), dtype=torch.float32, device=x.device)
    comb = torch.empty((tokens, n, n), dtype=torch.float32, device=x.device)
    _finish[(tokens, 2)](
        x, sums, scale, base, weight, out, post, comb, hidden, slices, power_of_two(slices), n, power_of_two(hidden),
        _COLUMNS, eps, hc_eps, rounds, **options(x, 8),
    )  # fmt: skip
    return out, post, comb


def after(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Any:
    """`streams.after`, likewise, for y in BF16 or float32."""
    if not _has(x):
        return NotImplemented
    x, y, (tokens, n, hidden) = x.contiguous(), y.contiguous(), x.shape
    out, block = torch.empty_like(x), min(512, power_of_two(hidden))
    _after[(triton.cdiv(hidden, block), tokens)](y, x, post, comb, out, hidden, n, block, **options(x, 4))
    return out


def folded(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float) -> Any:
    """`streams.folded`, likewise."""
    if not _has(x):
        return NotImplemented
    x, (tokens, n, hidden) = x.contiguous(), x.shape
    sums, slices = _sums(x, fn)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    _finish[(tokens, 1)](
        x, sums, scale, base, weight, out, out, out, hidden, slices, power_of_two(slices), n, power_of_two(hidden),
        _COLUMNS, eps, hc_eps, 0, **options(x, 8),
    )  # fmt: skip
    return out


def _has(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[1] in (1, 2, 4) and x.shape[0] > 0


def _sums(x: Tensor, fn: Tensor) -> tuple[Tensor, int]:
    """For each token and slice the sums of fn's rows, and of squares: float32 [T, slices, 32]."""
    tokens, width = x.shape[0], fn.shape[1]
    slices = triton.cdiv(width, _SLICE)
    sums = torch.empty((tokens, slices, _COLUMNS), dtype=torch.float32, device=x.device)
    _project[(slices, tokens)](x, fn, sums, width, fn.shape[0], slices, _SLICE, _COLUMNS, **options(x, 4))
    return sums, slices


@triton.jit
def _project(x, fn, sums, WIDTH, ROWS, SLICES, B: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    s = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    r = s * B + tl.arange(0, B)
    rows = tl.arange(0, COLUMNS)
    inside = r < WIDTH
    f = tl.load(fn + rows[:, None] * WIDTH + r[None, :], mask=(rows < ROWS)[:, None] & inside[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v = tl.load(x + t * WIDTH + r, mask=inside, other=0.0).to(tl.float32)
    f = tl.where((rows == ROWS)[:, None], v[None, :], f)
    tl.store(sums + (t * SLICES + s) * COLUMNS + rows, tl.sum(f * v[None, :], 1))


@triton.jit
def _finish(
    x, sums, scale, base, weight, out, post, comb, D, SLICES, SB: tl.constexpr, N: tl.constexpr, DB: tl.constexpr,
    COLUMNS: tl.constexpr, EPS, HC_EPS, ROUNDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    rs = tl.arange(0, SB)
    rn = tl.arange(0, N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = sums + t * SLICES * COLUMNS + rs * COLUMNS
    # The sum of squares stands behind the last mixing weight: n of them for a head, (2 + n) n for a sublayer.
    last = N if ROUNDS == 0 else (2 + N) * N
    squares = tl.sum(tl.load(place + last, mask=rs < SLICES, other=0.0), 0)
    factor = 1.0 / tl.sqrt_rn(squares / (N * D) + EPS)
    if tl.program_id(1) == 0:
        m = tl.sum(tl.load(place[:, None] + rn[None, :], mask=(rs < SLICES)[:, None], other=0.0), 0) * factor
        pre = 1.0 / (1.0 + tl.exp(-(m * tl.load(scale) + tl.load(base + rn)))) + HC_EPS
        rd = tl.arange(0, DB)
        inside = rd < D
        total = tl.zeros((DB,), tl.float32)
        for i in tl.static_range(N):
            part = tl.load(x + (t * N + i) * D + rd, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(rn == i, pre, 0.0), 0) * part
        total = total.to(out.dtype.element_ty).to(tl.float32)
        y = total * (1.0 / tl.sqrt_rn(tl.sum(total * total, 0) / D + EPS))
        y = y * tl.load(weight + rd, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + t * D + rd, y.to(out.dtype.element_ty), mask=inside)
    else:
        m = tl.sum(tl.load(place[:, None] + (N + rn)[None, :], mask=(rs < SLICES)[:, None], other=0.0), 0) * factor
        gate = 2.0 / (1.0 + tl.exp(-(m * tl.load(scale + 1) + tl.load(base + N + rn))))
        tl.store(post + t * N + rn, gate)
        square = 2 * N + rn[:, None] * N + rn[None, :]
        whole = tl.load(place[:, None, None] + square[None, :, :], mask=(rs < SLICES)[:, None, None], other=0.0)
        c = tl.sum(whole, 0) * factor * tl.load(scale + 2) + tl.load(base + square)
        c = tl.exp(c - tl.max(c, 1)[:, None])
        c = c / tl.sum(c, 1)[:, None] + HC_EPS
        c = c / (tl.sum(c, 0)[None, :] + HC_EPS)
        for _ in range(ROUNDS - 1):
            c = c / (tl.sum(c, 1)[:, None] + HC_EPS)
            c = c / (tl.sum(c, 0)[None, :] + HC_EPS)
        tl.store(comb + t * N * N + rn[:, None] * N + rn[None, :], c)


@triton.jit
def _after(y, x, post, comb, out, D, N: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr):
    t = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * B + tl.arange(0, B)
    inside = r < D
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    add = tl.load(y + t * D + r, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(N):
        total = tl.load(post + t * N + j) * add
        for i in tl.static_range(N):
            part = tl.load(x + (t * N + i) * D + r, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(comb + (t * N + i) * N + j) * part
        tl.store(out + (t * N + j) * D + r, total.to(out.dtype.element_ty), mask=inside)
