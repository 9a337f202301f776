"""Routed FP4 experts on a GPU for a few tokens, without tensor cores: where there is no `experts_cuda`. Reference 4.

The torch reference is `experts.experts` on the stored weights. Names: T tokens, k experts a token, P = T * k pairs in
the order of the tokens, D hidden size, I width of an expert.

All of it is one class: a token's result has the same bits whatever else is in the batch. Products are summed in FP16
over the 8 weights of a word (at most 3 additions in a lane) and in float32 above: about 1e-4 of the result.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, fetch, fp4, from_e8m0, options, power_of_two, swiglu
from fathom.kernels.experts_pairs_triton import Fp4Experts, combine
from fathom.kernels.quant_triton import PAIRS, quantise

_PLAIN_TILES = (32, 2, 1)
"""Few programs, which is what the interpreter's time depends on."""


def chain(chosen: Tensor) -> Tensor:
    """Which pairs share an expert: int32 [2, P] for chosen ids [T, k]. Row 0: 1 for the first pair of its expert, else
    0; row 1: the next pair of the same expert, or -1."""
    out = torch.empty((2, chosen.numel()), dtype=torch.int32, device=chosen.device)
    _chain[(chosen.numel(),)](chosen, out, chosen.numel(), power_of_two(chosen.numel()), **options(chosen, 1))
    return out


def gate_up(
    x: Tensor, scales: Tensor, chosen: Tensor, shares: Tensor, weights: Fp4Experts, limit: float,
    links: Tensor,
) -> Tensor:  # fmt: skip
    """shares * silu(min(a, limit)) * clamp(b, -limit, limit), [a, b] = w13[e] x, for every pair: BF16 [P, I].

    x int32 [T, 4, D / 8] and scales [T, D / 128] from `quantise(..., PAIRS)`; chosen int32 [T, k]; shares float32
    [T, k]; links from `chain`.
    """
    width, words = weights.w13.shape[1] // 2, weights.w13.shape[2]
    pairs = chosen.numel()
    out = torch.empty((pairs, width), dtype=torch.bfloat16, device=x.device)
    rows, blocks, warps = _PLAIN_TILES if PLAIN else (2, 4, 2) if width <= 1024 else (1, 4, 2)
    _gate_up[(width // (rows * blocks), pairs)](
        x, scales, weights.w13, weights.s13, chosen, shares, links, out, pairs, width,
        words * 8, power_of_two(words // 4), rows, blocks, chosen.shape[1], limit, PLAIN, **options(x, warps),
    )  # fmt: skip
    return out


def down(x: Tensor, scales: Tensor, chosen: Tensor, weights: Fp4Experts, links: Tensor) -> Tensor:
    """w2[e] x for every pair, float32 [P, D]; x int32 [P, 4, I / 8] and scales [P, I / 128] as in `gate_up`."""
    hidden, words = weights.w2.shape[1:]
    pairs = chosen.numel()
    out = torch.empty((pairs, hidden), dtype=torch.float32, device=x.device)
    rows, blocks, warps = _PLAIN_TILES if PLAIN else (4, 4, 1) if words <= 128 else (2, 8, 1)
    _down[(hidden // (rows * blocks), pairs)](
        x, scales, weights.w2, weights.s2, chosen, links, out, pairs, hidden, words * 8,
        power_of_two(words // 4), rows, blocks, PLAIN, **options(x, warps),
    )  # fmt: skip
    return out


def few(
    x: Tensor, chosen: Tensor, shares: Tensor, weights: Fp4Experts, limit: float, shared: Tensor | None = None
) -> Tensor:
    """The whole of it for up to MOST_FEW tokens: x [T, D], chosen [T, k], shares float32 [T, k] -> as `combine`."""
    links = chain(chosen)
    hidden = gate_up(*quantise(x, PAIRS), chosen, shares, weights, limit, links)
    parts = down(*quantise(hidden, PAIRS), chosen, weights, links)
    return combine(parts, chosen.shape[1], shared)


@triton.jit
def _chain(chosen, out, P, B: tl.constexpr, PDL: tl.constexpr):
    p = tl.program_id(0)
    r = tl.arange(0, B)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.load(chosen + r, mask=r < P, other=-1)
    same = ids == tl.load(chosen + p)
    first = tl.min(tl.where(same, r, P), 0)
    following = tl.min(tl.where(same & (r > p), r, P), 0)
    tl.store(out + p, (first == p).to(tl.int32))
    tl.store(out + P + p, tl.where(following == P, -1, following))


@triton.jit
def _word_dot_asm(w, x0, x1, x2, x3):
    """Eight weights times eight FP16 values in float32. Weights become FP16 pairs, 2^14 times too small, by shifts; the
    products are summed in two FP16 lanes, of which the least step is that of the least product."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a,b,t,e; .reg .b16 h0,h1; .reg .f32 f0,f1;
        shl.b32 a,$1,9; and.b32 a,a,0x8E008E00;
        shl.b32 b,$1,6; shl.b32 t,$1,8; and.b32 b,b,0x0E000E00; lop3.b32 b,t,0x80008000,b,0xEA;
        mul.rn.f16x2 e,a,$2; fma.rn.f16x2 e,b,$3,e;
        shl.b32 a,$1,1; and.b32 a,a,0x8E008E00;
        shr.u32 b,$1,2; and.b32 b,b,0x0E000E00; lop3.b32 b,$1,0x80008000,b,0xEA;
        fma.rn.f16x2 e,a,$4,e; fma.rn.f16x2 e,b,$5,e;
        mov.b32 {h0,h1},e; cvt.f32.f16 f0,h0; cvt.f32.f16 f1,h1; add.f32 f0,f0,f1; mul.f32 $0,f0,0f46800000; }""",
        "=f,r,r,r,r,r",
        [w, x0, x1, x2, x3],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _half(word, HIGH: tl.constexpr):
    bits = (word >> 16) if HIGH else (word & 0xFFFF)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _word_dot(w, x0, x1, x2, x3, PLAIN: tl.constexpr):
    if PLAIN:
        total = fp4(w, 0) * _half(x0, False) + fp4(w, 4) * _half(x0, True)
        total += fp4(w, 1) * _half(x1, False) + fp4(w, 5) * _half(x1, True)
        total += fp4(w, 2) * _half(x2, False) + fp4(w, 6) * _half(x2, True)
        return total + fp4(w, 3) * _half(x3, False) + fp4(w, 7) * _half(x3, True)
    return _word_dot_asm(w, x0, x1, x2, x3)


@triton.jit
def _planes(x, offset, mask, W: tl.constexpr, MASKED: tl.constexpr):
    """The four words of FP16 pairs that face a word of weights, for each word of a row."""
    x0 = fetch(x + offset, mask, MASKED)
    x1 = fetch(x + W + offset, mask, MASKED)
    x2 = fetch(x + 2 * W + offset, mask, MASKED)
    x3 = fetch(x + 3 * W + offset, mask, MASKED)
    return x0, x1, x2, x3


@triton.jit
def _row_sums(w, scale, x0, x1, x2, x3, xscale, PLAIN: tl.constexpr):
    """[BN, G, 4] words with scales [BN, G] times one row of activations -> [BN]."""
    return tl.sum(tl.sum(_word_dot(w, x0, x1, x2, x3, PLAIN), 2) * (from_e8m0(scale) * xscale), 1)


@triton.jit
def _gate_up(
    x, xs, w, s, chosen, shares, links, out, P, I: tl.constexpr, K: tl.constexpr, G: tl.constexpr, BN: tl.constexpr,
    NB: tl.constexpr, TOPK: tl.constexpr, LIMIT: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """NB blocks of BN rows of one expert for all that chose it; the next block is loaded before this one is used."""
    p = tl.program_id(1)
    W: tl.constexpr = K // 8
    MASKED: tl.constexpr = K // 32 != G
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tl.load(links + p) == 0:
        return
    e = tl.load(chosen + p).to(tl.int64)
    rn = tl.program_id(0) * (BN * NB) + tl.arange(0, BN)
    rg = tl.arange(0, G)
    r4 = tl.arange(0, 4)
    words = rg[None, :, None] * 4 + r4[None, None, :]
    groups = rg[None, :]
    wm = (groups < K // 32)[:, :, None]
    sm = groups < K // 32
    wp = w + e * (2 * I * W) + rn[:, None, None] * W + words
    sp = s + e * (2 * I * (K // 32)) + rn[:, None] * (K // 32) + groups
    wa = fetch(wp, wm, MASKED)
    wb = fetch(wp + I * W, wm, MASKED)
    sa = fetch(sp, sm, MASKED)
    sb = fetch(sp + I * (K // 32), sm, MASKED)
    for i in tl.static_range(NB):
        ca = wa
        cb = wb
        da = sa
        db = sb
        if i + 1 < NB:
            wa = fetch(wp + (i + 1) * BN * W, wm, MASKED)
            wb = fetch(wp + I * W + (i + 1) * BN * W, wm, MASKED)
            sa = fetch(sp + (i + 1) * BN * (K // 32), sm, MASKED)
            sb = fetch(sp + I * (K // 32) + (i + 1) * BN * (K // 32), sm, MASKED)
        q = p
        while q >= 0:  # one way for the first and those that follow: another would be other bits
            t = (q // TOPK).to(tl.int64)
            x0, x1, x2, x3 = _planes(x + t * (4 * W), words, wm, W, MASKED)
            xscale = fetch(xs + t * (K // 128) + groups // 4, sm, MASKED)
            a = _row_sums(ca, da, x0, x1, x2, x3, xscale, PLAIN)
            b = _row_sums(cb, db, x0, x1, x2, x3, xscale, PLAIN)
            u = swiglu(a, b, LIMIT) * tl.load(shares + q)
            tl.store(out + q.to(tl.int64) * I + rn + i * BN, u.to(tl.bfloat16))
            q = tl.load(links + P + q)


@triton.jit
def _down(
    x, xs, w, s, chosen, links, out, P, D: tl.constexpr, K: tl.constexpr, G: tl.constexpr, BN: tl.constexpr,
    NB: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_gate_up`, for the D rows of w2 and each pair's own activations."""
    p = tl.program_id(1)
    W: tl.constexpr = K // 8
    MASKED: tl.constexpr = K // 32 != G
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tl.load(links + p) == 0:
        return
    e = tl.load(chosen + p).to(tl.int64)
    rn = tl.program_id(0) * (BN * NB) + tl.arange(0, BN)
    rg = tl.arange(0, G)
    r4 = tl.arange(0, 4)
    words = rg[None, :, None] * 4 + r4[None, None, :]
    groups = rg[None, :]
    wm = (groups < K // 32)[:, :, None]
    sm = groups < K // 32
    wp = w + e * (D * W) + rn[:, None, None] * W + words
    sp = s + e * (D * (K // 32)) + rn[:, None] * (K // 32) + groups
    wa = fetch(wp, wm, MASKED)
    sa = fetch(sp, sm, MASKED)
    for i in tl.static_range(NB):
        ca = wa
        da = sa
        if i + 1 < NB:
            wa = fetch(wp + (i + 1) * BN * W, wm, MASKED)
            sa = fetch(sp + (i + 1) * BN * (K // 32), sm, MASKED)
        q = p
        while q >= 0:
            x0, x1, x2, x3 = _planes(x + q.to(tl.int64) * (4 * W), words, wm, W, MASKED)
            xscale = fetch(xs + q * (K // 128) + groups // 4, sm, MASKED)
            tl.store(out + q.to(tl.int64) * D + rn + i * BN, _row_sums(ca, da, x0, x1, x2, x3, xscale, PLAIN))
            q = tl.load(links + P + q)
