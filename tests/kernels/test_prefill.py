"""A prompt's attention and indexer on a GPU (or under the interpreter) against float64, and cut at random."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fathom.kernels import prefill, quant
from fathom.kernels.decode import rotated
from fathom.kernels.stored import Keys, Rows
from fathom.kernels.testing import INTERPRETED, device, error, poisoned

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import prefill_index_triton as index  # noqa: E402
from fathom.kernels import prefill_triton as attention  # noqa: E402

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
TOLERANCE = 1e-2 if INTERPRETED else 4e-3  # the interpreter truncates to BF16
CLOSE = 1e-5
Attention = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g).to(DEVICE)


class Prompt:
    """Rows of a whole sequence and the queries of its last tokens."""

    def __init__(self, seed: int, ratio: int, length: int, heads: int, width: int, span: int, k: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.ratio, self.length, self.span = ratio, length, span
        self.rows, self.q = rand(g, length, width).bfloat16(), (rand(g, length, heads, width) * 2).bfloat16()
        self.entries = rand(g, length // ratio, width).bfloat16() if ratio else None
        self.sink, angle = rand(g, heads), rand(g, length, 32 if width > 64 else 8)
        self.turn = torch.stack((angle.cos(), angle.sin()), -1)
        self.chosen = self._choice(g, k) if k else None

    def _choice(self, g: torch.Generator, k: int) -> Tensor:
        chosen = torch.full((self.length, k), -1, dtype=torch.int32)
        for p in range(self.length):
            number = (p + 1) // self.ratio
            some = torch.randperm(number, generator=g)[:k].sort().values
            chosen[p, : len(some)] = some.int()
        return chosen.to(DEVICE)

    def part(self, start: int, end: int) -> Attention:
        """What the model has when it computes start .. end - 1: no later rows, no later entries."""
        entries = None if self.entries is None else self.entries[: end // self.ratio]
        chosen = None if self.chosen is None else self.chosen[start:end]
        near = self.rows[max(0, start - self.span + 1) : end]
        return self.q[start:end], near, entries, chosen, self.sink, self.turn[start:end]

    def attend(self, start: int, end: int) -> Tensor:
        with poisoned():
            return attention.attend(*self.part(start, end), start, self.ratio, self.span)

    def exact(self, p: int) -> Tensor:
        """One query in float64, before rounding: [H, C]."""
        rows = self.rows[max(0, p - self.span + 1) : p + 1]
        if self.entries is not None:
            some = (
                slice(0, (p + 1) // self.ratio) if self.chosen is None else self.chosen[p][self.chosen[p] >= 0].long()
            )
            rows = torch.cat((rows, self.entries[some]))
        q, rows = self.q[p].double(), rows.double()
        logits = torch.cat((q @ rows.T * rows.shape[1] ** -0.5, self.sink.double().unsqueeze(1)), 1)
        y = logits.softmax(-1)[:, :-1] @ rows
        return rotated(y, self.turn[p].unsqueeze(0) * self.turn.new_tensor((1.0, -1.0)))


SMALL = [(0, 45, 3, 64, 20, 0), (128, 300, 4, 64, 20, 0), (4, 90, 3, 64, 20, 7), (4, 70, 2, 64, 33, 24)]
LARGE = [
    (0, 300, 32, 512, 128, 0), (128, 1500, 32, 512, 128, 0), (128, 5000, 64, 512, 128, 0), (4, 1200, 32, 512, 128, 64),
    (4, 2600, 32, 512, 128, 512), (4, 2600, 64, 512, 128, 512), (4, 300, 4, 128, 128, 32), (128, 700, 4, 128, 128, 0),
    (0, 300, 4, 128, 128, 0),
]  # fmt: skip
PROMPTS = SMALL if INTERPRETED else LARGE


@pytest.mark.parametrize("shape", PROMPTS)
def test_attention_equals_float64(shape: tuple[int, int, int, int, int, int]) -> None:
    ratio, length, *rest = shape
    prompt, rng = Prompt(1, ratio, length, *rest), random.Random(2)
    for start in (0, rng.randrange(length), length - rng.randint(1, 9)):
        end = min(length, start + rng.randint(1, 12 if INTERPRETED else 300))
        got = prompt.attend(start, end)
        for p in {start, end - 1, rng.randrange(start, end)}:
            assert error(got[p - start], prompt.exact(p)) < TOLERANCE
        reference = prefill.attend.__wrapped__(*prompt.part(start, end), start, ratio, prompt.span)
        assert error(got, reference) < TOLERANCE


@pytest.mark.parametrize("shape", PROMPTS)
def test_attention_has_the_same_bits_however_it_is_cut(shape: tuple[int, int, int, int, int, int]) -> None:
    ratio, length, *rest = shape
    prompt, rng = Prompt(3, ratio, length, *rest), random.Random(4)
    first = max(0, length - 40 if INTERPRETED else length - 700)
    whole = prompt.attend(first, length)
    for pieces in (2, 5):
        cuts = [first, *sorted(rng.sample(range(first + 1, length), pieces)), length]
        assert torch.equal(torch.cat([prompt.attend(a, b) for a, b in pairwise(cuts)]), whole)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs nothing else")
@pytest.mark.parametrize("shape", [LARGE[0], LARGE[4]])
def test_attention_without_instructions_of_one_chip(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ratio, length, *rest = shape
    prompt = Prompt(11, ratio, length, *rest)
    first = prompt.attend(length - 200, length)
    monkeypatch.setattr(attention, "_hopper", lambda _: None)
    assert error(prompt.attend(length - 200, length), first) < TOLERANCE


def indexed(seed: int, count: int, number: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, w = quant.fp4_sim(rand(g, count, heads, dim)).bfloat16(), rand(g, count, heads) * (heads * dim) ** -0.5
    data, scales = Keys.empty(1, 1, dim, False, torch.device(str(DEVICE))).pack(rand(g, number, dim).bfloat16())
    return q, w, data.view(torch.float8_e4m3fn), scales.squeeze(1)


CASES = (
    [
        (5, 40, 3, 32, 8, 90), (3, 200, 4, 32, 16, 700), (20, 40, 4, 64, 32, 100), (9, 30, 4, 32, 32, 3),
        (3, 420, 2, 32, 8, 1660),
    ]
    if INTERPRETED
    else [
        (300, 2600, 64, 128, 512, 10000), (300, 600, 64, 128, 512, 1900), (77, 200, 64, 128, 512, 701),
        (130, 20011, 64, 128, 512, 79911), (300, 700, 4, 128, 32, 2500), (1, 9000, 64, 128, 512, 35999),
    ]
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_choice_is_that_of_exact_scores(case: tuple[int, int, int, int, int, int]) -> None:
    count, number, heads, dim, k, start = case
    number = max(number, (start + count) // 4)
    q, w, data, scales = indexed(5, count, number, heads, dim)
    with poisoned():
        got = index.select(q, w, data, scales, start, k)
    for t in {0, count - 1, count // 2}:
        sees = (start + t + 1) // 4
        mine = got[t][got[t] >= 0].long()
        assert len(mine) == min(k, sees) and (got[t, len(mine) :] == -1).all()
        assert (mine.diff() > 0).all() and (mine < sees).all()
        if sees > k:
            values = data[:sees].double() * scales[:sees].double().unsqueeze(1)
            score = ((q[t].double() @ values.T).relu() * w[t].double().unsqueeze(1)).sum(0)
            best = score.topk(k).values
            assert (score[mine] >= best[-1] - CLOSE * best[0].abs()).all()
            assert error(score[mine].sort().values, best.sort().values) < CLOSE
    reference = prefill.select.__wrapped__(q, w, data, scales, start, k)
    assert (got != reference).float().mean() < 0.02


@pytest.mark.parametrize("case", CASES)
def test_the_choice_is_the_same_however_it_is_cut(case: tuple[int, int, int, int, int, int]) -> None:
    count, number, heads, dim, k, start = case
    q, w, data, scales = indexed(6, count, max(number, (start + count) // 4), heads, dim)
    whole = index.select(q, w, data, scales, start, k)
    cut = random.Random(7).randrange(count)
    parts = [
        index.select(q[a:b], w[a:b], data[: (start + b) // 4], scales[: (start + b) // 4], start + a, k)
        for a, b in ((0, cut), (cut, count))
        if a < b
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_equal_scores_go_to_the_lower_entry() -> None:
    count, number, k = 6, 300, 16
    q, w, data, scales = indexed(8, count, number, 4, 64)
    data = data[torch.arange(number, device=data.device) % 3].contiguous()
    got = index.select(q, w.abs(), data, torch.ones_like(scales), 4 * number - count, k)
    values = data[:3].double()
    for t in range(count):
        best = ((q[t].double() @ values.T).relu() * w[t].abs().double().unsqueeze(1)).sum(0).argmax()
        assert got[t].tolist() == [int(best) + 3 * i for i in range(k)]
    nothing = index.select(torch.zeros_like(q), w, data, scales, 4 * number - count, k)
    assert (nothing == torch.arange(k, device=nothing.device)).all()


@pytest.mark.parametrize(("width", "rope", "per"), [(128, 64, 32), (192, 64, 1), (512, 64, 32)])
def test_rows_are_read_through_the_page_table(width: int, rope: int, per: int) -> None:
    g = torch.Generator().manual_seed(9)
    rows = Rows.empty(40, per, width, rope, torch.device(str(DEVICE)))
    for plane, new in zip(rows.planes, rows.pack(rand(g, 40, per, width).bfloat16()), strict=True):
        plane.copy_(new)
    table = torch.randperm(40, generator=g).int().view(2, 20).to(DEVICE)
    for first, count in ((0, 20 * per), (3 % per, 7), (20 * per - 1, 1), (0, 0)):
        with poisoned():
            got = index.read_rows(table, rows, 1, first, count)
        assert torch.equal(got, prefill.unpacked(rows, table, 1, first, count).to(got.device))
        assert torch.equal(got, prefill.read_rows.__wrapped__(table, rows, 1, first, count))


@pytest.mark.parametrize("packed", [False, True])
def test_keys_are_read_through_the_page_table(packed: bool) -> None:
    g = torch.Generator().manual_seed(10)
    store = Keys.empty(12, 32, 128, packed, torch.device(str(DEVICE)))
    values = rand(g, 12, 32, 128) * torch.logspace(-3, 3, 32).view(1, 32, 1).to(DEVICE)
    for plane, new in zip(store.planes, store.pack(values.bfloat16()), strict=True):
        plane.copy_(new)
    table = torch.randperm(12, generator=g).int().view(2, 6).to(DEVICE)
    for count in (0, 1, 77, 192):
        with poisoned():
            data, scales = index.read_keys(table, store, 1, count)
        rows = store.read(prefill._index(table, 1, 0, count, 32)).float()
        assert torch.equal(data.float() * scales.unsqueeze(1), rows)
        wanted = prefill.read_keys.__wrapped__(table, store, 1, count)
        assert torch.equal(data.float(), wanted[0].float()) and torch.equal(scales, wanted[1])
