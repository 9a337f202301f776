"""Two processes, a GPU each, that hold one model: the bits of any company, every tier, and an end that is told.

A process is a rank of one model only, on a GPU for good: each of these is computed in a process of its own.
"""

from __future__ import annotations

import pickle
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.api import FinishReason, SamplingParams
from fathom.checkpoint.random import write_random
from fathom.engine.graphs import NEAR, Graphs
from fathom.engine.llm import LLM
from fathom.engine.memory import Memory
from fathom.engine.team import Led
from fathom.parallel.tensor import Ranks, meeting_place
from tests.engine.test_team import CONFIG, PARAMS, Answer, alone, answer, prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")]
ROOT = Path(__file__).parents[2]
LENGTHS, TOKENS = (1, 2, 5, 9, 17, 30, 31, 40, 55, 60, 63, 64), 4
RUN = (
    "import pickle, sys; import tests.engine.test_team_gpu as t; "
    "name, *given = pickle.load(sys.stdin.buffer); pickle.dump(getattr(t, name)(*given), open(sys.argv[1], 'wb'))"
)


def apart(tmp_path: Path, name: str, *given: Any) -> Any:
    """What a function of this file gives, in a process of its own."""
    path = tmp_path / "answer"
    command = [sys.executable, "-c", RUN, str(path)]
    subprocess.run(command, input=pickle.dumps((name, *given)), cwd=ROOT, check=True, timeout=150)
    with path.open("rb") as file:
        return pickle.load(file)


def answers(folder: Path, tp: int, asked: list[list[int]], together: bool, memory: Memory) -> tuple[list[Answer], int]:
    """One after the other, or at once; and tokens that came back from files."""
    llm = LLM.load(folder, device="cuda" if tp > 1 else "cuda:0", tp=tp, max_context=2 * NEAR, memory=memory)
    runs = llm.generate_batch([(ids, PARAMS) for ids in asked]) if together else []
    found = [answer(events) for events in runs] or [alone(llm, ids) for ids in asked]
    restored = llm.status().restored.get("disk", 0)
    llm.close()
    return found, restored


Beginning = tuple[list[int], list[dict[int, float]]]


def beginnings(folder: Path, tp: int, asked: list[list[int]], device: str = "cuda") -> list[Beginning]:
    """Of each answer some tokens, and at each the most probable ones: a prompt's, then steps'."""
    llm = LLM.load(folder, device=device if device == "cpu" or tp > 1 else "cuda:0", tp=tp, max_context=4096)
    params, found = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=20), []
    for ids in asked:
        events = [event for event in llm.generate(ids, params) if event.token is not None and event.logprob]
        found.append(
            ([e.token for e in events if e.token is not None], [dict(e.logprob.top) for e in events if e.logprob])
        )
    llm.close()
    return found


def distances(found: list[Beginning], asked: list[list[int]], folder: Path) -> tuple[list[float], list[float]]:
    """How far log-probabilities are, on average, from those that a CPU has after the same tokens: of prompts, of steps.

    Who is not listed has the lowest that is. (Those of other prompts are 0.35 apart.)
    """
    whole, params = LLM.load(folder, max_context=4096), SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    far: tuple[list[float], list[float]] = ([], [])
    for prompt, (tokens, tops) in zip(asked, found, strict=True):
        for i, got in enumerate(tops):
            first = next(whole.generate(prompt + tokens[:i], params))
            want = dict(first.logprob.top) if first.logprob else {}
            gaps = [abs(got.get(token, min(got.values())) - value) for token, value in want.items()]
            far[i > 0].append(statistics.mean(gaps))
    whole.close()
    return far


def sums(port: int, rank: int) -> bool:
    """Whether a large sum, by the process group, has the bits of its rows', by the mailbox."""
    ranks = Ranks("cuda", rank, 2, meeting_place(2, port))
    g = torch.Generator(ranks.device).manual_seed(rank)
    rng, big = random.Random(1), torch.randn(700, 4096, generator=g, device=ranks.device).bfloat16()
    sizes = [rng.randint(1, 64) for _ in range(10)]
    parts = big[: sum(sizes)].split(sizes)
    assert ranks._box and not ranks._box.takes(big) and all(map(ranks._box.takes, parts))
    rows = torch.cat([ranks.sum(part) for part in parts])
    same = torch.equal(ranks.sum(big.clone())[: len(rows)], rows)
    ranks.leave()
    return same


def chained(port: int, rank: int) -> list[int]:
    """Of a graph's sums, made by who reads them and by their own launches in turns: how many numbers are wrong.

    Each rank knows both parts. Graphs are launched one upon the other; now and then a rank is late, or a large sum is
    made between two.
    """
    from fathom.kernels import streams_cuda
    from fathom.kernels.mailbox import Unsummed

    ranks = Ranks("cuda", rank, 2, meeting_place(2, port))
    box, g = ranks._box, torch.Generator(ranks.device).manual_seed(1)
    assert box and box.by_readers

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=ranks.device)

    sizes, fn, big = (1, 4, 8, 32, 64, 100), drawn(24, 4 * 4096), drawn(700, 4096).bfloat16()
    given = [(drawn(t, 4, 4096).bfloat16(), drawn(t, 4), drawn(t, 4, 4)) for t in sizes]
    parts = [[drawn(t, 4096).bfloat16() for _ in range(2)] for t in sizes]

    def chain() -> list[torch.Tensor]:
        return [
            out
            for (x, post, comb), both in zip(given, parts, strict=True)
            for out in (streams_cuda.after(Unsummed(both[rank], box), x, post, comb, fn), box.sum(both[rank]))
        ]

    chain()
    graph, wrong = torch.cuda.CUDAGraph(), torch.zeros(2 * len(sizes), dtype=torch.int64, device=ranks.device)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = chain()
    for turn in range(200):
        for both in parts:
            for part in both:
                part.normal_(generator=g)
        if turn % 8 == 0:
            ranks.sum(big.clone())
        if turn % 4 == 2 * rank:
            torch.cuda._sleep(200_000 * (1 + turn % 3))
        graph.replay()
        graph.replay()
        sums = [torch.add(*both) for both in parts]
        want = [w for given_, y in zip(given, sums, strict=True) for w in (streams_cuda.after(y, *given_, fn), y)]
        wrong += torch.stack([(a != b).sum() for a, b in zip(found, want, strict=True)])
    answer = wrong.tolist()
    ranks.leave()
    return answer


def lost(folder: Path) -> tuple[bool, FinishReason | None, str, list[str]]:
    """Whether steps are graphs; how a stream ends when the other rank is killed; what is said of it."""
    pair = LLM.load(folder, device="cuda", tp=2, max_context=4096)
    assert pair.team and isinstance(pair.core._runner, Led)
    graphs, reasons = isinstance(pair.core._runner._runner.steps, Graphs), []  # type: ignore[attr-defined]
    pair.team.on_loss = reasons.append
    stream = pair.generate(prompts(4, (200,))[0], replace(PARAMS, max_tokens=3000))
    next(stream)
    pair.team._others[0].kill()
    begin = time.monotonic()
    *_, end = stream
    print(f"ended {time.monotonic() - begin:.2f} s after the other rank was killed", flush=True)
    pair.close()
    print(f"closed {time.monotonic() - begin:.2f} s after", flush=True)
    return graphs, end.finish, end.error or "", reasons


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP4 experts, FP8 linears."""
    path = tmp_path_factory.mktemp("models") / "stored"
    write_random(path, CONFIG, seed=5)
    return path


def test_two_gpus_are_as_near_to_the_truth_as_one(folder: Path, tmp_path: Path) -> None:
    """The truth is a CPU's in float32. A last bit of a sum changes what is rounded to e4m3 afterwards, and a random
    model's routing with it: single tokens may be far."""
    asked = prompts(1, LENGTHS)
    first, steps = distances(apart(tmp_path, "beginnings", folder, 2, asked), asked, folder)
    print(f"\nlog-probabilities from a CPU's: prompts {statistics.mean(first):.3f}, steps {statistics.mean(steps):.3f}")
    assert len(steps) > 2 * len(asked) and statistics.mean(first) < 0.15 and statistics.mean(steps) < 0.15


def by_both(tmp_path: Path, name: str) -> list[Any]:
    """What a function of this file gives on each of two ranks."""
    store, folders = meeting_place(2), [tmp_path / str(rank) for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: apart(folders[rank], name, store.port, rank), range(2)))


def test_sums_have_the_same_bits_by_either_way(tmp_path: Path) -> None:
    assert all(by_both(tmp_path, "sums"))


def test_no_number_of_a_thousand_sums_is_wrong(tmp_path: Path) -> None:
    assert not any(map(any, by_both(tmp_path, "chained")))


def test_the_same_bits_in_company_and_from_every_tier(folder: Path, tmp_path: Path) -> None:
    (shared,), tails = prompts(2, (900,)), prompts(3, (1, 20, 150, 129))
    asked = [shared[: 900 - 150 * i] + tail for i, tail in enumerate(tails)]
    want, _ = apart(tmp_path, "answers", folder, 2, asked, False, Memory(host=0))
    with_disk = Memory(slots=8, host=1 << 28, folder=tmp_path / "kv", prefill=256)
    for run in range(2):
        got, restored = apart(tmp_path, "answers", folder, 2, [*asked, asked[0]], True, with_disk)
        assert got == [*want, want[0]], run
    assert restored > 0


def test_a_lost_gpu_ends_every_request_with_its_reason(folder: Path, tmp_path: Path) -> None:
    graphs, finish, error, reasons = apart(tmp_path, "lost", folder)
    assert graphs and finish is FinishReason.ERROR and "rank 1 has ended" in error
    assert "rank 1 has ended" in reasons[0]
