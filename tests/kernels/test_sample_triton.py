"""Sampling on a GPU (or under the interpreter) against the torch reference: the very same tokens."""

import math
import random

import pytest
import torch
from torch import Tensor

from fathom.kernels.testing import INTERPRETED, device, poisoned

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import sample, sample_triton  # noqa: E402

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
SIZES = (1, 50, 2048, 4097) if INTERPRETED else (1, 50, 2048, 4097, 129_280)
ROWS = 6 if INTERPRETED else 32


def wishes(rows: int, draw: random.Random, cut: bool, counted: bool) -> Tensor:
    """A column for each row, with values that cut little, much and nothing."""

    def one() -> tuple[float, float, float, float]:
        k = draw.choice([None, 1, 3, 40, 10**6]) if counted else None
        p = draw.choice([1e-9, 0.3, 0.9, 0.99, 1.0]) if cut else 1.0
        return sample.wish(draw.choice([0.1, 0.7, 1, 2]), k, p, draw.choice([0.0, 1 - 2**-53, *[draw.random()] * 4]))

    return torch.tensor([one() for _ in range(rows)], dtype=torch.float64).T.contiguous().to(DEVICE)


def logits(kind: str, size: int, seed: int) -> Tensor:
    x = torch.randn(ROWS, size, generator=torch.Generator().manual_seed(seed)) * 3
    change = {
        "random": lambda: x,
        "equal": lambda: x * 0,
        "close": lambda: x * 1e-3,
        "in BF16": lambda: x.bfloat16().float(),
        "masked": lambda: x.masked_fill(torch.arange(size) % 3 != size // 2 % 3, -math.inf),
    }
    return change[kind]().to(DEVICE)


@pytest.mark.parametrize("kind", ["random", "equal", "close", "in BF16", "masked"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("cut", "counted"), [(True, True), (True, False), (False, False)])
def test_it_equals_the_reference(kind: str, size: int, cut: bool, counted: bool) -> None:
    x, wanted = logits(kind, size, seed=size), wishes(ROWS, random.Random(size), cut, counted)
    with poisoned():
        found = sample_triton.draw(x, wanted, cut, counted)
    assert torch.equal(found, sample.draw.__wrapped__(x, wanted, cut, counted))  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", SIZES[-1:])
def test_a_row_has_the_same_token_in_company(size: int) -> None:
    """Also where the company wants more than the row does."""
    x, wanted = logits("random", size, seed=3), wishes(ROWS, random.Random(4), True, True)
    wanted[1, ::2] = 0
    wanted[2, 0] = 1
    together = sample_triton.draw(x, wanted, True, True)
    for n in range(ROWS):
        counted, cut = bool(wanted[1, n] > 0), bool((wanted[1, n] > 0) | (wanted[2, n] < 1))
        alone = sample_triton.draw(x[n : n + 1], wanted[:, n : n + 1], cut, counted)
        assert int(alone) == int(together[n])
