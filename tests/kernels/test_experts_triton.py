"""FP4 experts on a GPU (or under the interpreter) against float64 sums over the stored weights."""

import pytest
import torch
from torch import Tensor

from fathom.kernels.experts import gated
from fathom.kernels.quant import dequantize_fp4, fp8_sim, quantize_fp4, unpack_fp4
from fathom.kernels.testing import INTERPRETED, device, error, poisoned

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import experts_few_triton as ops  # noqa: E402
from fathom.kernels import quant_triton  # noqa: E402
from fathom.kernels.experts_many_triton import many  # noqa: E402
from fathom.kernels.experts_pairs_triton import Fp4Experts, combine  # noqa: E402
from fathom.kernels.experts_plan_triton import planned  # noqa: E402
from fathom.kernels.quant_triton import PAIRS, form_of, quantise  # noqa: E402
from fathom.kernels.words import from_words, to_words  # noqa: E402

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
LIMIT = 10.0
K = 2 if INTERPRETED else 3
TOLERANCE = 3e-2 if INTERPRETED else 8e-3
"""Of the whole: a different last bit before the second quantisation is a different e4m3 value now and then. So 7.5e-5
of the hidden row, which is what FP16 sums cost, become 5.3e-3 of the result; `test_each_product_alone` is closer. The
interpreter also truncates to BF16 where the device rounds."""
SHAPES = ((3, 128, 128), (3, 384, 128)) if INTERPRETED else ((16, 512, 128), (24, 4096, 1024), (9, 1536, 2048))


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def stored(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights of about unit product, with scales that differ from block to block."""
    random = torch.Generator().manual_seed(seed)
    rough = torch.exp2(torch.randint(-3, 3, (*shape[:-1], shape[-1] // 32), generator=random))
    return quantize_fp4(rand(*shape, seed=seed, scale=shape[-1] ** -0.5) * rough.repeat_interleave(32, -1).to(DEVICE))


def layer(e: int, d: int, i: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Fp4Experts]:
    raw = (*stored(e, 2 * i, d, seed=1), *stored(e, d, i, seed=2))
    return raw, Fp4Experts.load(raw[0].clone(), raw[1], raw[2].clone(), raw[3])


def routing(t: int, e: int, k: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(t)])
    return chosen.int().to(DEVICE), torch.rand(t, k, generator=generator).to(DEVICE)


def by_hand(x: Tensor, chosen: Tensor, shares: Tensor, raw: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """One pair after the other in float64, rounded where the model rounds."""
    w13, w2 = dequantize_fp4(raw[0], raw[1]).double(), dequantize_fp4(raw[2], raw[3]).double()
    rows, out = fp8_sim(x.float(), 128).double(), torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    for t in range(x.shape[0]):
        for j, e in enumerate(chosen[t].tolist()):
            a, b = (w13[e] @ rows[t]).chunk(2)
            u = torch.nn.functional.silu(a.clamp(max=LIMIT)) * b.clamp(-LIMIT, LIMIT) * shares[t, j]
            out[t] += w2[e] @ fp8_sim(u.bfloat16().float(), 128).double()
    return out


def test_repacked_words_hold_every_code_once() -> None:
    w, _ = stored(3, 8, 64, seed=5)
    arranged = to_words(w.clone())
    assert torch.equal(from_words(arranged), w)
    words = arranged.long() & 0xFFFFFFFF
    codes = unpack_fp4(w).unflatten(-1, (-1, 8)).long()
    for j in range(8):
        magnitude, sign = 8 * (j // 2) + 3 * (j % 2), 8 * (j // 2) + 6 + j % 2
        assert torch.equal((words >> magnitude) & 7 | ((words >> sign) & 1) << 3, codes[..., j])


@pytest.mark.parametrize("k", [128, 384, 4096, 7168])
def test_quantise_is_the_reference_to_the_bit(k: int) -> None:
    x = rand(5, k, seed=7) * torch.exp2(rand(5, k // 128, seed=8) * 6).repeat_interleave(128, -1)
    x[1] = 0
    x[2, :128] = 448.0 * 2**-3
    want = fp8_sim(x, 128)
    with poisoned():
        (plain, scales), (pairs, _), grid = quantise(x), quantise(x, PAIRS), quant_triton.fp8_sim(x, 128)
        assert torch.equal(grid, want)
        assert torch.equal(quant_triton.fp8_sim(x.bfloat16(), 64), fp8_sim.__wrapped__(x.bfloat16(), 64))
    full = scales.repeat_interleave(128, -1)
    assert torch.equal(plain.float() * full, want)
    words = pairs.view(torch.float16).view(5, 4, k // 8, 2).permute(0, 2, 3, 1).reshape(5, k)
    assert torch.equal(words.float() * full, want)
    known = form_of(grid)
    assert known and torch.equal(known[0].float(), plain.float()) and torch.equal(known[1], scales)
    assert form_of(x) is None


@pytest.mark.parametrize("width", [128, 384, 2048])
def test_gated(width: int) -> None:
    x = rand(3, 2 * width, seed=9, scale=8).bfloat16()
    a, b = x.double().chunk(2, -1)
    want = torch.nn.functional.silu(a.clamp(max=LIMIT)) * b.clamp(-LIMIT, LIMIT)
    with poisoned():
        plain, grid = (quant_triton.gated(x, LIMIT, quantize) for quantize in (False, True))
    assert error(plain, want) < (6e-3 if INTERPRETED else 3e-3)
    assert torch.equal(grid, fp8_sim.__wrapped__(plain, 128))
    values, scales = form_of(grid) or (grid, grid)
    assert torch.equal(values.float() * scales.repeat_interleave(128, -1), grid.float())
    assert error(grid, gated.__wrapped__(x, LIMIT, True)) < 2e-2


@pytest.mark.parametrize("tokens", [1, 2] if INTERPRETED else [1, 2, 7, 8, 33, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens(shape: tuple[int, int, int], tokens: int) -> None:
    raw, weights = layer(*shape)
    x, (chosen, shares) = rand(tokens, shape[1], seed=tokens).bfloat16(), routing(tokens, shape[0], K)
    with poisoned():
        got = ops.few(x, chosen, shares, weights, LIMIT)
    assert error(got, by_hand(x, chosen, shares, raw)) < TOLERANCE


def test_each_product_alone() -> None:
    """Without the second quantisation between them the errors are those of FP16 sums over eight weights."""
    raw, weights = layer(*SHAPES[1])
    _, d, i = SHAPES[1]
    (x, scales), (chosen, shares) = quantise(rand(3, d, seed=4), PAIRS), routing(3, SHAPES[1][0], K)
    rows, links = fp8_sim(rand(3, d, seed=4), 128).double(), ops.chain(chosen)
    w13, w2 = dequantize_fp4(raw[0], raw[1]).double(), dequantize_fp4(raw[2], raw[3]).double()
    a, b = torch.einsum("pij,pj->pi", w13[chosen.flatten().long()], rows.repeat_interleave(K, 0)).chunk(2, -1)
    want = torch.nn.functional.silu(a.clamp(max=LIMIT)) * b.clamp(-LIMIT, LIMIT) * shares.flatten().unsqueeze(-1)
    with poisoned():
        hidden = ops.gate_up(x, scales, chosen, shares, weights, LIMIT, links)
    assert error(hidden, want) < (6e-3 if INTERPRETED else 2e-3)
    hidden = rand(3 * K, i, seed=6)
    with poisoned():
        parts = ops.down(*quantise(hidden, PAIRS), chosen, weights, links)
    want = torch.einsum("pij,pj->pi", w2[chosen.flatten().long()], fp8_sim(hidden, 128).double())
    assert error(parts, want) < 3e-4
    assert torch.equal(combine(parts, K), parts.view(3, K, d).sum(1)) or K > 2


def test_a_token_of_few_has_the_same_bits_in_any_company() -> None:
    shape = SHAPES[1]
    _, weights = layer(*shape)
    tokens = 3 if INTERPRETED else 40
    x, (chosen, shares) = rand(tokens, shape[1], seed=1).bfloat16(), routing(tokens, shape[0], K)
    whole = ops.few(x, chosen, shares, weights, LIMIT)
    for t in range(0, tokens, 3):
        alone = ops.few(x[t : t + 1], chosen[t : t + 1], shares[t : t + 1], weights, LIMIT)
        assert torch.equal(alone, whole[t : t + 1])


@pytest.mark.parametrize("tokens", [9] if INTERPRETED else [1, 65, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_tokens(shape: tuple[int, int, int], tokens: int) -> None:
    raw, weights = layer(*shape)
    x, (chosen, shares) = rand(tokens, shape[1], seed=tokens).bfloat16(), routing(tokens, shape[0], K)
    with poisoned():
        got = many(x, chosen, shares, weights, LIMIT)
    assert error(got, by_hand(x, chosen, shares, raw)) < TOLERANCE


def test_a_token_of_many_has_the_same_bits_in_any_company() -> None:
    """The whole takes wider tiles than its parts."""
    shape = SHAPES[1]
    _, weights = layer(*shape)
    tokens = 9 if INTERPRETED else 600
    x, (chosen, shares) = rand(tokens, shape[1], seed=1).bfloat16(), routing(tokens, shape[0], K)
    whole = many(x, chosen, shares, weights, LIMIT)
    for first, last in ((0, 1), (3, tokens), (tokens - 5, tokens - 1), (tokens // 5, tokens // 3), (1, tokens // 2)):
        part = many(x[first:last], chosen[first:last], shares[first:last], weights, LIMIT)
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("apart", [11, 12])
def test_scales_as_far_apart_as_e4m3_holds(apart: int) -> None:
    """Further apart is the reference's. Blocks of zeros may have any scale."""
    e, d, i = SHAPES[0]
    w13, s13, w2, s2 = (*stored(e, 2 * i, d, seed=1), *stored(e, d, i, seed=2))
    s2.view(torch.uint8)[:, :, 0], s2.view(torch.uint8)[:, :, 1:] = 120, 120 - apart
    w13[:, :, 16:32], s13.view(torch.uint8)[:, :, 1] = 0, 1
    weights = Fp4Experts.load(w13.clone(), s13, w2.clone(), s2)
    x, (chosen, shares) = rand(9, d, seed=9).bfloat16(), routing(9, e, K)
    got = many(x, chosen, shares, weights, LIMIT)
    if apart == 12:
        assert got is NotImplemented
    else:
        assert error(got, by_hand(x, chosen, shares, (w13, s13, w2, s2))) < TOLERANCE


@pytest.mark.parametrize(("tokens", "experts", "wide"), [(20, 7, 16), (50, 7, 32), (400, 7, 128)])
def test_the_plan_covers_every_pair_once(tokens: int, experts: int, wide: int) -> None:
    chosen, _ = routing(tokens, experts, 3)
    with poisoned():
        plan = planned(chosen, experts)
    assert plan.wide == wide
    seen = [
        (int(e), p)
        for e, first, end in zip(plan.expert, plan.first, plan.end, strict=True)
        if e < experts
        for p in plan.pairs[int(first) : min(int(end), int(first) + wide)].tolist()
    ]
    assert sorted(p for _, p in seen) == list(range(3 * tokens)) == sorted(p for p in plan.pairs.tolist() if p >= 0)
    assert all(chosen.flatten()[p] == e for e, p in seen)
