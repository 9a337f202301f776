"""The indexer's choice on a GPU (or under the interpreter) against a sort."""

from types import SimpleNamespace
from typing import Any

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
SHORT = (3, 8, 40, 63, 64, 65, 250) if INTERPRETED else (100, 512, 513, 1023, 1024, 2047, 8191, 8192)
LONG = (7, 9, 129, 300) if INTERPRETED else (8193, 16384, 32767, 32769, 40000, 131072, 262143, 262144)
LENGTHS = (250, 300) if INTERPRETED else (1024, 2048, 4096, 8192, 8196, 32768, 65536, 131072, 262144)
"""Longest sequences, in scores: each number of scores that a thread of index.cu can have, alone and in clusters."""
KINDS = ("normal", "coarse", "equal", "close", "low", "together", "two", "patterns")


def made(kind: str, count: int, most: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn((count, most), generator=generator)
    if kind == "coarse":
        scores = (scores * 3).round()
    elif kind == "equal":
        scores = torch.zeros(count, most)
        scores[:, ::3] = -0.0
    elif kind == "close":
        scores = 1 + scores * 2**-20
    elif kind == "low":
        scores[torch.rand((count, most), generator=generator) < 0.97] = float("-inf")
    elif kind == "together":  # the best are neighbours
        scores[:, most // 3 : most // 3 + most // 20] += 9
    elif kind == "two":
        scores = torch.where(scores > 1, 2e-30, -1e-30)
        scores[:, most // 7] = 3e38
    elif kind == "patterns":
        scores = torch.randint(-(2**31), 2**31, (count, most), generator=generator).int().view(torch.float32)
        scores = torch.where(scores.isnan(), 0.0, scores)
    return scores


def chosen(scores: Tensor, seen: tuple[int, ...], k: int) -> tuple[list[list[int]], Tensor]:
    """Rows for a token of each length and for one without a slot; the pages."""
    count, most = len(seen) + 1, scores.shape[1]
    generator = torch.Generator().manual_seed(2)
    pages = torch.stack([torch.randperm(most // PER + 1, generator=generator) for _ in range(count)]).int()
    slots = torch.tensor([*range(count - 1), -1], dtype=torch.int32)
    positions = torch.tensor([4 * n + i % 4 - 1 for i, n in enumerate((*seen, 0))], dtype=torch.int32).clamp_min(0)
    tokens = Tokens(slots.to(DEVICE), positions.to(DEVICE), torch.empty(0))
    with poisoned():
        got = ops.choose(scores.to(DEVICE), tokens, pages.to(DEVICE), PER, k)
    return got.tolist(), pages


def reference(scores: Tensor, seen: int, pages: Tensor, k: int) -> list[int]:
    """The best, equal ones earlier first, in the order of the sequence, as rows; -1 behind the last."""
    values = scores[:seen].tolist()
    order = sorted(range(seen), key=lambda i: (-values[i], i))[:k]
    rows = [int(pages[i // PER]) * PER + i % PER for i in sorted(order)]
    return rows + [-1] * (k - len(rows))


def right(scores: Tensor, seen: tuple[int, ...], k: int = K) -> None:
    got, pages = chosen(scores, seen, k)
    for i, n in enumerate(seen):
        assert got[i] == reference(scores[i], n, pages[i], k), n
    assert got[-1] == [-1] * k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [SHORT, LONG], ids=["short", "long"])
def test_the_k_best_in_order(kind: str, seen: tuple[int, ...]) -> None:
    right(made(kind, len(seen) + 1, max(seen)), seen)


@pytest.mark.parametrize("most", LENGTHS)
def test_any_longest_sequence_and_any_k(most: int) -> None:
    for k in (1, K, 2 * K):
        right(made("normal", 4, most), (min(most, 3 * K), most - 1, most), k)


def test_rows_that_begin_anywhere() -> None:
    most = max(SHORT) + 3
    right(made("coarse", len(SHORT) + 1, most), SHORT)


@pytest.mark.skipif(INTERPRETED, reason="what the sort makes of them is the device's")
@pytest.mark.parametrize("seen", [SHORT, LONG], ids=["short", "long"])
def test_without_a_number_too_k_entries_are_chosen(seen: tuple[int, ...]) -> None:
    scores = made("normal", len(seen) + 1, max(seen))
    scores[:, ::5], scores[:, 1::7], scores[0] = float("nan"), -float("nan"), float("nan")
    got, pages = chosen(scores, seen, K)
    for i, n in enumerate(seen):
        rows = {int(pages[i][e // PER]) * PER + e % PER: e for e in range(n)}
        entries = [rows[row] for row in got[i] if row >= 0]
        assert len(entries) == min(n, K) and entries == sorted(set(entries))


@pytest.mark.skipif(INTERPRETED, reason="many tokens")
def test_a_token_alone_and_in_company_and_with_more_room() -> None:
    scores = made("coarse", 33, 32768)
    seen = tuple(1000 * i + 600 for i in range(32))
    got, pages = chosen(scores, seen, K)
    wide = torch.full((33, 262144), float("nan"))
    wide[:, :32768] = scores
    again, more = chosen(wide, seen, K)
    for i, n in enumerate(seen):
        assert got[i] == reference(scores[i], n, pages[i], K)
        assert again[i] == reference(scores[i], n, more[i], K)


@pytest.mark.parametrize("packed", [False, True])
def test_scores_in_one_round_and_in_several(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are fewer programs than blocks of keys each goes round; the choice stays."""
    g, number, dim = torch.Generator().manual_seed(3), 9 * ops.KEYS + 5, 64
    pages = torch.randperm(-(-number // PER) + 3, generator=g).int()
    rows = len(pages) * PER
    data = torch.randint(0, 256, (rows, dim // 2), generator=g).to(torch.uint8)
    scales = torch.full((rows, dim // 32), 127, dtype=torch.uint8)
    if not packed:
        data, scales = torch.randint(0, 120, (rows, dim), generator=g).to(torch.uint8), torch.rand(rows, generator=g)
    keys = SimpleNamespace(data=data.to(DEVICE), scales=scales.to(DEVICE), per=PER, packed=packed)
    memory: Any = SimpleNamespace(keys=keys, table=pages[None].to(DEVICE))
    where = torch.tensor([[0, 0, -1], [4 * number - 1, 4 * number - 700, 0]], dtype=torch.int32, device=DEVICE)
    tokens: Any = SimpleNamespace(slots=where[0], positions=where[1])
    q, weights = torch.randn(3, 8, dim, generator=g).bfloat16(), torch.randn(3, 8, generator=g).bfloat16()
    ask = (q.to(DEVICE), weights.to(DEVICE), tokens, memory, 32, 4 * number)
    with poisoned():
        once = ops.select(*ask)
        monkeypatch.setattr(ops, "_PROGRAMS", 1)
        assert torch.equal(ops.select(*ask), once)
