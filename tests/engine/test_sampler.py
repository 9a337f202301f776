"""The sampler against a brute-force distribution and the chi-square law."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fathom.api import SamplingParams
from fathom.engine.sampler import Sampler, probabilities, sample
from fathom.errors import SamplingError


def brute(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Softmax, then the likeliest tokens one by one until they hold top_p: plain Python."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    shares = [w / sum(weights) for w in weights]
    kept: dict[int, float] = {}
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if sum(kept.values()) < top_p:
            kept[i] = shares[i]
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(len(shares))]


@pytest.mark.parametrize("seed", range(20))
def test_the_distribution_equals_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    logits = [draw.gauss(0, 3) for _ in range(draw.choice([1, 2, 7, 40]))]
    logits += logits[:1]
    temperature, top_p = draw.choice([0.1, 0.7, 1.0, 2.0]), draw.choice([1e-9, 0.3, 0.5, 0.95, 0.999, 1.0])
    got = probabilities(torch.tensor(logits, dtype=torch.float64), temperature, top_p)
    torch.testing.assert_close(got.tolist(), brute(logits, temperature, top_p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_distribution(top_p: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -8.0])
    sampler = Sampler(SamplingParams(temperature=0.9, top_p=top_p, seed=5))
    n = 4000
    counts = [0] * 5
    for _ in range(n):
        counts[sampler.choose(logits)] += 1
    expected = [n * p for p in brute(logits.tolist(), 0.9, top_p)]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0)
    chi2 = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e > 0)
    assert chi2 < 18.5, "beyond the 99.9 % point of four degrees of freedom"


def test_greedy_and_the_smallest_nucleus_take_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 1.0]])
    assert sample(logits, [Sampler(SamplingParams(temperature=0))] * 2) == [1, 0]
    assert sample(logits, [Sampler(SamplingParams(top_p=1e-6))] * 2) == [1, 0]


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(seed=7, top_p=0.9)
    alone = Sampler(params)
    one = [alone.choose(row) for row in logits]
    mine, other = Sampler(params), Sampler(SamplingParams(seed=8))
    assert [sample(torch.stack((row, row)), [other, mine])[1] for row in logits] == one
    assert [Sampler(SamplingParams(seed=9)).choose(row) for row in logits] != one


def test_a_seed_of_none_differs_from_run_to_run() -> None:
    logits = torch.zeros(1000)
    assert len({tuple(Sampler(SamplingParams()).choose(logits) for _ in range(1)) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1.0, "temperature -1.0 .* 0 .* 2"),
        ("temperature", 2.1, "temperature 2.1"),
        ("temperature", math.nan, "temperature nan"),
        ("top_p", 0.0, "top_p 0.0 .* at most 1"),
        ("top_p", 1.5, "top_p 1.5"),
        ("max_tokens", 0, "max_tokens 0 .* at least 1"),
        ("seed", -1, "seed -1 .* from 0"),
        ("seed", 2**63, "seed 9223372036854775808"),
        ("stop_ids", (3, -2), "stop_ids"),
    ],
)
def test_parameters_outside_their_range(field: str, value: object, words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
