"""Any split gives the same answer: bit for bit within a class, to a stated tolerance across classes.

Classes: prefill, in chunks cut at multiples of 128; decode, one to eight tokens of a sequence a call. Every run below
replays the same sequences in another random way (chunking, company in the call, slots used before, rejected drafts),
and every row of the streams must be torch.equal to that of a sequence run alone and plainly.
"""

import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.model.batch import TILE
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from tests import oracle
from tests.oracle import Session

RUNS = {1: 3, 2: 1}
"""Random replays of all prompts by number of threads (two threads on a busy machine spend their time waiting)."""
PROMPTS = (1, 7, 126, 131, 250, 771)
"""Around the edges of tiles; the longest is decoded past the point where the cache first drops old rows."""
GENERATED = 12
ACROSS = {False: 1e-4, True: 0.1}
"""Prefill against decode, relative to the largest logit. Off: rounding. On: flipped quantiser steps, which random
weights amplify from layer to layer (measured: 0.025; reference 8 has 0.2 for quantisers on against off)."""

SHAPES: dict[str, dict[str, Any]] = {
    "odd": {
        "hidden_size": 96, "head_dim": 96, "qk_rope_head_dim": 32, "q_lora_rank": 40, "o_lora_rank": 24,
        "moe_intermediate_size": 48, "sliding_window": 16, "num_attention_heads": 4, "o_groups": 2,
    },
    "small": {
        "hidden_size": 256, "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 128, "o_lora_rank": 128,
        "moe_intermediate_size": 128, "sliding_window": 128, "num_attention_heads": 8, "o_groups": 2,
    },
    "wide": {
        "hidden_size": 512, "head_dim": 192, "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_lora_rank": 256,
        "moe_intermediate_size": 384, "sliding_window": 128, "num_attention_heads": 4, "o_groups": 1,
    },
}  # fmt: skip

_compared: dict[str, list[int]] = {}
_across: dict[str, tuple[float, int, int]] = {}


@pytest.fixture(scope="module", autouse=True)
def table(say: Callable[[str], None]) -> Iterator[None]:
    yield
    torch.set_num_threads(1)
    total = sum(n for n, _ in _compared.values())
    say(f"invariance: {total} replays of {len(PROMPTS)} prompts x random splits, all rows torch.equal:")
    for name, (replays, rows) in _compared.items():
        say(f"  {name:42} {replays:4} replays, {rows:6} rows")
    say("prefill against decode, worst relative difference; same greedy token where the margin exceeds it:")
    for name, (worst, same, sure) in _across.items():
        say(f"  {name:42} {worst:.1e}; {same} of {sure}")


def build(shape: str, numerics: Numerics, dense: bool = False) -> Transformer:
    fixed: dict[str, Any] = {"compress_ratios": [4, 128, 0, 0], "num_hidden_layers": 3, "num_hash_layers": 1}
    fixed |= {"index_topk": 8, "index_n_heads": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "hc_mult": 4}
    config = oracle.draw_config(11, **fixed, **SHAPES[shape])
    model = oracle.our_model(config, oracle.draw_weights(config, 11), numerics)
    if dense:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        model.densify()
    return model if numerics.dtype == torch.float32 else model.to(torch.bfloat16)


def sequences(model: Transformer) -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, model.config.vocab_size, (n + GENERATED,), generator=g).tolist() for n in PROMPTS]


def plain(model: Transformer, ids: list[int], prompt: int) -> Tensor:
    """The sequence alone: its prompt in one call, then token by token -> streams of all positions."""
    session = Session(model)
    rows = [session.streams({0: ids[:prompt]})[0]]
    rows += [session.streams({0: ids[t : t + 1]})[0] for t in range(prompt, len(ids))]
    return torch.cat(rows)


class Replay:
    """All sequences at once in one cache, each advancing in its own random pieces, in random company."""

    def __init__(self, model: Transformer, ids: list[list[int]], rng: random.Random) -> None:
        self.ids, self.rng = ids, rng
        self.slots = rng.sample(range(len(ids) + 1), len(ids))
        self.session = Session(model, slots=len(ids) + 1)
        self.got: list[list[Tensor]] = [[] for _ in ids]

    def dirty(self) -> None:
        """Leave other sequences in every slot, then begin again."""
        for slot in range(len(self.session.length)):
            self.session.streams({slot: [self.token() for _ in range(self.rng.choice((3, 140, 300)))]})
        self.session.length = [0] * len(self.session.length)

    def token(self) -> int:
        return self.rng.randrange(50)

    def piece(self, row: int) -> list[int]:
        """The next piece of a sequence: a chunk up to a multiple of 128, or one to eight tokens once in its decode."""
        at = self.session.length[self.slots[row]]
        if at >= PROMPTS[row]:
            return self.ids[row][at : at + self.rng.randint(1, 8)]
        end = at // TILE * TILE + TILE * self.rng.randint(1, 3)
        return self.ids[row][at : min(end, PROMPTS[row])]

    def reject(self, rows: list[int]) -> None:
        """Sequences in their decode try up to eight wrong tokens and go back."""
        rows = [row for row in rows if self.session.length[self.slots[row]] >= PROMPTS[row]]
        before = list(self.session.length)
        if rows:
            wrong = {self.slots[row]: [self.token() for _ in range(self.rng.randint(1, 8))] for row in rows}
            self.session.streams(wrong)
        self.session.length = before

    def run(self) -> list[Tensor]:
        while True:
            left = [row for row in range(len(self.ids)) if self.session.length[self.slots[row]] < len(self.ids[row])]
            if not left:
                return [torch.cat(rows) for rows in self.got]
            company = self.rng.sample(left, self.rng.randint(1, len(left)))
            if self.rng.random() < 0.4:
                self.reject(company)
            pieces = {row: self.piece(row) for row in company}
            out = self.session.streams({self.slots[row]: ids for row, ids in pieces.items()})
            for row in company:
                self.got[row].append(out[self.slots[row]])


SETTINGS = [
    ("odd", Numerics(), False),
    ("odd", Numerics(quantize=True), True),
    ("small", Numerics(), False),
    ("small", Numerics(quantize=True), False),
    ("small", Numerics(quantize=True), True),
    ("wide", Numerics(), False),
    ("wide", Numerics(), True),
    ("small", Numerics(torch.bfloat16, quantize=True), False),
]
"""Shape, numerics, and whether the model is the dense copy, its weights packed, that inference on a CPU uses."""


def label(shape: str, numerics: Numerics, dense: bool, threads: int) -> str:
    dtype, quantised = str(numerics.dtype).removeprefix("torch."), "on" if numerics.quantize else "off"
    return f"{shape}{', dense' if dense else ''}, {dtype}, quantisers {quantised}, {threads} thr"


def replays(shape: str, numerics: Numerics, dense: bool, threads: int) -> list[int]:
    """How many replays and rows were compared; an AssertionError names the first that differs."""
    torch.set_num_threads(threads)
    model = build(shape, numerics, dense)
    ids = sequences(model)
    want = [plain(model, one, prompt) for one, prompt in zip(ids, PROMPTS, strict=True)]
    counts = [0, 0]
    for seed in range(RUNS[threads]):
        replay = Replay(model, ids, random.Random(seed))
        if seed % 2 == threads % 2:
            replay.dirty()
        for row, got in enumerate(replay.run()):
            differ = (got != want[row]).flatten(1).any(1).nonzero().flatten().tolist()
            assert torch.equal(got, want[row]), f"prompt {PROMPTS[row]}, split {seed}: rows {differ[:9]} differ"
            counts = [counts[0] + 1, counts[1] + len(got)]
    return counts


@pytest.fixture(scope="module")
def two_threads() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: idle OpenMP threads must sleep, not spin, or a busy machine is lost in waiting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        patch.setenv("OMP_NUM_THREADS", "2")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize(("shape", "numerics", "dense"), SETTINGS)
def test_every_replay_is_bit_identical(shape: str, numerics: Numerics, dense: bool) -> None:
    _compared[label(shape, numerics, dense, 1)] = replays(shape, numerics, dense, 1)


@pytest.mark.parametrize(("shape", "numerics", "dense"), SETTINGS)
def test_every_replay_is_bit_identical_with_two_threads(
    shape: str, numerics: Numerics, dense: bool, two_threads: ProcessPoolExecutor
) -> None:
    _compared[label(shape, numerics, dense, 2)] = two_threads.submit(replays, shape, numerics, dense, 2).result()


@torch.inference_mode()
@pytest.mark.parametrize("numerics", [Numerics(), Numerics(quantize=True)])
def test_across_classes_the_tolerance_and_the_greedy_token_hold(numerics: Numerics) -> None:
    """One prefill of everything against a prompt and then tokens: rows of the generated part."""
    torch.set_num_threads(1)
    model = build("small", numerics)
    worst, same, sure = 0.0, 0, 0
    for one, prompt in zip(sequences(model), PROMPTS, strict=True):
        a = model.logits(Session(model).streams({0: one})[0][prompt:])
        b = model.logits(plain(model, one, prompt)[prompt:])
        worst = max(worst, oracle.relative_error(b, a))
        top = a.topk(2, -1).values
        clear = top[:, 0] - top[:, 1] > ACROSS[numerics.quantize] * a.abs().max()
        sure += int(clear.sum())
        same += int((a.argmax(-1) == b.argmax(-1))[clear].sum())
    _across[label("small", numerics, False, 1)] = (worst, same, sure)
    assert worst <= ACROSS[numerics.quantize] and same == sure


def test_the_prediction_block_is_as_invariant_as_the_model() -> None:
    """Its window lives in the same slots: drafting after each call equals drafting after other calls."""
    torch.set_num_threads(1)
    model = build("small", Numerics(quantize=True))
    ids = sequences(model)[3]

    def drafts(pieces: list[tuple[int, int]]) -> Tensor:
        session, out = Session(model), []
        for a, b in pieces:
            out.append(oracle.draft(session, 0, session.streams({0: ids[a:b]})[0], ids[a + 1 : b + 1], a))
        return torch.cat(out)

    prompt, end = PROMPTS[3], len(ids) - 1
    want = drafts([(0, prompt), *((t, t + 1) for t in range(prompt, end))])
    for seed in range(4):
        rng = random.Random(seed)
        pieces = oracle.cuts(rng, 0, prompt, unit=TILE) + oracle.cuts(rng, prompt, end, most=8)
        assert torch.equal(drafts(pieces), want), seed
