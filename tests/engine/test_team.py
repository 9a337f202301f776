"""Two processes that hold one model: the answers of one, the same bits in any company, and an end that is told."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from torch import Tensor

import fathom.engine.team as team
from fathom.api import Event, FinishReason, SamplingParams
from fathom.checkpoint.folder import Checkpoint
from fathom.checkpoint.load import load_model, share_bytes
from fathom.checkpoint.random import write_random
from fathom.config import WEIGHTS, ModelConfig
from fathom.engine.device_cache import DeviceCache
from fathom.engine.graphs import Steps
from fathom.engine.llm import LLM
from fathom.engine.memory import Memory
from fathom.engine.runner import DeviceRunner, Work
from fathom.engine.team import Part, Shared, Team
from fathom.errors import ConfigError
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from fathom.parallel.plan import cut_of, meet, share
from tests.oracle import relative_error
from tests.parallel.threads import OfThreads, Together

CONFIG = replace(ModelConfig.load(WEIGHTS / "small"), moe_intermediate_size=256, index_topk=16)
"""The embedded model, with experts wide enough to be cut."""
PARAMS = SamplingParams(max_tokens=10, temperature=0.0, logprobs=3)
Answer = list[tuple[int, float, tuple[float, ...]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP4 experts, FP8 linears."""
    path = tmp_path_factory.mktemp("models") / "stored"
    write_random(path, CONFIG, seed=5)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BF16: nothing is rounded between layers, so that a last bit of a sum stays a last bit."""
    path = tmp_path_factory.mktemp("models") / "plain"
    write_random(path, CONFIG, seed=5, experts="bf16", linears="bf16")
    return path


def prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(3, CONFIG.vocab_size), k=length) for length in lengths]


def answer(events: list[Event]) -> Answer:
    assert events[-1].finish in (FinishReason.LENGTH, FinishReason.STOP), events[-1].error
    probable = [(e.token, e.logprob) for e in events if e.token is not None and e.logprob]
    return [(token, p.logprob, tuple(other for _, other in p.top)) for token, p in probable]


def alone(llm: LLM, ids: list[int]) -> Answer:
    return answer(list(llm.generate(ids, PARAMS)))


def test_two_processes_give_the_answers_of_one(plain: Path) -> None:
    asked = prompts(1, (1, 40, 300, 700))
    whole, pair = LLM.load(plain), LLM.load(plain, tp=2)
    try:
        for ids in asked:
            want, got = alone(whole, ids), alone(pair, ids)
            assert [token for token, *_ in got] == [token for token, *_ in want]
            assert max(abs(a - b) for (_, a, _), (_, b, _) in zip(got, want, strict=True)) < 1e-4
    finally:
        whole.close()
        pair.close()


def test_the_same_bits_in_company_short_of_pages_and_from_every_tier(folder: Path, tmp_path: Path) -> None:
    (shared,), tails = prompts(2, (300,)), prompts(3, (1, 20, 150, 129))
    asked = [shared[: 300 - 50 * i] + tail for i, tail in enumerate(tails)]
    page = 1 << 15  # more than the bytes of one: the cache below holds fewer than all four need
    with_disk = Memory(slots=3, device=12 * page, host=0, folder=tmp_path / "kv", prefill=128)
    pair = LLM.load(folder, tp=2)
    want = [alone(pair, ids) for ids in asked]
    pair.close()
    for run, memory in enumerate((with_disk, replace(with_disk, host=1 << 26))):
        pair = LLM.load(folder, tp=2, memory=memory)
        try:
            events = pair.generate_batch([(ids, PARAMS) for ids in (*asked, asked[0])])
            assert [answer(e) for e in events] == [*want, want[0]], run
            restored = pair.status().restored
        finally:
            pair.close()
    assert restored["disk"] > 0


def test_a_lost_rank_ends_every_request_with_its_reason(folder: Path) -> None:
    pair = LLM.load(folder, tp=2, memory=Memory(slots=2))
    assert pair.team
    reasons: SimpleQueue[str] = SimpleQueue()
    pair.team.on_loss = reasons.put
    streams = [pair.generate(ids, replace(PARAMS, max_tokens=100_000)) for ids in prompts(14, (30, 200, 50))]
    first = next(streams[0])
    assert first.token is not None
    pair.team._others[0].kill()
    for stream in streams:
        *_, end = stream
        assert end.finish is FinishReason.ERROR and "rank 1 has ended" in (end.error or "")
    *_, end = pair.generate([5, 6], PARAMS)
    assert end.finish is FinishReason.ERROR and "cannot go on" in (end.error or "")
    begin = time.monotonic()
    pair.close()
    assert time.monotonic() - begin < 30
    assert "rank 1 has ended" in reasons.get(timeout=30) and reasons.empty()


def test_a_rank_that_hangs_counts_as_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "LONGEST", 100.0)  # looked at every second
    pair = LLM.load(folder, tp=2, memory=Memory(slots=2))
    assert pair.team
    pair.team.on_loss = lambda reason: None
    stream = pair.generate(prompts(15, (30,))[0], replace(PARAMS, max_tokens=100_000))
    next(stream)
    os.kill(pair.team._others[0].pid, signal.SIGSTOP)
    monkeypatch.setattr(team, "LONGEST", 2.0)
    *_, end = stream
    pair.close()
    assert end.finish is FinishReason.ERROR and "a step has not ended for 2 seconds" in (end.error or "")


def test_whatever_may_wait_for_a_rank_is_watched(folder: Path, tmp_path: Path) -> None:
    """What is read to be kept waits for the device: in a step, after an answer that is given up, at the end."""
    pair = LLM.load(folder, tp=2, memory=Memory(slots=2, folder=tmp_path / "kv"))
    assert pair.team and isinstance(pair.core.cache, Shared)
    read, seen = pair.core.cache._cache.state, []

    def state(slot: int, at: int) -> bytes:
        assert pair.team
        seen.append(pair.team._since)
        return read(slot, at)

    pair.core.cache.state = state  # type: ignore[method-assign]
    given_up, running = (pair.generate(ids, replace(PARAMS, max_tokens=3000)) for ids in prompts(17, (250, 250)))
    assert len([*islice(given_up, 12)]) == 12  # a block has been completed since
    in_steps = len(seen)
    given_up.close()
    alone(pair, [5, 6])  # by now it has been given up
    in_all = len(seen)
    assert len([*islice(running, 12)]) == 12
    before_the_end = len(seen)
    pair.close()
    assert 0 < in_steps < in_all <= before_the_end < len(seen) and all(seen) and pair.team._since is None


def test_what_a_lost_team_reads_is_not_kept(folder: Path, tmp_path: Path) -> None:
    """On a GPU whoever waits for a lost rank gets something, but not the rows."""
    pair = LLM.load(folder, tp=2, memory=Memory(slots=2, folder=tmp_path / "kv"))
    assert pair.team and isinstance(pair.core.cache, Shared)
    pair.team.on_loss = lambda reason: None
    cache, read = pair.core.cache._cache, pair.core.cache._cache.blocks

    def lost_meanwhile(pages: Sequence[int]) -> list[bytes]:
        assert pair.team
        pair.team.lose("somebody is gone")
        return read(pages)

    first, second = prompts(16, (300, 300))
    alone(pair, first)
    before = sum(path.stat().st_size for path in (tmp_path / "kv").rglob("*") if path.is_file())
    cache.blocks = lost_meanwhile  # type: ignore[method-assign]
    list(pair.generate(second, PARAMS))
    notes = pair.status().notes
    pair.close()
    assert before > 0 and any("somebody is gone" in note for note in notes)
    assert before == sum(path.stat().st_size for path in (tmp_path / "kv").rglob("*") if path.is_file())


def test_what_cannot_be_cut_or_started_is_refused_at_the_door(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"moe_intermediate_size \(128\) cannot be cut into 2 equal parts"):
        LLM.load("small", tp=2)
    with pytest.raises(ConfigError, match=r"num_attention_heads.*3 equal parts"):
        LLM.load(folder, tp=3)
    with pytest.raises(ConfigError, match="--tp 0"):
        LLM.load(folder, tp=0)
    pair = LLM.load(folder, tp=2)
    with pytest.raises(ConfigError, match="a rank of a model already"):
        LLM.load(folder, tp=2)
    pair.close()
    with pytest.raises(ConfigError, match=r"rank 1 has ended \(.*nowhere"):
        made = Team(Part(folder=tmp_path / "nowhere", tp=2))
        try:
            made._answers()
        finally:
            made.close()


def test_a_rank_reads_its_share_of_a_checkpoint(folder: Path, plain: Path) -> None:
    for stored in (folder, plain):
        whole = load_model(stored, dense=False).state_dict()
        for rank in range(2):
            part = load_model(stored, dense=False, share=(rank, 2)).state_dict()
            assert part.keys() == whole.keys()
            for name, tensor in part.items():
                want = share(name, whole[name], rank, 2)
                assert torch.equal(tensor.view(torch.uint8), want.view(torch.uint8)), name
        cut = sum(t.nbytes for name, t in whole.items() if cut_of(name))
        assert share_bytes(Checkpoint(stored), 1) - share_bytes(Checkpoint(stored), 2) == cut // 2
        assert cut > 0


ONE, TWO = prompts(6, (515, 300))
WORKS = [
    [Work(0, [3, 1, 2, 7, 9], 515, 0, ONE[:256], False), Work(1, [4, 5, 6], 299, 0, TWO[:299], True)],
    [Work(1, [4, 5, 6], 299, 299, TWO[299:], True), Work(0, [3, 1, 2, 7, 9], 515, 256, ONE[256:], True)],
]
"""Two steps of two sequences, whose queries see far more entries than they keep."""


@torch.inference_mode()
def by_kernels(model: Transformer) -> list[Tensor]:
    """Logits of both steps, by the kernels' references."""
    cache = DeviceCache(model.config, 2, 16, 1024, "cpu")
    runner = DeviceRunner(model, cache, Steps(model, cache))
    return [runner.run(works) for works in WORKS]


def side_by_side(models: list[Transformer]) -> list[list[Tensor]]:
    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(by_kernels, models))


def loaded(folder: Path, rank: int = 0, tp: int = 1) -> Transformer:
    return load_model(folder, numerics=Numerics(torch.bfloat16, True), dense=False, share=(rank, tp))


@pytest.mark.parametrize("count", [2, 3])
def test_index_choices_are_shared_without_a_trace(folder: Path, count: int) -> None:
    """Whole models that only choose for each other: the bits of one alone."""
    together, models = Together(count), [loaded(folder) for _ in range(count)]
    for rank, model in enumerate(models):
        model.share_index(rank, count, partial(OfThreads(rank, together).gathered, axis=0))
    want = by_kernels(loaded(folder))
    for got in side_by_side(models):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_kernels_over_two_ranks_answer_as_over_one(folder: Path) -> None:
    together, parts = Together(2), [loaded(folder, rank, 2) for rank in range(2)]
    for rank, part in enumerate(parts):
        meet(part, OfThreads(rank, together))
    (first, second), want = side_by_side(parts), by_kernels(loaded(folder))
    error = max(relative_error(torch.cat((a, b), -1), c) for a, b, c in zip(first, second, want, strict=True))
    print(f"\ntwo ranks by kernels' references, BF16, against one: {error:.1e}")
    assert error < 0.15
