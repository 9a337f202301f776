"""Several linears in one launch on a GPU, against float64 and against themselves alone."""

import random

import pytest
import torch
from torch import Tensor

from fathom.kernels.linear import Part
from fathom.kernels.linear_cuda import gated_linear, linears
from fathom.kernels.quant import dequantize_fp8, fp8_sim, quantize_fp8
from fathom.kernels.quant_triton import note, quantise
from fathom.kernels.testing import error, poisoned

pytestmark = pytest.mark.gpu
TOLERANCE, EXACT = 3e-3, 2e-5
FIVE = ((1024, "quantised"), (512, "quantised"), (2048, "wide"), (512, "wide"), (64, "bf16"))
"""The products of a CSA layer's input."""


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def part(n: int, k: int, kind: str, seed: int) -> tuple[Part, Tensor]:
    """A part, and its weight as float64. Scales differ from block to block."""
    weight = rand(n, k, seed=seed) * rand(n, k, seed=seed + 1).exp2()
    if kind in ("wide", "bf16"):
        w = weight.bfloat16()
        return Part(w, dtype=torch.float32 if kind == "wide" else None), w.double()
    w, scale = quantize_fp8(weight)
    return Part(w, scale, quantised=kind == "quantised"), dequantize_fp8(w, scale).double()


def reference(x: Tensor, weight: Tensor, quantised: bool, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    v = x.float()
    if norm is not None:
        v = (v * (v * v).mean(-1, keepdim=True).add(eps).rsqrt() * norm.float()).bfloat16().float()
    return (fp8_sim.__wrapped__(v, 128) if quantised else v).double() @ weight.T


@pytest.mark.parametrize(("rows", "k"), [(1, 128), (5, 384), (8, 1024), (1, 4096), (11, 4096), (64, 4096), (32, 7168)])
def test_parts_of_all_forms(rows: int, k: int) -> None:
    parts = [part(n, k, kind, 10 * i) for i, (n, kind) in enumerate(FIVE)]
    x = rand(rows, k, seed=5).bfloat16() * 3
    with poisoned():
        got = linears(x, [p for p, _ in parts])
    for y, (p, weight) in zip(got, parts, strict=True):
        want = reference(x, weight, p.quantised)
        assert y.dtype == (p.dtype or torch.bfloat16)
        wide = y.dtype == torch.float32
        assert error(y, want) < (EXACT if wide else TOLERANCE), (p.quantised, y.shape, error(y, want))


@pytest.mark.parametrize("rows", [1, 40])
def test_normalised_and_quantised_inside(rows: int) -> None:
    parts = [part(n, 1024, "quantised", n) for n in (16384, 8192)]
    x, norm = rand(rows, 1024, seed=3).bfloat16(), rand(1024, seed=4).bfloat16()
    with poisoned():
        got = linears(x, [p for p, _ in parts], norm, 1e-6)
    for y, (_, weight) in zip(got, parts, strict=True):
        assert error(y, reference(x, weight, True, norm, 1e-6)) < TOLERANCE
    (alone,) = zip(*(linears(x[i : i + 1], [parts[0][0]], norm, 1e-6) for i in range(rows)), strict=True)
    assert torch.equal(torch.cat(alone), got[0])


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1024, 4096), (7, 384, 80), (33, 2048, 4096)])
def test_gated_and_quantised_inside(rows: int, k: int, n: int) -> None:
    p, weight = part(n, k, "quantised", 1)
    x = rand(rows, 2 * k, seed=3).bfloat16() * 4
    a, b = x.double().chunk(2, -1)
    hidden = (torch.nn.functional.silu(a.clamp(max=10)) * b.clamp(-10, 10)).bfloat16()
    with poisoned():
        got = gated_linear(x, p, 10.0, True)
    assert error(got, reference(hidden, weight, True)) < 2 * TOLERANCE
    alone = [gated_linear(x[i : i + 1], p, 10.0, True) for i in range(rows)]
    assert torch.equal(got, torch.cat(alone))


def test_what_is_known_is_what_would_be_rounded() -> None:
    p, _ = part(512, 1536, "quantised", 1)
    x = rand(19, 1536, seed=3).bfloat16()
    (inside,) = linears(x, [p])
    note(x, *quantise(x))
    assert torch.equal(linears(x, [p])[0], inside)


def in_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in FP16 and the powers of two of 64 columns each that they are to be multiplied with."""
    v = x.float().unflatten(1, (-1, 64))
    scale = v.abs().amax(-1).log2().floor().sub(14).exp2()
    return (v / scale.unsqueeze(-1)).half().flatten(1), scale


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_groups_have_their_own_columns(rows: int, halves: bool) -> None:
    (p, weight), groups, k = part(4096, 4096, "as it is", 1), 4, 4096
    x = rand(rows, groups * k, seed=2).bfloat16() * rand(rows, groups * k, seed=3).mul(4).exp2().bfloat16()
    form = in_halves(x) if halves else None
    with poisoned():
        (y,) = linears(x, (p,), groups=groups, halves=form)
    want = torch.einsum("tgk,gnk->tgn", x.double().unflatten(1, (groups, k)), weight.unflatten(0, (groups, -1)))
    assert error(y, want.flatten(1)) < TOLERANCE
    for i in range(rows):
        own = None if form is None else (form[0][i : i + 1], form[1][i : i + 1])
        assert torch.equal(linears(x[i : i + 1], (p,), groups=groups, halves=own)[0], y[i : i + 1])


def test_a_row_has_the_same_bits_in_any_company() -> None:
    parts = [part(n, 4096, kind, 10 * i)[0] for i, (n, kind) in enumerate(FIVE)]
    x, draw = rand(64, 4096, seed=5).bfloat16(), random.Random(0)
    alone = [torch.cat(rows) for rows in zip(*(linears(x[i : i + 1], parts) for i in range(64)), strict=True)]
    for _ in range(8):
        chosen = draw.sample(range(64), draw.randint(2, 64))
        for y, own in zip(linears(x[chosen], parts), alone, strict=True):
            assert torch.equal(y, own[chosen])
