"""Sums that their readers make, against torch's: each rank a stream of one GPU here, with a mailbox of its own.

On one GPU ranks can take each other's places and wait for ever: shapes are small, nothing is launched early, and a rank
that has waited for half a minute gives up, so that a failure is one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import reduce

import pytest
import torch
from torch import Tensor

from fathom.kernels import cuda, mailbox
from fathom.kernels.mailbox import Mailbox, Unsummed, resident

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import streams_cuda

DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mailbox.works(DEVICE, 2), reason="kernels that sum need Hopper or newer"),
]
Boxes = Callable[[int], list[Mailbox]]


@pytest.fixture
def boxes_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Boxes]:
    """For so many ranks."""
    monkeypatch.setattr(cuda, "DEPENDENT", False)
    timers = []

    def made(ranks: int) -> list[Mailbox]:
        memory = [torch.zeros(mailbox.words(ranks), dtype=torch.int64, device=DEVICE) for _ in range(ranks)]
        places = [words.data_ptr() for words in memory]
        boxes = [Mailbox(rank, places, memory[rank], resident(DEVICE)) for rank in range(ranks)]
        for box in boxes:
            timers.append(threading.Timer(30, box.give_up))
            timers[-1].start()
        torch.cuda.synchronize()
        return boxes

    yield made
    for timer in timers:
        timer.cancel()


def streams_for(ranks: int) -> list[torch.cuda.Stream]:
    """With memory of their own: to ask the device for some may mean to wait for it, and so for a rank that waits."""
    made = [torch.cuda.Stream() for _ in range(ranks)]
    for stream in made:
        with torch.cuda.stream(stream):
            kept = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in (1 << 26, *[1 << 20] * 64)]
            del kept
    torch.cuda.synchronize()
    return made


def parts_of(ranks: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, generator=g, device=DEVICE).bfloat16() for _ in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_one_after_another(ranks: int, boxes_of: Boxes) -> None:
    """Each rank makes all of its sums without waiting for the host: those of other sizes share the mailbox."""
    rng, boxes, streams = random.Random(ranks), boxes_of(ranks), streams_for(ranks)
    shapes = [(rng.randint(1, 40), 2 * rng.randint(1, 3000)) for _ in range(60)]
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


@pytest.mark.parametrize("hidden", [256, 4096, 7168])
def test_the_streams_take_the_sum_as_if_it_were_there(hidden: int, boxes_of: Boxes) -> None:
    rng, boxes, streams = random.Random(hidden), boxes_of(2), streams_for(2)
    fn = torch.randn(24, 4 * hidden, device=DEVICE)
    for turn, tokens in enumerate((1, 1, 7, 2, 4, 1, 16, 32, 3, 64, 1, *rng.choices(range(1, 65), k=8))):
        slices, rows = streams_cuda._grid(tokens, hidden)
        if slices * rows > resident(DEVICE) // 2:
            continue
        parts = parts_of(2, (tokens, hidden), turn)
        x, post, comb = (torch.randn(tokens, *shape, device=DEVICE) for shape in ((4, hidden), (4,), (4, 4)))
        x = x.bfloat16()
        want = streams_cuda.after(torch.add(*parts), x, post, comb, fn)
        torch.cuda.synchronize()
        found = []
        for rank in rng.sample(range(2), 2):
            with torch.cuda.stream(streams[rank]):
                found.append(streams_cuda.after(Unsummed(parts[rank], boxes[rank]), x, post, comb, fn))
        torch.cuda.synchronize()
        for got in found:
            first, second = (streams_cuda._projected[out][1][..., :25] for out in (got, want))
            assert torch.equal(got, want) and torch.equal(first, second), (turn, tokens)


def test_a_graph_sums_anew_each_time_it_is_launched(boxes_of: Boxes) -> None:
    """Also when the numbers of sums begin anew."""
    boxes, streams, graphs = boxes_of(2), streams_for(2), [torch.cuda.CUDAGraph() for _ in range(2)]
    for box in boxes:
        box._numbers.fill_(-6)
    parts, found = parts_of(2, (2, 256), 0), []
    for rank, box in enumerate(boxes):
        with torch.cuda.graph(graphs[rank], stream=streams[rank]):
            found.append(box.sum(box.sum(parts[rank])))
    for seed in range(1, 8):
        for part, new in zip(parts, parts_of(2, (2, 256), seed), strict=True):
            part.copy_(new)
        want = 2 * torch.add(*parts)  # both ranks have the sum then
        torch.cuda.synchronize()
        for rank in (seed % 2, 1 - seed % 2):
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got in found), seed


def test_nobody_waits_for_who_is_gone(boxes_of: Boxes) -> None:
    box, part, end = boxes_of(2)[0], parts_of(1, (1, 4096), 1)[0], torch.cuda.Event()
    assert not box.takes(part.float()) and not box.takes(part[:, :3])
    box.sum(part)
    end.record()
    time.sleep(0.2)
    assert not end.query()
    box.give_up()
    time.sleep(0.2)
    assert end.query()
