"""The mixing weights in numpy: what a token's are must not depend on the tokens beside it."""

import numpy as np
import pytest
import torch

from fathom.kernels.sinkhorn import mixing

EPS, ROUNDS = 1e-6, 20


def mixed(m: torch.Tensor, n: int) -> list[torch.Tensor]:
    scale, base = torch.tensor([0.7, 1.3, 2.0]), torch.linspace(-1, 1, (2 + n) * n)
    with torch.inference_mode():
        return list(mixing(m, scale, base, n, ROUNDS, EPS))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_token_has_the_same_bits_at_any_place(n: int) -> None:
    m = torch.randn(150, (2 + n) * n, generator=torch.Generator().manual_seed(n)) * 2
    whole = mixed(m, n)
    for start in range(0, 130, 7):
        for count in (1, 2, 3, 4, 5, 6, 8, 12, 13):
            for part, all_of in zip(mixed(m[start : start + count], n), whole, strict=True):
                assert torch.equal(part, all_of[start : start + count])


def test_rounds_in_float64() -> None:
    m = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    pre, post, comb = (x.double().numpy() for x in mixed(m, 4))
    logits = m.double().numpy() * np.repeat([0.7, 1.3, 2.0], (4, 4, 16)) + np.linspace(-1, 1, 24)
    gates = 1 / (1 + np.exp(-logits[:, :8]))
    c = logits[:, 8:].reshape(-1, 4, 4)
    c = np.exp(c) / np.exp(c).sum(-1, keepdims=True) + EPS
    c = c / (c.sum(-2, keepdims=True) + EPS)
    for _ in range(ROUNDS - 1):
        c = c / (c.sum(-1, keepdims=True) + EPS)
        c = c / (c.sum(-2, keepdims=True) + EPS)
    np.testing.assert_allclose(pre, gates[:, :4] + EPS, rtol=2e-6)
    np.testing.assert_allclose(post, 2 * gates[:, 4:], rtol=2e-6)
    np.testing.assert_allclose(comb, c, rtol=2e-5)
