"""The same answer on a GPU: a sequence's bits alone and in company, in any cut, on any pages, from any tier."""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fathom.accounting import kv_bytes
from fathom.api import FinishReason, SamplingParams
from fathom.checkpoint.synthetic import synthetic_model
from fathom.cli.bench_device import complete_launches
from fathom.cli.bench_fill import filled
from fathom.config import FLASH, WEIGHTS, ModelConfig
from fathom.engine.device_cache import DeviceCache
from fathom.engine.graphs import NEAR, Graphs, Steps
from fathom.engine.llm import LLM
from fathom.engine.memory import Memory
from fathom.engine.request import pages_for
from fathom.engine.runner import DeviceRunner
from fathom.model.batch import Batch, Span
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CONFIG = replace(ModelConfig.load(WEIGHTS / "small"), max_position_embeddings=8192)
LONG, STEPS, SLOTS = 1500, 6, 32
MOST = (LONG + STEPS) // 128 + 1


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return synthetic_model(CONFIG, Numerics(torch.bfloat16, quantize=True), "cuda", seed=3)


class Run:
    """Sequences of a model over a cache whose pages lie in a random order."""

    def __init__(self, model: torch.nn.Module, seed: int, lengths: dict[int, int], graphs: bool = False) -> None:
        self.rng, self.lengths = random.Random(seed), lengths
        self.model, self.cache = model, DeviceCache(CONFIG, SLOTS, SLOTS * MOST, MOST * 128, "cuda")
        pages = self.rng.sample(range(SLOTS * MOST), SLOTS * MOST)
        self.slots = dict(zip(lengths, self.rng.sample(range(SLOTS), len(lengths)), strict=True))
        self.ids = {
            n: torch.randint(3, 1200, (n + STEPS,), generator=torch.Generator().manual_seed(n)) for n in lengths
        }
        for slot in range(SLOTS):
            self.cache.bind(slot, pages[MOST * slot : MOST * slot + MOST])
        self.steps = Steps(model, self.cache)
        if graphs:
            self.steps = Graphs(model, self.cache, (1, 8, 32))
            for size in self.steps.sizes:
                self.steps.capture(size)

    def prompts(self, whole: bool) -> dict[int, Tensor]:
        """Read all, whole and one after the other, or in pieces and together; the streams at each one's end."""
        at, out = dict.fromkeys(self.lengths, 0), {}
        while left := [n for n in self.lengths if at[n] < n]:
            some = left[:1] if whole else self.rng.sample(left, self.rng.randint(1, len(left)))
            spans, tokens = [], []
            for n in some:
                end = n if whole else min(n, at[n] // 128 * 128 + 128 * self.rng.randint(1, 6))
                spans.append(Span(at[n], end - at[n], self.slots[n]))
                tokens.append(self.ids[n][at[n] : end])
                at[n] = end
            batch = Batch.pieces(spans, "cuda")
            tokens.append(torch.zeros(len(batch.positions) - sum(map(len, tokens)), dtype=torch.long))
            ends = self.model(torch.cat(tokens).cuda(), batch, self.cache)
            out |= {n: row.clone() for n, row in zip(some, ends, strict=True)}
        return out

    def decode(self, together: int) -> dict[int, Tensor]:
        """STEPS steps of all, at most so many at once: logits [STEPS, V] of each."""
        out: dict[int, list[Tensor]] = {n: [] for n in self.lengths}
        for i in range(STEPS):
            order = self.rng.sample(list(self.lengths), len(self.lengths))
            for first in range(0, len(order), together):
                some = order[first : first + together]
                tokens, positions = [int(self.ids[n][n + i]) for n in some], [n + i for n in some]
                rows = self.steps.run(tokens, positions, [self.slots[n] for n in some])
                for n, row in zip(some, rows, strict=True):
                    out[n].append(row.clone())
        return {n: torch.stack(rows) for n, rows in out.items()}


@torch.inference_mode()
def test_bits_of_prompts_and_steps(model: torch.nn.Module) -> None:
    rng = random.Random(1)
    lengths = {n: n for n in sorted({1, 5, 128, 129, 515, 1023, LONG, *(rng.randint(1, LONG) for _ in range(25))})}
    first = Run(model, 1, lengths)
    ends, steps = first.prompts(whole=True), first.decode(1)
    compared = 0
    for seed, together, graphs in ((2, 32, False), (3, 7, True), (4, 32, True), (5, 1, True)):
        other = Run(model, seed, lengths, graphs)
        again, more = other.prompts(whole=False), other.decode(together)
        for n in lengths:
            assert torch.equal(ends[n], again[n]), f"prompt of {n} tokens, {seed}"
            assert torch.equal(steps[n], more[n]), f"steps after {n} tokens, {together} at once"
            compared += 1 + STEPS
    print(f"\n{compared} rows, all bit-identical")


@pytest.fixture(scope="module")
def flash() -> torch.nn.Module:
    """A layer of each kind at V4-Flash's sizes, as one rank of two."""
    kinds = {"num_hidden_layers": 3, "num_hash_layers": 1, "num_nextn_predict_layers": 0, "dspark": None}
    config = replace(FLASH, compress_ratios=(0, 4, 128), **kinds)  # type: ignore[arg-type]
    return synthetic_model(config, Numerics(torch.bfloat16, quantize=True), "cuda", tp=2)


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_launches_that_begin_early_change_no_bit(flash: Transformer, batch: int) -> None:
    """Kernels read weights, and some of them more, before what stands before them has ended."""
    pages = 33
    cache = DeviceCache(flash.config, batch, batch * pages, pages * 128, "cuda")
    for slot in range(batch):
        cache.bind(slot, list(range(slot * pages, (slot + 1) * pages)))
    filled(cache)
    early, late = Graphs(flash, cache, (batch,)), Graphs(flash, cache, (batch,))
    early.capture(batch)
    with complete_launches():
        late.capture(batch)
    for last in (700, 4090, 4091, 4095):  # closes nothing, or a block of 4, or one of 128 as well
        where = [7 * slot + 1 for slot in range(batch)], [last - slot for slot in range(batch)], list(range(batch))
        want = late.run(*where).clone()
        for _ in range(20):
            assert torch.equal(early.run(*where), want), last


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_long_cache_changes_no_bit_of_a_near_step(flash: Transformer, batch: int) -> None:
    """A step of 32,772 tokens has the first entry that launches for near ones would leave out."""
    pages = NEAR // 128 + 1
    cache = DeviceCache(flash.config, batch, 1 << 13, 1 << 20, "cuda")
    for slot in range(batch):
        cache.bind(slot, [(97 * i + 11 * slot) % (1 << 13) for i in range(pages)])
    filled(cache)
    near, far = Graphs(flash, cache, (batch,)), Graphs(flash, cache, (batch,))
    far.views = [cache]
    near.capture(batch)
    far.capture(batch)
    assert len(near.views) == 2
    places = [[last - slot for slot in range(batch)] for last in (700, 4095, NEAR - 1, NEAR + 4 + batch)]
    for last in [*places, [NEAR + 99, *places[0]][:batch]]:
        where = [7 * slot + 1 for slot in range(batch)], last, list(range(batch))
        want = far.run(*where).clone()
        for _ in range(4):
            assert torch.equal(near.run(*where), want), last


def answers(llm: LLM, prompts: list[list[int]], at_once: bool) -> list[list[tuple[int, float]]]:
    params = SamplingParams(max_tokens=24, temperature=0.0, logprobs=1)
    requests = [(ids, params) for ids in prompts]
    runs = llm.generate_batch(requests) if at_once else [list(llm.generate(*request)) for request in requests]
    return [[(e.token, e.logprob.logprob) for e in events if e.token is not None and e.logprob] for events in runs]


def test_answers_from_every_tier(tmp_path: Path) -> None:
    rng = random.Random(7)
    shared = [rng.randint(3, 1200) for _ in range(700)]
    prompts = [
        shared[: rng.randint(1, 700)] + [rng.randint(3, 1200) for _ in range(rng.randint(1, 300))] for _ in range(9)
    ]
    cold = LLM.load("small", device="cuda", max_context=4096, memory=Memory(host=0, slots=4, prefill=8192))
    want = answers(cold, prompts, at_once=False)
    cold.close()
    page = cold.core.cache.page_bytes
    slots = 12 * (cold.core.cache.slot_bytes + 128)
    for seed in range(2):
        memory = Memory(device=slots + 40 * page, slots=12, prefill=256, folder=tmp_path)
        llm = LLM.load("small", device="cuda", max_context=4096, memory=memory)
        order = random.Random(seed).sample(range(9), 9)
        for at_once in (True, False):
            got = answers(llm, [prompts[i] for i in order], at_once)
            assert got == [want[i] for i in order]
        restored = llm.core.prefix.restored
        llm.close()
        print(f"\nfrom tiers: {restored}")
    assert restored["disk"] > 0, "the second engine began with the first one's files"


def test_a_loaded_checkpoint_is_computed_by_kernels_and_graphs(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing falls back: no word of a slower way, no reference of the experts, which looks at numbers on a host."""
    llm = LLM.load("small", device="cuda", max_context=4096)
    assert isinstance(llm.core._runner, DeviceRunner) and isinstance(llm.core._runner.steps, Graphs)
    llm.close()
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_embedded_model_answers_as_on_a_cpu() -> None:
    """The same tokens as (fp32, quantised) on a CPU, up to the first place where that is not sure of its own.

    The prompts are problems that the model was not trained on, rendered with effort `high`: of 148 tokens of a CPU's
    answers 145 are ahead of the second best by more than is allowed here.
    """
    prompts = json.loads(Path(__file__).with_name("small_prompts.json").read_text())
    params = SamplingParams(max_tokens=48, temperature=0.0, logprobs=2)
    runs = []
    for device in ("cpu", "cuda"):
        llm = LLM.load("small", device=device, max_context=4096)
        runs.append(llm.generate_batch([(ids, params) for ids in prompts]))
        llm.close()
    same = 0
    for ids, here, there in zip(prompts, *runs, strict=True):
        for a, b in zip(here, there, strict=False):
            if a.token != b.token and a.logprob:
                first, second = (score for _, score in a.logprob.top)
                assert first - second < 0.5, f"after {len(ids)} tokens and {same} more the CPU was sure of {a.token}"
                break
            same += a.token is not None
    print(f"\n{same} tokens the same, up to each answer's first difference")
    assert same >= 100


def test_a_prompt_of_a_million_tokens() -> None:
    ids = torch.randint(3, 1200, (1_048_000,), generator=torch.Generator().manual_seed(5)).tolist()
    llm = LLM.load("small", device="cuda", memory=Memory(slots=1, host=0))
    assert isinstance(llm.core._runner, DeviceRunner) and isinstance(llm.core._runner.steps, Graphs)
    assert len(llm.core._runner.steps.views) == 2
    begin = time.perf_counter()
    events = list(llm.generate(ids, SamplingParams(max_tokens=4, temperature=0.0)))
    took, cache = time.perf_counter() - begin, llm.core.cache
    llm.close()
    assert events[-1].finish == FinishReason.LENGTH
    held = pages_for(len(ids)) * cache.page_bytes + cache.slot_bytes
    counted = kv_bytes(llm.model.config, len(ids), fp8_keys=True)
    print(f"\n{len(ids)} tokens read in {took:.1f} s, {held / 1e6:.0f} MB held, {counted / 1e6:.0f} counted")
    assert abs(held - counted) <= 0.05 * counted
