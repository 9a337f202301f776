"""A model over a cache of bytes, by the kernels' references on a CPU: against the contiguous cache, in any split."""

from __future__ import annotations

import operator
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from fathom.api import Event, FinishReason, GenerateRequest, SamplingParams
from fathom.checkpoint.synthetic import synthetic_model
from fathom.cli import bench_decode
from fathom.cli.bench_decode import chosen_experts
from fathom.config import WEIGHTS, ModelConfig
from fathom.engine import engine, graphs
from fathom.engine import memory as furnishing
from fathom.engine.device_cache import DeviceCache
from fathom.engine.engine import Core
from fathom.engine.graphs import MOST, Graphs, Steps
from fathom.engine.llm import LLM
from fathom.engine.memory import Memory
from fathom.engine.runner import DeviceRunner, Work
from fathom.engine.service import Service
from fathom.errors import ConfigError, ContextError
from fathom.kernels import decode
from fathom.model.batch import Batch, Span
from fathom.model.cache import ContiguousCache
from fathom.model.layers import Numerics
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer

SMALL = ModelConfig.load(WEIGHTS / "small")
CONFIG = replace(
    SMALL,
    num_hidden_layers=3,
    num_hash_layers=3,  # by score, a last bit can choose other experts
    compress_ratios=(0, 4, 128, 0)[: 3 + SMALL.num_nextn_predict_layers],
    index_topk=16,
    max_position_embeddings=2048,
)
NUMERICS = Numerics(torch.bfloat16, quantize=True)
TOLERANCE = 0.15
"""A last bit more or less is now and then another e4m3 value, in every layer."""


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return synthetic_model(CONFIG, NUMERICS, "cpu", seed=3)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def ids(seed: int, count: int) -> Tensor:
    return torch.randint(3, 1000, (count,), generator=torch.Generator().manual_seed(seed))


def opened(packed: bool = False, slots: int = 3) -> DeviceCache:
    return DeviceCache(CONFIG, slots, 24, 1024, "cpu", packed)


def read(model: torch.nn.Module, cache: DeviceCache, spans: list[tuple[Tensor, Span]]) -> Tensor:
    batch = Batch.pieces([span for _, span in spans])
    tokens = torch.cat([*(t[span.start : span.start + span.count] for t, span in spans)])
    tokens = torch.cat((tokens, torch.zeros(len(batch.positions) - len(tokens), dtype=torch.long)))
    return model(tokens, batch, cache)


@torch.inference_mode()
@pytest.mark.parametrize("packed", [False, True])
def test_prompts_and_steps_agree_with_the_contiguous_cache(model: torch.nn.Module, packed: bool) -> None:
    rng, cache = random.Random(5), opened(packed)
    other = ContiguousCache(CONFIG, NUMERICS, 3, 1024)
    pages = rng.sample(range(24), 24)
    for slot, n in enumerate((300, 129, 7)):
        tokens = ids(slot, n + 6)
        cache.bind(slot, pages[8 * slot : 8 * slot + 8])
        for start in range(0, n, 128 if slot else 256):
            count = min(n - start, 128 if slot else 256)
            got = read(model, cache, [(tokens, Span(start, count, slot))])
            want = model(tokens[start : start + count], Batch.step([Span(start, count, slot)]), other)
            assert relative(got, want) < TOLERANCE
        for p in range(n, n + 6):
            got = Steps(model, cache).run([int(tokens[p])], [p], [slot])
            want = model.logits(model(tokens[p : p + 1], Batch.step([Span(p, 1, slot)]), other))
            assert relative(got, want) < TOLERANCE


@torch.inference_mode()
def test_a_state_and_blocks_bring_a_sequence_back(model: torch.nn.Module) -> None:
    tokens, cache = ids(9, 400), opened()
    cache.bind(0, [5, 2, 9, 4])
    read(model, cache, [(tokens, Span(0, 256, 0))])
    assert cache.holds(0, 256) and not cache.holds(0, 0)
    state, blocks = cache.state(0, 256), cache.blocks([5, 2])
    assert len(state) == cache.state_bytes(256)
    assert {len(block) for block in blocks} == {cache.block_bytes}
    want = read(model, cache, [(tokens, Span(256, 128, 0))])
    fresh = opened()
    fresh.load_blocks([11, 0], blocks)
    fresh.load_state(2, 256, state)
    fresh.bind(2, [11, 0, 7, 8])
    assert torch.equal(read(model, fresh, [(tokens, Span(256, 128, 2))]), want)
    steps = [Steps(model, c).run([int(tokens[384])], [384], [s]) for c, s in ((cache, 0), (fresh, 2))]
    assert torch.equal(*steps)


def test_logits_are_made_for_as_many_prompts_as_a_step_has_tokens(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows would be another class of products: a row's bits would depend on its company."""
    count, rows = MOST + 3, []
    cache = DeviceCache(CONFIG, count, count, 128, "cpu")
    works = []
    for slot in range(count):
        works.append(Work(slot, [slot], 1, 0, [slot + 3], True))
    runner, logits = DeviceRunner(model, cache, Steps(model, cache)), model.logits
    monkeypatch.setattr(model, "logits", lambda x: rows.append(len(x)) or logits(x))
    together = runner.run(works)
    assert rows == [MOST, 3] and together.shape == (count, CONFIG.vocab_size)
    assert torch.equal(runner.run(works[-1:])[0].argmax(), together[-1].argmax())


def answers(model: torch.nn.Module, prompts: list[list[int]], at_once: bool, memory: Memory) -> list[list[int]]:
    service = Service(Core(model, 1024, memory))
    params = SamplingParams(max_tokens=6, temperature=0.0)
    requests = [(prompt, params) for prompt in prompts]
    runs = service.generate_batch(requests) if at_once else [list(service.generate(*r)) for r in requests]
    service.close()
    assert all(events[-1].finish == FinishReason.LENGTH for events in runs)
    return [[e.token for e in events if e.token is not None] for events in runs]


def test_an_engine_over_it(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in company, short of pages, from memory and from files: the same answers."""
    monkeypatch.setattr(furnishing, "unfit", lambda model: "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    one = DeviceCache(CONFIG, 1, 1, 1024, "meta")
    size = 3 * (one.slot_bytes + 32)
    shared = ids(40, 300).tolist()
    prompts = [shared[:n] + ids(n, 20).tolist() for n in (300, 260, 131, 1, 300)]
    want = answers(model, prompts, False, Memory(device=size + 24 * one.page_bytes, slots=3, host=0, prefill=512))
    for pages, folder in ((24, None), (6, None), (7, tmp_path), (8, tmp_path)):
        room = Memory(device=size + pages * one.page_bytes, slots=3, prefill=128, folder=folder)
        assert answers(model, prompts, True, room) == want, pages


def scarce(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand so on")


def test_too_little_memory_is_said_with_both_numbers(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(furnishing, "unfit", lambda model: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000_000, 1 << 34))
    with pytest.raises(ConfigError, match=r"weights need 0\.\d\d GB, but 0\.00 GB are free on cuda.*--device cpu"):
        LLM.load("small", device="cuda")
    with pytest.raises(ConfigError, match=r"cache needs \d+\.\d\d GB for 32 sequences, but 0\.00 GB.*--max-seqs"):
        Core(model, 1024, Memory())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    with (
        pytest.raises(ConfigError, match=r"a step of 512 prompt tokens does not fit.*lower --kv-gb"),
        monkeypatch.context() as m,
    ):
        m.setattr(DeviceRunner, "_read_nothing", scarce)
        Core(model, 1024, Memory(device=1 << 27, slots=2, prefill=512))
    with pytest.raises(ConfigError, match=r"with 0\.00 GB allowed: lower --max-seqs, or set --kv-gb"):
        Core(model, 1024, Memory(device=1000))


def test_memory_that_runs_out_while_a_prompt_is_read_ends_that_request_alone(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(furnishing, "unfit", lambda model: "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    core = Core(model, 1024, Memory(device=1 << 27, slots=2, host=0))
    events: dict[int, list[Event]] = {0: [], 1: []}
    params = SamplingParams(max_tokens=20, temperature=0.0)
    core.add(GenerateRequest(prompt_ids=ids(1, 40).tolist(), params=params), events[0].append)
    for _ in range(4):
        core.step()
    prompts = DeviceRunner._prompts

    def scarce(runner: DeviceRunner, works: list[Work]) -> dict[int, Tensor]:
        if works:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return prompts(runner, works)

    monkeypatch.setattr(DeviceRunner, "_prompts", scarce)
    core.add(GenerateRequest(prompt_ids=ids(2, 300).tolist(), params=params), events[1].append)
    while core.step():
        pass
    assert events[0][-1].finish == FinishReason.LENGTH
    assert events[1][-1].finish == FinishReason.ERROR and "lower --max-seqs" in (events[1][-1].error or "")
    core.close()


@torch.inference_mode()
def test_pages_that_are_missing_are_refused_before_anything_is_stored(model: torch.nn.Module) -> None:
    cache = opened()
    cache.bind(0, [3])
    before = [plane.clone() for plane in cache._pages()]
    with pytest.raises(ContextError, match="bind more pages"):
        read(model, cache, [(ids(1, 200), Span(0, 200, 0))])
    with pytest.raises(ContextError, match="bind more pages"):
        Steps(model, cache).run([1], [128], [0])
    assert all(torch.equal(a, b) for a, b in zip(before, cache._pages(), strict=True))


def test_pages_that_did_not_reach_the_table_are_not_bound() -> None:
    cache = opened()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            cache.bind(0, [5, 1 << 40])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[list[object]]:
    """Captures pass on a CPU: what had been entered when each began, and the device of the stream that captured."""
    entered, begun = list[object](), list[list[object]]()

    @contextmanager
    def within(*what: object) -> Iterator[None]:
        entered.extend(what)
        yield
        del entered[len(entered) - len(what) :]

    def capture(graph: object, stream: Mock, **rest: object) -> Any:
        begun.append([*entered, stream.device])
        return within("a capture")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Mock(device=device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Mock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    monkeypatch.setattr(torch.cuda, "device", within)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "a capture" in entered)
    return begun


@torch.inference_mode()
def test_a_graph_is_captured_on_the_device_of_its_cache(model: Transformer, captures: list[list[object]]) -> None:
    """Torch's own stream for it is one of the device that was current at the first capture."""
    Graphs(model, cache := opened(), (1,)).capture(1)
    assert captures and all(found[-1] == cache.device for found in captures)


@torch.inference_mode()
def test_near_and_far_steps_have_graphs_of_their_own(
    model: Transformer, captures: list[list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "NEAR", 256)
    made, during, step = Graphs(model, opened(), (1, 4)), list[int](), Graphs._step

    def seen(self: Graphs, tokens: Tensor, where: Tensor, view: int) -> Tensor:
        before = len(chosen)
        out = step(self, tokens, where, view)
        during.extend([view] * (len(chosen) - before))
        return out

    monkeypatch.setattr(Graphs, "_step", seen)
    with chosen_experts(model) as chosen:
        made.capture(4)
    assert len(captures) == 2 and made.at(4, 256) is not made.at(4, 257)
    assert made.at(4, 1) is made.at(4, 256) and made.at(4, 257) is made.at(4, 1000)
    for context, view in ((256, 0), (257, 1)):  # the experts that a benchmark counts are those of the graph it times
        own = bench_decode._of_view(chosen, made, context)
        want = [ids for ids, captured in zip(chosen, during, strict=True) if captured == view]
        assert len(own) == CONFIG.num_hidden_layers and all(map(operator.is_, own, want))


@torch.inference_mode()
def test_launches_are_made_for_no_more_than_a_step_needs(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "NEAR", 256)
    tokens, cache, asked = ids(11, 900), opened(), []
    cache.bind(0, list(range(8)))
    read(model, cache, [(tokens, Span(0, 896, 0))])
    whole, attend = Steps(model, cache), decode.attend
    whole.views = [cache]

    def spied(*args: Any) -> Tensor:
        asked.append(args[4])
        return attend(*args)

    monkeypatch.setattr(decode, "attend", spied)
    for position in (3, 255, 256, 700):
        asked.clear()
        got = Steps(model, cache).run([int(tokens[position])], [position], [0])
        assert {*asked} == {256 if position < 256 else 1024}
        assert relative(got, whole.run([int(tokens[position])], [position], [0])) < TOLERANCE


def test_experts_without_kernels_are_said_and_no_graph_is_tried(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch's experts look at numbers on the host, which no capture allows."""
    cache = Mock(device=torch.device("cuda"), slots=4, max_context=1024)
    assert type(Graphs.of(model, cache)) is Steps and "not FP4" in caplog.text
    monkeypatch.setattr(Graphs, "capture", lambda graphs, size: None)
    for module in model.modules():
        if isinstance(module, Experts):
            monkeypatch.setattr(module.w13, "data", module.w13.data.view(torch.int32))
    assert Graphs.of(model, cache).sizes == (1, 2, 4, 8)


def test_a_broken_capture_says_what_broke_it(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def capture(graphs: Graphs, size: int) -> None:
        try:
            raise RuntimeError("a copy to the host")
        finally:
            raise RuntimeError("capture failed")

    monkeypatch.setattr(Graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(graphs, "_without_kernels", lambda model: False)
    assert type(Graphs.of(model, Mock(device=torch.device("cuda"), slots=4, max_context=1024))) is Steps
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "a copy to the host" in caplog.text
    with pytest.raises(RuntimeError, match="capture failed"):  # among others, who go on taking graphs' steps
        Graphs.of(model, Mock(device=torch.device("cuda"), slots=4, max_context=1024), alone=False)


def test_a_device_at_fault_ends_the_requests_and_is_told_once(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(furnishing, "unfit", lambda model: "")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    core, told = Core(model, 1024, Memory(device=1 << 27, slots=2, host=0)), Told()
    core.on_loss = told.hear

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DeviceRunner, "run", broken)
    ends: list[Event] = []
    for faulty in (False, True, True):
        monkeypatch.setattr(engine, "_is_broken", lambda device, faulty=faulty: faulty)
        core.add(GenerateRequest(prompt_ids=[5, 6], params=SamplingParams(max_tokens=3)), ends.append)
        core.step()
        assert ends[-1].finish is FinishReason.ERROR and bool(core.lost) == faulty
    assert told.said.wait(5) and len(told.reasons) == 1 and "illegal memory access" in told.reasons[0]
    core.close()


class Told:
    """Who hears of a loss."""

    def __init__(self) -> None:
        self.said, self.reasons = threading.Event(), []

    def hear(self, reason: str) -> None:
        self.reasons.append(reason)
        self.said.set()
