"""The engine's core on a tiny random model: the same answers in any company and after any accident."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.api import Event, FinishReason, GenerateRequest, Guide, SamplingParams, Usage
from fathom.engine.engine import Core
from fathom.engine.memory import Memory
from fathom.engine.request import Sequence
from fathom.errors import ConfigError, ContextError, PromptError
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from tests.engine.prompts import tiny

PAGE = 128


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny(3, Numerics(quantize=True), eos_token_id=1)


def core(model: Transformer, pages: int = 200, **memory: Any) -> Core:
    """A core whose cache has so many pages."""
    page_bytes = Core(model, 256).cache.page_bytes
    return Core(model, 4096, Memory(**{"device": pages * page_bytes, **memory}))


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 49, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Heard:
    """A request and the events that came."""

    request: GenerateRequest
    events: list[Event] = field(default_factory=list)
    sequence: Sequence | None = None

    @property
    def end(self) -> Event:
        *said, end = self.events
        assert end.finish and end.usage and not any(e.finish for e in said), "one end, and it comes last"
        assert end.usage.completion_tokens == len(said)
        return end

    @property
    def usage(self) -> Usage:
        assert self.end.usage
        return self.end.usage

    @property
    def answer(self) -> list[object]:
        """Tokens and, to the last bit, their log probabilities, and how it ended."""
        return [*((e.token, e.logprob) for e in self.events[:-1]), self.end.finish]


def ask(engine: Core, request: GenerateRequest) -> Heard:
    engine.check(request)
    heard = Heard(request)
    heard.sequence = engine.add(request, heard.events.append)
    return heard


def run(engine: Core) -> None:
    while engine.step():
        pass
    assert not engine.scheduler.waiting and not engine.scheduler.running


def tell(engine: Core, prompt: list[int], **fields: Any) -> Heard:
    """One request, alone, to its end."""
    guide, namespace, keep = fields.pop("guide", None), fields.pop("namespace", ""), fields.pop("keep", ())
    params = SamplingParams(**{"max_tokens": 8, "seed": 1, "logprobs": 2} | fields)
    request = GenerateRequest(prompt_ids=prompt, params=params, guide=guide, namespace=namespace, keep=keep)
    heard = ask(engine, request)
    run(engine)
    return heard


def workload(seed: int, count: int) -> list[GenerateRequest]:
    """Requests of all lengths; most share a beginning with others, some are greedy, some cut, some stop early."""
    draw = random.Random(seed)
    trunks = [ids(600, seed + n) for n in range(3)]
    requests = []
    for n in range(count):
        cut = draw.choice([0, 100, 128, 256, 300, 500])
        prompt = draw.choice(trunks)[:cut] + ids(draw.choice([1, 5, 60, 128, 200]), seed + 100 + n)
        params = SamplingParams(
            temperature=draw.choice([0.0, 1.0, 1.5]), top_p=draw.choice([1.0, 0.9]), top_k=draw.choice([None, 20]),
            seed=n, logprobs=3, max_tokens=draw.choice([1, 5, 12, 60]), stop_ids=draw.choice([(), (7, 9)]),
        )  # fmt: skip
        requests.append(GenerateRequest(prompt_ids=prompt, params=params, namespace=draw.choice(["", "a"])))
    return requests


def alone(model: Transformer, requests: list[GenerateRequest]) -> Iterator[list[object]]:
    """Each on an engine that knows nothing, its prompt in the largest chunks."""
    for request in requests:
        engine = core(model, host=0, prefill=4096, slots=1)
        heard = ask(engine, request)
        run(engine)
        yield heard.answer


def crowd(engine: Core, requests: list[GenerateRequest], seed: int) -> tuple[list[list[object]], int, int]:
    """All of them, arriving in any order while others run: the answers, pre-emptions, tokens from the cache."""
    draw, heard = random.Random(seed), {}
    order = draw.sample(range(len(requests)), len(requests))
    while order:
        for n in order[: draw.randint(1, 8)]:
            heard[n] = ask(engine, requests[n])
        order = order[len(heard) - len(requests) :] if len(heard) < len(requests) else []
        for _ in range(draw.randint(0, 6)):
            engine.step()
    run(engine)
    found = [heard[n] for n in range(len(requests))]
    lives = sum(h.sequence.lives - 1 for h in found if h.sequence)
    return [h.answer for h in found], lives, sum(h.usage.cached_tokens for h in found)


def same_bits(model: Transformer, folder: Path, seed: int, count: int) -> Counter[str]:
    """In any chunks, after pre-emption, and from every tier of the cache, a restart included. What was compared."""
    seen: Counter[str] = Counter()
    requests = workload(seed, count)
    expected = list(alone(model, requests))
    roomy = core(model, slots=count, prefill=640)
    answers, _, _ = crowd(roomy, requests, seed)
    assert answers == expected
    answers, _, seen["device"] = crowd(roomy, requests, seed + 1)
    assert answers == expected
    assert seen["device"] > 50 * count
    tight = core(model, pages=9, slots=7, prefill=128, folder=folder)
    answers, seen["pre-empted"], seen["memory"] = crowd(tight, requests, seed + 2)
    assert answers == expected
    assert seen["memory"] > 20 * count
    tight.close()
    again = core(model, pages=40, slots=5, host=0, folder=folder)
    answers, _, seen["disk"] = crowd(again, requests, seed + 3)
    assert answers == expected
    assert seen["disk"] > 50 * count
    again.close()
    return seen + Counter(answers=4 * count, tokens=4 * sum(len(answer) - 1 for answer in expected))


def test_the_same_bits_alone_and_among_others(model: Transformer, tmp_path: Path) -> None:
    same_bits(model, tmp_path, 1, 16)


@pytest.mark.external
def test_the_same_bits_many_times(model: Transformer, tmp_path: Path, say: Callable[[str], None]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(2, 22):
        seen += same_bits(model, tmp_path / str(seed), seed, 60)
    say(f"engine: {seen['answers']} answers, {seen['tokens']} tokens, equal to those alone and cold to the last bit;")
    say(f"  prompt tokens from {', '.join(f'the {n} {seen[n]}' for n in ('device', 'memory', 'disk'))}")


class Endless(Guide):
    """Allows all but the end of sentence."""

    def allowed(self) -> bytes:
        return ((1 << 200) - 3).to_bytes(25, "little")

    def accept(self, token: int) -> None:
        assert token != 1


def test_the_same_bits_after_pre_emption() -> None:
    """Answers that outgrow the memory: the youngest goes, and comes back in the middle of its answer. Without
    quantisers, which would round away that a token was computed in another way than at first.
    """
    model = tiny(3, eos_token_id=1)
    params = [SamplingParams(seed=n, max_tokens=150, logprobs=2, top_k=40) for n in range(4)]
    prompts = [ids(count, count) for count in (60, 127, 130, 5)]
    requests = [
        GenerateRequest(prompt_ids=prompt, params=p, guide=Endless()) for prompt, p in zip(prompts, params, strict=True)
    ]
    expected = list(alone(model, requests))
    for host in (0, 64 << 20):
        answers, lives, _ = crowd(core(model, pages=5, slots=4, host=host), requests, 0)
        assert lives
        assert answers == expected


def test_cancelled_within_a_step(model: Transformer) -> None:
    engine = core(model, slots=2)
    params = SamplingParams(max_tokens=500)
    heard = [ask(engine, GenerateRequest(prompt_ids=ids(200, n), params=params)) for n in range(3)]
    for _ in range(4):
        engine.step()
    for h in (heard[0], heard[2]):
        assert h.sequence
        engine.cancel(h.sequence)
        engine.cancel(h.sequence)
        assert h.end.finish is FinishReason.CANCELLED
    assert [heard[1].sequence] == list(engine.scheduler.running)
    told = len(heard[0].events)
    run(engine)
    assert len(heard[0].events) == told
    assert heard[2].usage == Usage(200, 0)
    assert heard[1].end.finish in (FinishReason.LENGTH, FinishReason.STOP)


def test_all_memory_is_free_or_cached_at_the_end(model: Transformer) -> None:
    engine = core(model, pages=14, slots=7)
    crowd(engine, workload(5, 20), 5)
    pool = engine.scheduler.pool
    cached = engine.prefix.tiers["device"][0] // engine.cache.page_bytes
    assert pool.free + cached == pool.count
    assert pool.ensure(pool.count), "and what is cached can be had"


def test_a_step_that_fails_ends_its_requests_and_no_others(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = core(model, slots=2)
    expected = tell(core(model), ids(150, 9)).answer
    first = [ask(engine, GenerateRequest(prompt_ids=ids(150, n))) for n in range(2)]
    engine.step()

    def fail(*args: object) -> None:
        raise RuntimeError("the layer\nbroke")

    params = SamplingParams(max_tokens=8, seed=1, logprobs=2)
    waiting = ask(engine, GenerateRequest(prompt_ids=ids(150, 9), params=params))
    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "admit", fail)
        assert engine.step()
    for heard in first:
        assert (heard.end.finish, heard.end.error) == (FinishReason.ERROR, "internal error: the layer")
    run(engine)
    assert waiting.answer == expected
    assert tell(engine, ids(150, 9)).answer == expected


@pytest.mark.parametrize("part", ["match", "restore", "reclaim"])
def test_books_that_fail_are_begun_anew(model: Transformer, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    engine = core(model, pages=6)
    expected = tell(engine, ids(400)).answer
    running = ask(engine, GenerateRequest(prompt_ids=ids(200, 3), params=SamplingParams(max_tokens=300)))
    engine.step()

    def fail(*args: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(engine.prefix, part, fail)
    engine.scheduler.pool.reclaim = engine.prefix.reclaim
    other = ask(engine, GenerateRequest(prompt_ids=ids(400), params=SamplingParams(max_tokens=200)))
    run(engine)
    ends = {running.end.finish, other.end.finish}
    assert FinishReason.ERROR in ends
    assert any("gone" in note for note in engine.status().notes)
    assert tell(engine, ids(400)).answer == expected
    assert tell(engine, ids(400)).usage.cached_tokens == 384


def test_a_cache_that_cannot_keep_does_not_cost_the_answer(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = core(model)
    expected = tell(core(model), ids(300)).answer

    def fail(*args: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(engine.prefix, "save", fail)
    assert tell(engine, ids(300)).answer == expected
    assert engine.status().notes == ("a resume point could not be kept: internal error: no more",)


class Only(Guide):
    """Allows one id after the other; fails when there is none left."""

    def __init__(self, *wanted: int) -> None:
        self.left = list(wanted)

    def allowed(self) -> bytes:
        return (1 << self.left[0]).to_bytes(25, "little")

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)


def test_guides_are_obeyed_and_their_faults_are_their_own(model: Transformer) -> None:
    engine = core(model)
    expected = tell(core(model), ids(100, 4)).answer
    guided = GenerateRequest(prompt_ids=ids(100, 5), guide=Only(30, 31, 1))
    failing = GenerateRequest(prompt_ids=ids(100, 6), guide=Only(40))
    heard = [ask(engine, guided), ask(engine, failing)]
    assert tell(engine, ids(100, 4)).answer == expected
    assert [e.token for e in heard[0].events] == [30, 31, None]
    assert heard[0].end.finish is FinishReason.STOP, "the end of sentence is not shown"
    assert [e.token for e in heard[1].events] == [40, None]
    assert heard[1].end.finish is FinishReason.ERROR
    assert heard[1].end.error and "\n" not in heard[1].end.error


def test_a_sink_that_fails_stops_nobody(model: Transformer) -> None:
    engine = core(model)

    def broken(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    engine.add(GenerateRequest(prompt_ids=ids(9), params=SamplingParams(max_tokens=5)), broken)
    assert len(tell(engine, ids(20)).answer) > 1
    assert not engine.scheduler.running


def test_resume_points(model: Transformer) -> None:
    """At the prompt's end, at the answer's, where prompts part, where asked, every 4,096; never across namespaces."""
    engine = Core(model, 8192, Memory(slots=2))
    base = ids(700)

    def cached(prompt: list[int], **fields: Any) -> int:
        return tell(engine, prompt, **{"temperature": 0} | fields).usage.cached_tokens

    assert cached(base) == 0
    assert cached(base) == 640
    assert cached(base, namespace="b") == 0
    assert cached(base[:640]) == 0, "the state is at 640, and the last token must be computed"
    assert cached(base[:640]) == 512
    assert cached(base[:300] + ids(200, 1)) == 0
    assert cached(base[:300] + ids(200, 2)) == 256, "where the two before have parted"
    assert cached(ids(700, 5), keep=(400,)) == 0
    assert cached(ids(700, 5)[:400] + ids(50, 6)) == 384
    assert cached(ids(4300, 7)) == 0
    assert cached(ids(4300, 7)[:4200] + ids(50, 8)) == 4096


def test_the_next_turn_goes_on_where_the_answer_ended(model: Transformer) -> None:
    engine = core(model)
    answer = [e.token for e in tell(engine, ids(100), max_tokens=200, stop_ids=()).events if e.token is not None]
    assert len(answer) > 50
    whole = ids(100) + answer
    assert tell(engine, whole + ids(30, 2)).usage.cached_tokens == (len(whole) - 1) // PAGE * PAGE


def test_what_is_refused(model: Transformer) -> None:
    engine = core(model, pages=2)
    assert engine.context == 2 * PAGE + 1
    for prompt, kind, words in (
        ([], PromptError, "empty"),
        ([3, 198], PromptError, "token id 198 at place 1"),
        (ids(300), ContextError, "300 tokens.* holds 257"),
    ):
        with pytest.raises(kind, match=words):
            engine.check(GenerateRequest(prompt_ids=prompt))
    assert len(tell(engine, ids(256), temperature=0).events) == 2
    for name, value in (("slots", 0), ("prefill", 127), ("device", 0), ("host", -1), ("disk", 0)):
        with pytest.raises(ConfigError, match=f"{name} {value}"):
            Memory(**{name: value})


def test_closing_ends_everyone(model: Transformer) -> None:
    engine = core(model, slots=1)
    heard = [ask(engine, GenerateRequest(prompt_ids=ids(50, n))) for n in range(3)]
    engine.step()
    engine.close()
    assert [h.end.finish for h in heard] == [FinishReason.CANCELLED] * 3
