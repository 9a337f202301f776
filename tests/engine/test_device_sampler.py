"""Sampling where the logits are: equal to sampling on the host, to the exact law, and the same in any company."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fathom.api import SamplingParams
from fathom.engine.device_sampler import pick
from fathom.engine.sampler import Choice, Sampler, choose
from fathom.errors import SamplingError
from tests.engine.test_sampler import Allow, Broken, Edge, brute

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
device = pytest.mark.parametrize("device", ["cpu", GPU])


def taken(logits_SV: Tensor, samplers: Sequence[Sampler], device: str) -> list[Choice | Exception]:
    """The choices made on the device."""
    return choose(logits_SV.to(device), samplers, pick)


def tokens(found: Sequence[Choice | Exception]) -> list[int]:
    return [choice[0] for choice in found if not isinstance(choice, Exception)]


def sampler(n: int, size: int) -> Sampler:
    """One of many kinds: greedy and drawn, cut and whole, guided and free, with and without log probabilities."""
    params = SamplingParams(
        temperature=(0.0, 0.5, 1.0, 2.0)[n % 4],
        top_p=(1.0, 0.9, 0.99)[n % 3],
        top_k=(None, None, 40, 3, None)[n % 5],
        seed=n,
        logprobs=(None, 0, 5)[n % 3],
    )
    return Sampler(params, Allow(range(n, size, 2), size) if n % 7 == 3 else None)


def noise(*shape: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


@device
@pytest.mark.parametrize("size", [1, 50, 1283, 5001])
@pytest.mark.parametrize("ties", [False, True])
def test_it_equals_sampling_on_the_host(size: int, ties: bool, device: str) -> None:
    steps = noise(10, 40, size)
    if ties:
        steps = steps.bfloat16().float()
    here, there = [[sampler(n % max(size, 2), size) for n in range(40)] for _ in range(2)]
    for logits in steps:
        for want, got in zip(choose(logits, here), taken(logits, there, device), strict=True):
            if isinstance(want, Exception) or isinstance(got, Exception):
                assert type(want) is type(got)
                continue
            assert got[0] == want[0]
            assert (got[1] is None) == (want[1] is None)
            if got[1] and want[1]:
                assert math.isclose(got[1].logprob, want[1].logprob, rel_tol=1e-7, abs_tol=1e-7)
                assert [i for i, _ in got[1].top] == [i for i, _ in want[1].top]
                assert [x for _, x in got[1].top] == pytest.approx([x for _, x in want[1].top], rel=1e-7, abs=1e-7)
    assert [s.random.getstate() for s in here] == [s.random.getstate() for s in there]


@device
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 30}, {"top_p": 0.9, "top_k": 30}])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_follow_the_distribution(cut: dict[str, float], ties: bool, device: str) -> None:
    """Pearson's chi-square, tokens that are expected less than ten times as one."""
    logits = noise(300, spread=2.0)
    if ties:
        logits = (logits * 2).round() / 2
    n, found = 20_000, torch.zeros(300)
    drawn = Sampler(SamplingParams(temperature=0.8, seed=7, **cut))  # type: ignore[arg-type]
    for _ in range(n // 1000):
        found += torch.tensor(tokens(taken(logits.expand(1000, -1), [drawn] * 1000, device))).bincount(minlength=300)
    expected = n * torch.tensor(brute(logits.tolist(), 0.8, **cut))  # type: ignore[arg-type]
    assert not found[expected == 0].any()
    rare = expected < 10
    seen, due = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (found, expected))
    chi2, freedom = float(((seen - due).square() / due.clamp_min(1e-9)).sum()), len(due) - 1
    # The 99.9 % point, by Wilson and Hilferty.
    assert chi2 < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("device", "size"), [("cpu", 50), ("cpu", 2049), pytest.param("cuda", 129_280, marks=GPU.marks)]
)
def test_a_row_is_the_same_alone_and_in_any_company(device: str, size: int) -> None:
    """Tokens and every bit of the log probabilities, in any place, among rows with other parameters."""
    draw, steps = random.Random(size), noise(8, 32, size)
    lonely, samplers = [[sampler(n, size) for n in range(32)] for _ in range(2)]
    for logits in steps:
        alone = [taken(logits[n : n + 1], [lonely[n]], device)[0] for n in range(32)]
        order = draw.sample(range(32), 32)
        cuts = [0, *sorted(draw.sample(range(1, 32), 3)), 32]
        for start, end in pairwise(cuts):
            some = order[start:end]
            assert taken(logits[some], [samplers[n] for n in some], device) == [alone[n] for n in some]


@device
def test_of_equals_the_lowest_ids(device: str) -> None:
    """Greedy, at the border of the nucleus, at that of the k likeliest, among alternatives; both zeros are equal."""
    logits = torch.tensor([-0.0, 0.0] * 4 + [0.0])
    logits[8] = -1.0
    greedy = Sampler(SamplingParams(temperature=0, logprobs=3))
    ((token, found),) = (c for c in taken(logits[None], [greedy], device) if not isinstance(c, Exception))
    assert token == 0 and found is not None and [i for i, _ in found.top] == [0, 1, 2]
    for params, kept in ((SamplingParams(top_p=0.5, seed=1), 5), (SamplingParams(top_k=3, seed=1), 3)):
        drawn = tokens(taken(logits.expand(200, -1), [Sampler(params)] * 200, device))
        assert set(drawn) == set(range(kept))


@device
def test_the_largest_uniform_number_finds_a_token_with_a_share(device: str) -> None:
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=5)):
        last = Sampler(params, Allow([2, 4], 9))
        last.random = Edge()
        assert tokens(taken(torch.zeros(1, 9), [last], device)) == [4]


@device
def test_extremes_harm_nobody(device: str) -> None:
    """A temperature next to nothing, logits that are no numbers: the neighbours' tokens are theirs, every id exists."""
    rows = torch.tensor([[1.0, 30.0, -math.inf, 29.0], [math.nan] * 4, [-math.inf] * 4, [math.inf, 0, 0, 0]])
    cold = SamplingParams(temperature=5e-324, top_p=0.9, seed=1)
    for params in (cold, SamplingParams(top_k=2), SamplingParams(), SamplingParams(temperature=0)):
        found = tokens(taken(rows[[1, 0, 2, 3, 0]], [Sampler(p) for p in (params, cold, params, params, cold)], device))
        assert found[1] == found[4] == 1
        assert all(0 <= token < 4 for token in found)


@device
def test_guides_allow_are_told_and_fail_alone(device: str) -> None:
    guide = Allow([3, 8, 18], 19)
    guides = (Broken([], 19), None, Allow([], 19), guide)
    samplers = [Sampler(SamplingParams(seed=1, top_p=0.99), g) for g in guides]
    for row in noise(40, 19, spread=4.0):
        broken, free, nothing, _ = taken(row.expand(4, -1), samplers, device)
        assert isinstance(broken, ZeroDivisionError) and isinstance(nothing, SamplingError)
        assert isinstance(free, tuple)
    assert len(guide.told) == 40 and set(guide.told) == {3, 8, 18}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_host_waits_once() -> None:
    """With rows of every kind."""
    logits = noise(32, 1283).cuda()
    samplers = [sampler(n, 1283) for n in range(32)]
    choose(logits, samplers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            choose(logits, samplers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]) == 1
