"""Sums that their readers make, against those made before: each rank a stream of one GPU, with a mailbox of its own."""

from __future__ import annotations

import random
import threading
from functools import reduce

import pytest
import torch
from torch import Tensor

from fathom.kernels import mailbox
from fathom.kernels.mailbox import Mailbox, resident
from fathom.kernels.sums import Unsummed, whole

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import streams_cuda

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mailbox.works(DEVICE, 2), reason="kernels that sum need Hopper or newer"),
]


def boxes_of(ranks: int) -> list[Mailbox]:
    memory = [torch.zeros(mailbox.words(ranks), dtype=torch.int64, device=DEVICE) for _ in range(ranks)]
    made = [Mailbox(rank, [words.data_ptr() for words in memory], memory[rank]) for rank in range(ranks)]
    torch.cuda.synchronize()
    return made


def parts_of(ranks: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, generator=g, device=DEVICE).bfloat16() for _ in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_one_after_another(ranks: int) -> None:
    """Each rank makes all of its sums without waiting for the host: those of other sizes share the mailbox."""
    rng, boxes, streams = random.Random(ranks), boxes_of(ranks), [torch.cuda.Stream() for _ in range(ranks)]
    shapes = [(rng.randint(1, 40), 2 * rng.randint(1, 3000)) for _ in range(60)] + [(128, 4096)]
    parts = [parts_of(ranks, shape, seed) for seed, shape in enumerate(shapes)]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    for of_all in parts:
        for rank in rng.sample(range(ranks), ranks):
            with torch.cuda.stream(streams[rank]):
                assert boxes[rank].takes(of_all[rank])
                found[rank].append(boxes[rank].sum(of_all[rank]))
    torch.cuda.synchronize()
    for i, of_all in enumerate(parts):
        want = reduce(torch.add, of_all)
        assert all(torch.equal(sums[i], want) for sums in found), shapes[i]


def unsummed(last: Tensor, seed: int, box: Mailbox | None = None) -> Unsummed:
    """Of few tokens, every other time, with pairs of a token and an expert."""
    tokens, hidden = last.shape
    g = torch.Generator(DEVICE).manual_seed(seed)
    pairs = torch.randn(6 * tokens, hidden, generator=g, device=DEVICE) if tokens <= 8 and seed % 2 else None
    return Unsummed(last, pairs, box)


def streams_of(tokens: int, hidden: int) -> list[Tensor]:
    """x, post, comb."""
    x, post, comb = (torch.randn(tokens, *shape, device=DEVICE) for shape in ((4, hidden), (4,), (4, 4)))
    return [x.bfloat16(), post, comb]


@pytest.mark.parametrize("hidden", [256, 4096, 7168])
def test_the_streams_take_what_is_not_summed_yet(hidden: int) -> None:
    fn = torch.randn(24, 4 * hidden, device=DEVICE)
    for tokens in (1, 2, 3, 5, 8):
        y, given = unsummed(parts_of(1, (tokens, hidden), tokens)[0], 1), streams_of(tokens, hidden)
        got, want = streams_cuda.after(y, *given, fn), streams_cuda.after(whole(y), *given, fn)
        first, second = (streams_cuda._projected[out][1][..., :25] for out in (got, want))
        assert y.pairs is not None and torch.equal(got, want) and torch.equal(first, second), tokens


@pytest.mark.parametrize("hidden", [256, 4096, 7168])
def test_the_streams_take_the_sum_of_all_ranks(hidden: int) -> None:
    rng, boxes, streams = random.Random(hidden), boxes_of(2), [torch.cuda.Stream() for _ in range(2)]
    fn = torch.randn(24, 4 * hidden, device=DEVICE)
    for turn, tokens in enumerate((1, 1, 7, 2, 4, 1, 16, 32, 3, 64, 1, *rng.choices(range(1, 65), k=8))):
        slices, rows = streams_cuda._grid(tokens, hidden)
        if resident(DEVICE) // 2 < slices * rows <= resident(DEVICE):
            continue  # one GPU has no place for the blocks of two ranks, which wait for each other
        ys = [unsummed(part, turn, box) for part, box in zip(parts_of(2, (tokens, hidden), turn), boxes, strict=True)]
        given = streams_of(tokens, hidden)
        want = streams_cuda.after(torch.add(*(whole(y._replace(box=None)) for y in ys)), *given, fn)
        torch.cuda.synchronize()
        found = []
        for rank in rng.sample(range(2), 2):
            with torch.cuda.stream(streams[rank]):
                found.append(streams_cuda.after(ys[rank], *given, fn))
        torch.cuda.synchronize()
        for got in found:
            first, second = (streams_cuda._projected[out][1][..., :25] for out in (got, want))
            assert torch.equal(got, want) and torch.equal(first, second), (turn, tokens)


def test_nobody_waits_for_who_is_gone() -> None:
    box = boxes_of(2)[0]
    part = parts_of(1, (1, 4096), 1)[0]
    threading.Timer(0.2, box.give_up).start()
    box.sum(part)
    torch.cuda.synchronize()
    assert not box.takes(part.float()) and not box.takes(part[:, :3])
