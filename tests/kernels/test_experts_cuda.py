"""FP4 experts on FP8 tensor cores against float64 sums over the stored weights, and against themselves alone."""

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import experts_cuda as ops
from fathom.kernels.experts import Down
from fathom.kernels.linear import Part
from fathom.kernels.quant import quantize_fp8
from fathom.kernels.quant_triton import quantise
from fathom.kernels.testing import error, poisoned
from tests.kernels.test_experts_triton import LIMIT, by_hand, layer, rand, routing

pytestmark = pytest.mark.gpu
TOLERANCE = 5e-3


SMALL, LARGE = (3, 512, 128), (24, 4096, 1024)


@pytest.mark.parametrize(
    ("shape", "tokens", "k"), [(SMALL, 1, 3), (SMALL, 20, 3), (LARGE, 1, 3), (LARGE, 33, 3), (LARGE, 64, 6)]
)
def test_experts_are_sums_by_hand(shape: tuple[int, int, int], tokens: int, k: int) -> None:
    """Three experts for 20 tokens: more pairs of one than are multiplied at once. 384 pairs: more than threads."""
    raw, weights = layer(*shape)
    x = rand(tokens, shape[1], seed=6).bfloat16()
    chosen, shares = routing(tokens, shape[0], k)
    with poisoned():
        got = ops.few(x, chosen, shares, weights, LIMIT)
    assert error(got, by_hand(x, chosen, shares, raw)) < TOLERANCE


def test_a_token_has_the_same_bits_in_any_company_and_split() -> None:
    _, weights = layer(8, 1536, 384)
    x, (chosen, shares) = rand(40, 1536, seed=6).bfloat16(), routing(40, 8, 3)
    alone = torch.cat([ops.few(x[t : t + 1], chosen[t : t + 1], shares[t : t + 1], weights, LIMIT) for t in range(40)])
    assert torch.equal(ops.few(x, chosen, shares, weights, LIMIT), alone)
    forms = [ops.Shape(*form) for form in ((1, 3, 4), (2, 4, 8), (4, 2, 2))]
    hidden = [ops.gate_up(*quantise(x), chosen, shares, weights, LIMIT, form) for form in forms]
    assert all(torch.equal(hidden[0], other) for other in hidden)
    parts = [ops.down(hidden[0], chosen, weights, form) for form in forms]
    assert all(torch.equal(parts[0], other) for other in parts)


def test_a_shared_expert_is_done_on_the_way() -> None:
    _, weights = layer(8, 1024, 384)
    x, (chosen, shares) = rand(9, 1024, seed=6).bfloat16(), routing(9, 8, 3)
    w, scale = quantize_fp8(rand(1024, 384, seed=7))
    shared = Down(rand(9, 768, seed=8).bfloat16(), Part(w, scale), LIMIT, True)
    with poisoned():
        got = ops.few(x, chosen, shares, weights, LIMIT, shared)
    assert torch.equal(got, ops.few(x, chosen, shares, weights, LIMIT, shared.product()))
