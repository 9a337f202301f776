"""Muon against the singular value decomposition, AdamW against torch's, the schedule against its description."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fathom.train.config import OptimConfig
from fathom.train.optim import UPDATE_RMS, Optimizer, is_matrix, learning_rate, orthogonalise


def polar(a: Tensor) -> Tensor:
    """The nearest orthogonal matrix: U V^T of the decomposition, in double precision."""
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return (u @ vh).float()


@pytest.mark.parametrize("shape", [(64, 64), (3, 32, 96), (2, 96, 32), (24, 512)])
def test_newton_schulz_goes_to_the_polar_factor(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a = torch.randn(shape)
    error = (orthogonalise(a, (8, 2)) - polar(a)).norm() / polar(a).norm()
    assert error < 2e-2


def test_singular_values_end_near_one_whatever_they_were() -> None:
    torch.manual_seed(1)
    u, v = polar(torch.randn(64, 64)), polar(torch.randn(64, 64))
    spread = u @ torch.diag(torch.logspace(0, -2.5, 64)) @ v
    values = torch.linalg.svdvals(orthogonalise(1e-4 * spread, (8, 2)))
    assert values.min() > 0.98
    assert values.max() < 1.02


def test_half_precision_iterations_stay_close() -> None:
    torch.manual_seed(2)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 64, 128), (8, 2), torch.bfloat16))
    assert values.min() > 0.9
    assert values.max() < 1.1


def test_a_zero_gradient_moves_nothing() -> None:
    assert orthogonalise(torch.zeros(2, 8, 4)).abs().max() == 0


class Part(nn.Module):
    """Parameters named as in the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.experts = nn.Module()
        self.experts.w13 = nn.Parameter(torch.randn(3, 8, 6))
        self.experts.w2 = nn.Parameter(torch.randn(3, 6, 4))
        self.wq_a = nn.Module()
        self.wq_a.weight = nn.Parameter(torch.randn(4, 6))
        self.embed = nn.Embedding(10, 6)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.randn(6))
        self.unused = nn.Parameter(torch.randn(4, 4))


def with_gradients(part: Part, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, p in part.named_parameters():
        if name != "unused":
            p.grad = torch.randn(p.shape, generator=g)


def muon_by_hand(w: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """Reference training 4, one matrix, with the decomposition in the place of Newton-Schulz."""
    momentum = torch.zeros_like(w)
    for g in gradients:
        momentum = 0.95 * momentum + g
        step = polar(0.95 * momentum + g) * UPDATE_RMS * math.sqrt(max(w.shape))
        w = w * (1 - lr * 0.1) - lr * step
    return w


def test_every_expert_gate_and_up_is_a_matrix_of_its_own() -> None:
    part, lr = Part(), 0.02
    optimizer = Optimizer(part.named_parameters(), OptimConfig(ns_steps=(8, 2), ns_dtype="float32"))
    before = {n: p.detach().clone() for n, p in part.named_parameters()}
    gradients: dict[str, list[Tensor]] = {n: [] for n in before}
    for seed in range(3):
        with_gradients(part, seed)
        for n, p in part.named_parameters():
            gradients[n] += [p.grad.clone()] if p.grad is not None else []
        optimizer.step(lr)
    for name, got in part.named_parameters():
        if not is_matrix(name, got) or name == "unused":
            continue
        matrices = [(e, rows) for e in range(3) for rows in (slice(0, 4), slice(4, 8))]
        places = matrices if name.endswith("w13") else list(range(3)) if name.endswith("w2") else [slice(None)]
        for at in places:
            want = muon_by_hand(before[name][at], [g[at] for g in gradients[name]], lr)
            assert torch.allclose(got.detach()[at], want, atol=3e-3), (name, at)


def test_a_parameter_without_a_gradient_stays() -> None:
    part = Part()
    optimizer = Optimizer(part.named_parameters(), OptimConfig())
    before = part.unused.detach().clone()
    with_gradients(part, 0)
    optimizer.step(0.1)
    assert torch.equal(part.unused, before)


def test_adamw_is_torchs() -> None:
    part, twin = Part(), Part()
    config = OptimConfig(eps=1e-8, decay_vectors=True)
    optimizer = Optimizer(part.named_parameters(), config)
    names = ["embed.weight", "norm.weight"]
    theirs = [p for n, p in twin.named_parameters() if n in names]
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for seed in range(5):
        with_gradients(part, seed)
        with_gradients(twin, seed)
        optimizer.step(0.01)
        reference.step()
    for name in names:
        assert torch.allclose(part.get_parameter(name), twin.get_parameter(name), atol=1e-6), name


def test_clip_scales_the_whole_gradient() -> None:
    part = Part()
    optimizer = Optimizer(part.named_parameters(), OptimConfig(clip=0.5))
    with_gradients(part, 1)
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in part.parameters() if p.grad is not None))
    assert optimizer.clip() == pytest.approx(total, rel=1e-5)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in part.parameters() if p.grad is not None))
    assert after == pytest.approx(0.5, rel=1e-3)


def test_the_schedule_warms_up_holds_and_falls_to_its_floor() -> None:
    rate = [learning_rate(i / 1000, i, 2.0, warmup=100, decay=0.4, floor=0.1) for i in range(1001)]
    assert rate[49] == pytest.approx(1.0)
    assert all(r == 2.0 for r in rate[99:601])
    assert rate[800] == pytest.approx(2.0 * 0.55)
    assert rate[1000] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rate[600:]))
