"""Hyper-connections on a GPU. Reference 2.3; the torch reference is `streams`.

This is the class of prefill, and of any number of tokens where `streams_cuda` lacks the shape. `before` is two
launches: partial sums of the projected streams over slices of their width on tensor cores, 64 tokens a program; then
one program a token that folds, normalises and leaves the rounded form of the result for the products that follow
(`quant_triton.note`), beside some that do the Sinkhorn rounds of 32 tokens each. `after` is one. A token's result does
not depend on the others: every sum has one order.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, operand, options, power_of_two
from fathom.kernels.quant_triton import note, on_grid

_TOGETHER = 64
"""Tokens that a program projects."""
_SLICE = 2048
"""Values of the streams that it projects them over."""
_STEP = 64
"""Values at a time."""
_STAGES = 3
_COLUMNS = 32
"""Room of a slice's sums: the mixing weights, then the sum of squares."""
_MIXED = 32
"""Tokens whose Sinkhorn rounds a program does."""


def before(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float, rounds: int
) -> Any:
    """`streams.before` for four BF16 streams, two or one; NotImplemented for others."""
    if not _has(x):
        return NotImplemented
    x, (tokens, n, _) = x.contiguous(), x.shape
    post = torch.empty((tokens, n), dtype=torch.float32, device=x.device)
    comb = torch.empty((tokens, n, n), dtype=torch.float32, device=x.device)
    return _finished(x, fn, scale, base, weight, eps, hc_eps, rounds, post, comb), post, comb


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
    return _finished(x.contiguous(), fn, scale, base, weight, eps, hc_eps, 0)


def _has(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[1] in (1, 2, 4) and x.shape[0] > 0


def _sums(x: Tensor, fn: Tensor) -> tuple[Tensor, int]:
    """For each slice and token the sums of fn's rows, and of squares: float32 [slices, T, 32]."""
    tokens, width = x.shape[0], fn.shape[1]
    slices = triton.cdiv(width, _SLICE)
    sums = torch.empty((slices, tokens, _COLUMNS), dtype=torch.float32, device=x.device)
    _project[(slices, triton.cdiv(tokens, _TOGETHER))](
        x, fn, sums, tokens, width, fn.shape[0], min(_SLICE, width), _TOGETHER, _STEP, _COLUMNS, PLAIN,
        **options(x, 4, _STAGES),
    )  # fmt: skip
    return sums, slices


def _finished(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, weight: Tensor, eps: float, hc_eps: float, rounds: int,
    post: Tensor | None = None, comb: Tensor | None = None,
) -> Tensor:  # fmt: skip
    tokens, n, hidden = x.shape
    sums, slices = _sums(x, fn)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    values = torch.empty((tokens, hidden), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((tokens, triton.cdiv(hidden, 128)), dtype=torch.float32, device=x.device)
    mixers = triton.cdiv(tokens, _MIXED) if rounds else 0
    _finish[(mixers + tokens,)](
        x, sums, scale, base, weight, out, values, scales, out if post is None else post, out if comb is None else comb,
        tokens, hidden, mixers, slices, power_of_two(slices), n, max(128, power_of_two(hidden)), _COLUMNS, _MIXED, eps,
        hc_eps, rounds, **options(x, 8),
    )  # fmt: skip
    if hidden % 128 == 0:
        note(out, values, scales)
    return out


@triton.jit
def _project(
    x, fn, sums, T, WIDTH, ROWS, SLICE: tl.constexpr, MT: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    rm = tl.program_id(1) * MT + tl.arange(0, MT)
    rc = tl.arange(0, COLUMNS)
    rk = s * SLICE + tl.arange(0, B)
    xp = x + tl.where(rm < T, rm, 0).to(tl.int64)[:, None] * WIDTH
    fp = fn + tl.where(rc < ROWS, rc, 0)[None, :] * WIDTH
    acc = tl.zeros((MT, COLUMNS), tl.float32)
    squares = tl.zeros((MT, B), tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for k in range(0, SLICE, B):
        inside = rk + k < WIDTH
        v = tl.load(xp + (rk + k)[None, :], mask=inside[None, :], other=0.0)
        f = tl.load(fp + (rk + k)[:, None], mask=inside[:, None], other=0.0)
        squares += v.to(tl.float32) * v.to(tl.float32)
        acc = _exactly(v, f, acc, PLAIN)
    acc = tl.where((rc == ROWS)[None, :], tl.sum(squares, 1)[:, None], acc)
    tl.store(sums + (s * T + rm.to(tl.int64)[:, None]) * COLUMNS + rc[None, :], acc, mask=(rm < T)[:, None])


@triton.jit
def _exactly(v, f, acc, PLAIN: tl.constexpr):
    """BF16 times float32: that is cut into three BF16 pieces, so that every product is exact."""
    if PLAIN:
        return tl.dot(operand(v, PLAIN), f, acc, input_precision="ieee")
    high = f.to(tl.bfloat16)
    rest = f - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(v, high, tl.dot(v, middle, tl.dot(v, low, acc)))


@triton.jit
def _finish(
    x, sums, scale, base, weight, out, values, scales, post, comb, T, D, MIXERS, SLICES: tl.constexpr,
    SB: tl.constexpr, N: tl.constexpr, DB: tl.constexpr, COLUMNS: tl.constexpr, MT: tl.constexpr, EPS, HC_EPS,
    ROUNDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first MIXERS programs mix MT tokens each, the others fold and normalise one."""
    rs = tl.arange(0, SB)
    rn = tl.arange(0, N)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tl.program_id(0) < MIXERS:
        _mix(sums, scale, base, post, comb, T, D, SLICES, N, COLUMNS, MT, EPS, HC_EPS, ROUNDS)
    else:
        t = (tl.program_id(0) - MIXERS).to(tl.int64)
        place = sums + (rs * T + t) * COLUMNS
        # The sum of squares stands behind the last mixing weight: n of them for a head, (2 + n) n for a sublayer.
        squares = tl.sum(tl.load(place + (N if ROUNDS == 0 else (2 + N) * N), mask=rs < SLICES, other=0.0), 0)
        m = tl.sum(tl.load(place[:, None] + rn[None, :], mask=(rs < SLICES)[:, None], other=0.0), 0)
        m *= 1.0 / tl.sqrt_rn(squares / (N * D) + EPS)
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
        y = y.to(out.dtype.element_ty)
        tl.store(out + t * D + rd, y, mask=inside)
        q, steps = on_grid(y.to(tl.float32), DB, 128)
        rb = tl.arange(0, DB // 128)
        tl.store(values + t * D + rd, tl.reshape(q, (DB,)).to(tl.float8e4nv), mask=inside)
        tl.store(scales + t * tl.cdiv(D, 128) + rb, steps, mask=rb < tl.cdiv(D, 128))


@triton.jit
def _mix(
    sums, scale, base, post, comb, T, D, SLICES: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    MT: tl.constexpr, EPS, HC_EPS, ROUNDS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * MT + tl.arange(0, MT)
    rn = tl.arange(0, N)
    square = 2 * N + rn[:, None] * N + rn[None, :]
    tm = t < T
    place = sums + tl.where(tm, t, 0).to(tl.int64) * COLUMNS
    squares = tl.zeros((MT,), tl.float32)
    m = tl.zeros((MT, N), tl.float32)
    c = tl.zeros((MT, N, N), tl.float32)
    for s in range(SLICES):
        here = place + s * T * COLUMNS
        squares += tl.load(here + (2 + N) * N)
        m += tl.load(here[:, None] + (N + rn)[None, :])
        c += tl.load(here[:, None, None] + square[None, :, :])
    factor = 1.0 / tl.sqrt_rn(squares / (N * D) + EPS)
    m *= factor[:, None]
    gate = 2.0 / (1.0 + tl.exp(-(m * tl.load(scale + 1) + tl.load(base + N + rn)[None, :])))
    tl.store(post + t[:, None] * N + rn[None, :], gate, mask=tm[:, None])
    c = c * factor[:, None, None] * tl.load(scale + 2) + tl.load(base + square)[None, :, :]
    c = tl.exp(c - tl.max(c, 2)[:, :, None])
    c = c / tl.sum(c, 2)[:, :, None] + HC_EPS
    c = c / (tl.sum(c, 1)[:, None, :] + HC_EPS)
    for _ in range(ROUNDS - 1):
        c = c / (tl.sum(c, 2)[:, :, None] + HC_EPS)
        c = c / (tl.sum(c, 1)[:, None, :] + HC_EPS)
    tl.store(comb + (t[:, None, None] * N * N + square[None, :, :] - 2 * N), c, mask=tm[:, None, None])


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
