"""Hyper-connections and routing on a GPU (or under the interpreter) against the torch references in float64."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fathom.kernels.sinkhorn import sinkhorn
from fathom.kernels.testing import INTERPRETED, device, error, poisoned

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import router_cuda, router_triton, streams_cuda, streams_triton  # noqa: E402
from fathom.kernels.quant_triton import quantise  # noqa: E402

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
SIZES = (128, 384) if INTERPRETED else (384, 4096, 7168)
ROUNDING = 6e-3 if INTERPRETED else 3e-3  # the interpreter truncates to BF16
ROUTERS = [router_triton] if INTERPRETED else [router_triton, router_cuda]
MODULES = [streams_triton] if INTERPRETED else [streams_triton, streams_cuda]
EPS, HC_EPS, ROUNDS, N = 1e-6, 1e-6, 20, 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("ops", MODULES)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 17] if INTERPRETED else [1, 3, 17, 200])
def test_before_and_after(ops: ModuleType, hidden: int, tokens: int) -> None:
    x, y = rand(tokens, N, hidden, seed=1).bfloat16(), rand(tokens, hidden, seed=2).bfloat16()
    fn, scale = rand(24, N * hidden, seed=3) * (N * hidden) ** -0.5, rand(3, seed=4)
    base, weight = rand(24, seed=5), rand(hidden, seed=6).bfloat16()
    with poisoned():
        out, post, comb = ops.before(x, fn, scale, base, weight, EPS, HC_EPS, ROUNDS)
        mixed = ops.after(y, x, post, comb)
    m = rms(x.flatten(1).double()) @ fn.double().T
    parts = [
        part * scale[i] + base.double().split((N, N, N * N))[i] for i, part in enumerate(m.split((N, N, N * N), -1))
    ]
    folded = ((parts[0].sigmoid() + HC_EPS).unsqueeze(-1) * x.double()).sum(1)
    assert error(out, rms(folded) * weight.double()) < 1.5 * ROUNDING
    noted = zip(quantise(out), quantise(out.clone()), strict=True)
    assert all(torch.equal(a.float(), b.float()) for a, b in noted)
    assert error(post, 2 * parts[1].sigmoid()) < 1e-5
    want = sinkhorn(parts[2].unflatten(-1, (N, N)), ROUNDS, HC_EPS)
    assert error(comb, want) < 1e-4
    total = post.double().unsqueeze(-1) * y.double().unsqueeze(1) + torch.einsum("tij,tid->tjd", want, x.double())
    assert error(mixed, total) < ROUNDING


@pytest.mark.parametrize("ops", MODULES)
@pytest.mark.parametrize("hidden", SIZES)
def test_the_head_folds(ops: ModuleType, hidden: int) -> None:
    x, fn = rand(5, N, hidden, seed=1).bfloat16(), rand(N, N * hidden, seed=3) * (N * hidden) ** -0.5
    scale, base, weight = rand(1, seed=4), rand(N, seed=5), rand(hidden, seed=6).bfloat16()
    with poisoned():
        out = ops.folded(x, fn, scale, base, weight, EPS, HC_EPS)
    gates = (rms(x.flatten(1).double()) @ fn.double().T * scale + base).sigmoid() + HC_EPS
    assert error(out, rms((gates.unsqueeze(-1) * x.double()).sum(1)) * weight.double()) < 1.5 * ROUNDING


@pytest.mark.parametrize("ops", MODULES)
def test_a_token_has_the_same_bits_in_company(
    ops: ModuleType,
) -> None:
    hidden = SIZES[-1]
    tokens = 9 if INTERPRETED or ops is streams_cuda else 400
    x, fn = rand(tokens, N, hidden, seed=1).bfloat16(), rand(24, N * hidden, seed=3) * (N * hidden) ** -0.5
    rest = rand(3, seed=4), rand(24, seed=5), rand(hidden, seed=6).bfloat16(), EPS, HC_EPS, ROUNDS
    whole = ops.before(x, fn, *rest)
    for first, last in ((0, 1), (4, 5), (8, 9), (3, 9)) if tokens == 9 else ((0, 128), (128, 384), (7, 399)):
        part = ops.before(x[first:last], fn, *rest)
        for a, b in zip(part, whole, strict=True):
            # The interpreter's products are numpy's, of which a row may depend on its place.
            assert error(a, b[first:last]) < 1e-3 if INTERPRETED else torch.equal(a, b[first:last])


@pytest.mark.parametrize("ops", ROUTERS)
def test_a_row_that_is_not_a_number_still_names_experts(ops: ModuleType) -> None:
    """Whose weights are read then: an id behind the last would end everyone's request, not only its own."""
    logits = torch.zeros(2, 16, device=DEVICE)
    logits[1] = float("nan")
    chosen, _ = ops.route(logits, torch.zeros(16, device=DEVICE), None, torch.zeros(2, device=DEVICE), 4, 1.0)
    assert chosen.min() >= 0 and chosen.max() < 16


@pytest.mark.parametrize("ops", ROUTERS)
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (32, 6), (256, 6), (384, 8)])
def test_routes(ops: ModuleType, experts: int, k: int) -> None:
    logits, bias = rand(40, experts, seed=1) * 4, rand(experts, seed=2)
    tokens = torch.arange(40, device=DEVICE)
    scores = torch.nn.functional.softplus(logits.double()).sqrt()
    with poisoned():
        chosen, shares = ops.route(logits, bias, None, tokens, k, 1.5)
    assert torch.equal(chosen.long(), (scores + bias.double()).topk(k, -1).indices)
    own = scores.gather(-1, chosen.long())
    assert error(shares, own / own.sum(-1, keepdim=True) * 1.5) < 1e-5
    table = torch.stack([torch.randperm(experts)[:k] for _ in range(50)]).to(DEVICE)
    with poisoned():
        chosen, shares = ops.route(logits, None, table, tokens + 3, k, 1.5)
    assert torch.equal(chosen.long(), table[tokens + 3])
    own = scores.gather(-1, chosen.long())
    assert error(shares, own / own.sum(-1, keepdim=True) * 1.5) < 1e-5


@pytest.mark.parametrize("ops", ROUTERS)
def test_equal_scores_go_to_the_lower_expert(ops: ModuleType) -> None:
    logits = torch.zeros(2, 16, device=DEVICE)
    chosen, _ = ops.route(logits, torch.zeros(16, device=DEVICE), None, torch.zeros(2, device=DEVICE), 4, 1.0)
    assert chosen.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.skipif(INTERPRETED, reason="CUDA C++")
@pytest.mark.parametrize("hidden", [384, 4096, 7168])
def test_what_is_done_ahead_is_what_would_be_done(hidden: int) -> None:
    """Streams projected where they are made, and results rounded where they are made; the same bits in company."""
    x, y = rand(9, N, hidden, seed=1).bfloat16(), rand(9, hidden, seed=2).bfloat16()
    fn, scale = rand(24, N * hidden, seed=3) * (N * hidden) ** -0.5, rand(3, seed=4)
    rest = scale, rand(24, seed=5), rand(hidden, seed=6).bfloat16(), EPS, HC_EPS, ROUNDS
    _, post, comb = streams_cuda.before(x, fn, *rest)
    with poisoned():
        mixed = streams_cuda.after(y, x, post, comb, fn)
        ahead = streams_cuda.before(mixed, fn, *rest)
        assert all(torch.equal(a, b) for a, b in zip(ahead, streams_cuda.before(mixed.clone(), fn, *rest), strict=True))
        rounded = zip(quantise(ahead[0]), quantise(ahead[0].clone()), strict=True)
        assert all(torch.equal(a.float(), b.float()) for a, b in rounded)
        alone = streams_cuda.before(mixed[4:5].contiguous(), fn, *rest)
    assert all(torch.equal(a[4:5], b) for a, b in zip(ahead, alone, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="CUDA C++")
@pytest.mark.parametrize("rows", [24, N])
def test_tokens_of_a_block_have_the_same_bits_alone(rows: int) -> None:
    """Whether they are mixed and projected one, two or four at once; also where a block has less than it could."""
    x, y = rand(64, N, 4096, seed=1).bfloat16(), rand(64, 4096, seed=2).bfloat16()
    post, comb = rand(64, N, seed=3), rand(64, N, N, seed=4)
    fn, out = rand(rows, N * 4096, seed=5), torch.empty_like(x)
    for tokens in (2, 5, 7, 8, 9, 18, 31, 64):
        with poisoned():
            sums = streams_cuda._turn(x[:tokens], fn, (y[:tokens], post[:tokens], comb[:tokens]), out[:tokens])
            for t in range(tokens):
                own, alone = torch.empty_like(x[:1]), (y[t : t + 1], post[t : t + 1], comb[t : t + 1])
                single = streams_cuda._turn(x[t : t + 1], fn, alone, own)
                assert torch.equal(own[0], out[t])
                assert torch.equal(single[0, :, : rows + 1], sums[t, :, : rows + 1])
