"""The sampler against a brute-force distribution and the chi-square law."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fathom.api import Guide, Logprob, SamplingParams
from fathom.engine.sampler import Sampler, choose, logprob, nucleus
from fathom.errors import SamplingError


def brute(logits: Sequence[float], temperature: float, top_p: float = 1.0, top_k: int | None = None) -> list[float]:
    """Softmax; the k likeliest; of these the likeliest one by one until they hold top_p of their sum: plain Python."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    best = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    shares = {i: weights[i] / sum(weights[j] for j in best) for i in best}
    kept: dict[int, float] = {}
    for i in best:
        if sum(kept.values()) < top_p:
            kept[i] = shares[i]
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(weights))]


def pick(logits_V: Tensor, sampler: Sampler) -> int:
    """One token for one row."""
    (found,) = choose(logits_V.unsqueeze(0), [sampler])
    assert not isinstance(found, Exception)
    return found[0]


class Allow(Guide):
    """Allows these ids, and records what it is told."""

    def __init__(self, ids: Sequence[int] | None, size: int) -> None:
        self.ids, self.size, self.told = ids, size, list[int]()

    def allowed(self) -> bytes | None:
        if self.ids is None:
            return None
        return np.packbits(np.isin(np.arange(self.size), self.ids), bitorder="little").tobytes()

    def accept(self, token: int) -> None:
        self.told.append(token)


class Broken(Allow):
    """A guide with a fault."""

    def allowed(self) -> bytes | None:
        raise ZeroDivisionError("of the guide")


@pytest.mark.parametrize("seed", range(60))
def test_the_distribution_equals_brute_force(seed: int) -> None:
    """With ties, and with values of top-k and top-p that cut little, much and nothing."""
    draw = random.Random(seed)
    logits = [draw.gauss(0, 3) for _ in range(draw.choice([1, 2, 7, 40]))]
    logits += logits[:3]
    temperature, top_p = draw.choice([0.1, 0.7, 1.0, 2.0]), draw.choice([1e-9, 0.3, 0.5, 0.95, 0.999, 1.0])
    top_k = draw.choice([None, 1, 2, 5, 100])
    shares = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, -1).numpy()
    ids, kept = nucleus(shares, top_k, top_p)
    got = np.zeros(len(logits))
    got[ids] = kept / kept.sum()
    np.testing.assert_allclose(got, brute(logits, temperature, top_p, top_k), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8}, {"top_k": 3}, {"top_p": 0.9, "top_k": 3}])
def test_draws_follow_the_distribution(cut: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -8.0])
    sampler = Sampler(SamplingParams(temperature=0.9, seed=5, **cut))  # type: ignore[arg-type]
    n = 4000
    counts = [0] * 5
    for _ in range(n):
        counts[pick(logits, sampler)] += 1
    expected = [n * p for p in brute(logits.tolist(), 0.9, **cut)]  # type: ignore[arg-type]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0)
    chi2 = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e > 0)
    assert chi2 < 18.5, "beyond the 99.9 % point of four degrees of freedom"


class Edge(random.Random):
    """Draws the largest number below 1."""

    def random(self) -> float:
        return 1 - 2**-53


def test_the_largest_uniform_number_finds_a_token_with_a_share() -> None:
    sampler = Sampler(SamplingParams(), Allow([2, 4], 9))
    sampler.random = Edge()
    assert pick(torch.zeros(9), sampler) == 4


def test_greedy_and_the_smallest_cuts_take_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 1.0]])
    for params in (SamplingParams(temperature=0), SamplingParams(top_p=1e-6), SamplingParams(top_k=1)):
        assert choose(logits, [Sampler(params), Sampler(params)]) == [(1, None), (0, None)]


def test_a_temperature_next_to_nothing_is_greedy_and_harms_nobody() -> None:
    """A request may ask for 5e-324; divided by it a logit is infinite, and everybody in the step would have failed."""
    logits_SV = torch.tensor([[1.0, 30.0, -float("inf"), 29.0]] * 2)
    cold = Sampler(SamplingParams(temperature=5e-324, top_p=0.9, seed=1))
    assert [c if isinstance(c, Exception) else c[0] for c in choose(logits_SV, [cold, cold])] == [1, 1]


@pytest.mark.parametrize("size", [50, 1283])
def test_a_row_is_the_same_alone_and_in_any_company(size: int) -> None:
    """Tokens, log probabilities and random streams, among rows with other parameters."""
    draw = random.Random(size)
    steps = torch.randn(20, 32, size, generator=torch.Generator().manual_seed(0)) * 3

    def params(n: int) -> SamplingParams:
        return SamplingParams(
            temperature=(0.0, 0.5, 1.0, 2.0)[n % 4],
            top_p=(1.0, 0.9, 0.99)[n % 3],
            top_k=(None, None, 40, 3, None)[n % 5],
            seed=n,
            logprobs=(None, 0, 5)[n % 3],
        )

    def guide(n: int) -> Guide | None:
        return Allow(range(n, size, 2), size) if n % 7 == 3 else None

    alone = [[choose(row[None], [sampler])[0] for row in steps[:, n]] for n in range(32) for sampler in [
        Sampler(params(n), guide(n))
    ]]  # fmt: skip
    samplers = [Sampler(params(n), guide(n)) for n in range(32)]
    for t, logits in enumerate(steps):
        order = draw.sample(range(32), 32)
        found = choose(logits[order], [samplers[n] for n in order])
        assert found == [alone[n][t] for n in order]


def test_a_seed_of_none_differs_from_run_to_run() -> None:
    logits = torch.zeros(1000)
    assert len({pick(logits, Sampler(SamplingParams())) for _ in range(20)}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guide_allows_and_is_told(temperature: float) -> None:
    logits = torch.randn(40, 19, generator=torch.Generator().manual_seed(1)) * 4
    guide, free = Allow([3, 8, 18], 19), Allow(None, 19)
    samplers = [Sampler(SamplingParams(temperature=temperature, seed=1), g) for g in (guide, free)]
    for row in logits:
        choose(torch.stack((row, row)), samplers)
    assert set(guide.told) == {3, 8, 18}
    assert len(set(free.told)) > 3
    if not temperature:
        assert guide.told == [max((3, 8, 18), key=lambda i: row[i]) for row in logits.tolist()]


def test_a_guide_that_fails_or_allows_nothing_fails_alone() -> None:
    samplers = [Sampler(SamplingParams(temperature=0), g) for g in (Broken([], 9), None, Allow([], 9), Allow([2], 9))]
    broken, free, nothing, guided = choose(torch.eye(9)[:4], samplers)
    assert isinstance(broken, ZeroDivisionError)
    assert isinstance(nothing, SamplingError) and "no token fits" in str(nothing)
    assert (free, guided) == ((1, None), (2, None))


def test_a_draw_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, guided = Sampler(SamplingParams(seed=1)), Allow([2], 9)
    monkeypatch.setattr(wrong, "draw", lambda shares: 1 // 0)
    found = choose(torch.eye(9)[:2], [wrong, Sampler(SamplingParams(seed=1), guided)])
    assert isinstance(found[0], ZeroDivisionError) and found[1] == (2, None) and guided.told == [2]


def test_log_probabilities_are_the_model_s_own() -> None:
    """Before temperature, cuts and guide; equal alternatives in the order of their ids."""
    logits = torch.tensor([[1.0, 2.0, 2.0, -3.0, 0.5]])
    shares = [math.log(p) for p in brute(logits[0].tolist(), 1.0)]
    sampler = Sampler(SamplingParams(temperature=0.3, top_k=1, logprobs=3), Allow([3], 5))
    (found,) = choose(logits, [sampler])
    assert not isinstance(found, Exception)
    assert found[0] == 3 and found[1] is not None
    assert math.isclose(found[1].logprob, shares[3], rel_tol=1e-9)
    assert [i for i, _ in found[1].top] == [1, 2, 0]
    assert all(math.isclose(value, shares[i], rel_tol=1e-9) for i, value in found[1].top)


def test_no_alternatives_and_more_than_there_are() -> None:
    logs = np.log(np.array([0.25, 0.75]))
    assert logprob(logs, 0, 0) == Logprob(logs[0])
    assert [i for i, _ in logprob(logs, 0, 20).top] == [1, 0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1.0, "temperature -1.0 .* 0 .* 2"),
        ("temperature", 2.1, "temperature 2.1"),
        ("temperature", math.nan, "temperature nan"),
        ("top_p", 0.0, "top_p 0.0 .* at most 1"),
        ("top_p", 1.5, "top_p 1.5"),
        ("temperature", "0.5", "temperature '0.5' .* a number"),
        ("temperature", True, "temperature True .* a number"),
        ("top_k", 5.5, "top_k 5.5 .* a whole number"),
        ("top_k", 3.0, "top_k 3.0 .* a whole number"),
        ("seed", True, "seed True .* a whole number"),
        ("max_tokens", 1.5, "max_tokens 1.5 .* a whole number"),
        ("top_k", 0, "top_k 0 .* at least 1"),
        ("max_tokens", 0, "max_tokens 0 .* at least 1"),
        ("seed", -1, "seed -1 .* from 0"),
        ("seed", 2**63, "seed 9223372036854775808"),
        ("stop_ids", (3, -2), "stop_ids"),
        ("logprobs", 21, "logprobs 21 .* from 0 to 20"),
    ],
)
def test_parameters_outside_their_range(field: str, value: object, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
