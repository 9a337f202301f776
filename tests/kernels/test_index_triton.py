"""The indexer's choice on a GPU (or under the interpreter) against a sort."""

import pytest
import torch
from torch import Tensor

from fathom.kernels.testing import INTERPRETED, device, poisoned

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import index_triton as ops  # noqa: E402
from fathom.kernels.decode import Tokens  # noqa: E402

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
PER, K = 32, 8 if INTERPRETED else 512
SEEN = (3, 8, 40, 63, 64, 65, 250) if INTERPRETED else (100, 512, 513, 1023, 8192, 8193, 16384, 40000)


def reference(scores: Tensor, seen: int, pages: Tensor) -> list[int]:
    """The best, equal ones earlier first, in the order of the sequence, as rows; -1 behind the last."""
    order = sorted(range(seen), key=lambda i: (-scores[i].item(), i))[:K]
    rows = [int(pages[i // PER]) * PER + i % PER for i in sorted(order)]
    return rows + [-1] * (K - len(rows))


@pytest.mark.parametrize("kind", ["normal", "coarse", "equal", "close"])
def test_the_k_best_in_order(kind: str) -> None:
    most, count = max(SEEN) + 20 & ~3, len(SEEN) + 1
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn((count, most), generator=generator)
    if kind == "coarse":
        scores = (scores * 3).round()
    elif kind == "equal":
        scores = torch.zeros(count, most)
        scores[:, ::3] = -0.0
    elif kind == "close":
        scores = 1 + scores * 2**-20
    pages = torch.stack([torch.randperm(most // PER + 1, generator=generator) for _ in range(count)]).int()
    slots = torch.tensor([*range(count - 1), -1], dtype=torch.int32)
    positions = torch.tensor([4 * n + i % 4 - 1 for i, n in enumerate((*SEEN, 0))], dtype=torch.int32).clamp_min(0)
    tokens = Tokens(slots.to(DEVICE), positions.to(DEVICE), torch.empty(0))
    with poisoned():
        got = ops.choose(scores.to(DEVICE), tokens, pages.to(DEVICE), PER, K)
    for i, n in enumerate(SEEN):
        assert got[i].tolist() == reference(scores[i], n, pages[i]), (kind, n)
    assert got[-1].tolist() == [-1] * K
