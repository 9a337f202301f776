"""Two processes, a GPU each, that hold one model: the bits of any company, every tier, and an end that is told.

A process is a rank of one model only, on a GPU for good: each of these is computed in a process of its own.
"""

from __future__ import annotations

import pickle
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.api import FinishReason, SamplingParams
from fathom.checkpoint.random import write_random
from fathom.engine.graphs import Graphs
from fathom.engine.llm import LLM
from fathom.engine.memory import Memory
from fathom.engine.team import Led
from tests.engine.test_team import CONFIG, PARAMS, Answer, alone, answer, prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")]
ROOT = Path(__file__).parents[2]
LENGTHS = (1, 2, 5, 9, 17, 30, 31, 40, 55, 60, 63, 64)
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
    llm = LLM.load(folder, device="cuda" if tp > 1 else "cuda:0", tp=tp, max_context=4096, memory=memory)
    runs = llm.generate_batch([(ids, PARAMS) for ids in asked]) if together else []
    found = [answer(events) for events in runs] or [alone(llm, ids) for ids in asked]
    restored = llm.status().restored.get("disk", 0)
    llm.close()
    return found, restored


def firsts(folder: Path, tp: int, asked: list[list[int]], device: str = "cuda") -> list[dict[int, float]]:
    """Each prompt's most probable next tokens."""
    llm = LLM.load(folder, device=device if device == "cpu" or tp > 1 else "cuda:0", tp=tp, max_context=4096)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    events = [event for ids in asked for event in llm.generate(ids, params) if event.logprob]
    llm.close()
    return [dict(event.logprob.top) for event in events if event.logprob]


def distance(found: list[dict[int, float]], truth: list[dict[int, float]]) -> float:
    """The median over prompts of how far log-probabilities are on average; who is not listed has the lowest listed.
    (Random ones of other prompts are 0.3 apart.)"""
    gaps = [
        statistics.mean(abs(got.get(token, min(got.values())) - value) for token, value in want.items())
        for got, want in zip(found, truth, strict=True)
    ]
    return statistics.median(gaps)


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
    model's routing with it."""
    asked = prompts(1, LENGTHS)
    far = distance(apart(tmp_path, "firsts", folder, 2, asked), firsts(folder, 1, asked, "cpu"))
    print(f"\nlog-probabilities from a CPU's: {far:.3f}")
    assert far < 0.1


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
