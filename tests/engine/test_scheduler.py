"""The scheduler: examples worked out by hand, and thousands of random workloads in a world that checks every step."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fathom.api import FinishReason, GenerateRequest, SamplingParams
from fathom.engine import request, scheduler, turns
from fathom.engine.pages import PagePool
from fathom.engine.request import Sequence
from fathom.engine.scheduler import Plan, Scheduler
from fathom.errors import ConfigError, ContextError
from tests.engine.world import Memory, RandomPrefixes, World

GROUPS, WORKLOADS = 25, 100


def small_pages(patch: pytest.MonkeyPatch, size: int, every: int) -> None:
    """The same rules on a smaller scale, so that a short workload crosses many borders."""
    for module in (request, scheduler, turns):
        patch.setattr(module, "PAGE", size)
    patch.setattr(request, "RESUME_EVERY", every)


def make(
    pages: int = 100, slots: int = 8, budget: int = 512, draw: random.Random | None = None, failures: float = 0.0
) -> World:
    pool, memory = PagePool(pages), Memory(request.PAGE)
    prefix = RandomPrefixes(draw, pool, memory, failures) if draw else None
    return World(Scheduler(pool, slots, budget, prefix), memory, prefix, slots)


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(50) for _ in range(length)]


def shape(plan: Plan) -> list[tuple[int, int, int]]:
    return [(p.sequence.id, p.start, p.end) for p in plan.pieces]


def run_to_the_end(world: World, limit: int = 10_000) -> None:
    while world.live:
        world.step()
        assert world.steps < limit
    world.finish()


def random_workload(seed: int, size: int) -> World:
    """A tiny pool, few slots, prompts from a few families, arrivals and cancellations at random; run to the end."""
    draw = random.Random(seed)
    pages, slots = draw.randint(2, 24), draw.randint(1, 8)
    budget = draw.choice([size, size + 3, 2 * size, 4 * size, 10 * size])
    world = make(pages, slots, budget, draw if draw.random() < 0.7 else None, draw.choice([0.0, 0.3]))
    families = [prompt(pages * size, n) for n in range(2)]
    arrivals = sorted(draw.randint(0, draw.choice([1, 60])) for _ in range(draw.randint(1, 30)))
    hurry, stop = draw.choice([0.0, 0.02, 0.1]), draw.choice([0.0, 0.05])
    names, limit = draw.randint(1, 4), 0
    while arrivals or world.live:
        while arrivals and arrivals[0] <= world.steps:
            arrivals.pop(0)
            length = draw.randint(1, draw.choice([pages * size, min(pages * size, 3 * size)]))
            shared = draw.choice([length, draw.randint(0, length)])
            ids = draw.choice(families)[:shared] + prompt(length - shared, draw.randrange(1000))
            answer = draw.randint(1, min(pages * size + 1 - length, draw.choice([3, 10 * size])))
            keep = tuple(draw.randint(0, length) for _ in range(draw.randint(0, 2)))
            world.submit(ids, answer, f"user {draw.randrange(names)}", keep)
            limit += length + answer
        if world.live and draw.random() < hurry:
            world.cancel(draw.choice(world.live))
        world.step(stop, draw)
        if world.prefix:
            world.prefix.forget()
        assert world.steps < 100 + 5 * limit, "sequences push each other out for ever"
    world.finish()
    assert all(s.finish for s in world.watches)
    return world


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_workloads_keep_every_promise(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pages(monkeypatch, 8, 32)
    worlds = [random_workload(group * WORKLOADS + n, 8) for n in range(WORKLOADS)]
    met = Counter(
        preempted=sum(w.preempted for w in worlds),
        restored=sum(w.prefix.restored for w in worlds if w.prefix),
        failed=sum(w.prefix.failed for w in worlds if w.prefix),
        cancelled=sum(s.finish == FinishReason.CANCELLED for w in worlds for s in w.watches),
    )
    assert all(met[event] > 5 for event in ("preempted", "restored", "failed", "cancelled")), met


@pytest.mark.parametrize("seed", range(10))
def test_random_workloads_with_pages_of_128_tokens(seed: int) -> None:
    random_workload(100_000 + seed, 128)


def test_a_prompt_is_cut_at_multiples_of_128_and_the_budget() -> None:
    world = make(budget=300)
    world.submit(prompt(700), 2, "a")
    # 640 is a resume point: the last multiple of 128 in the prompt.
    wanted = [(0, 0, 256)], [(0, 256, 512)], [(0, 512, 640)], [(0, 640, 700)], [(0, 700, 701)]
    assert [shape(world.step()) for _ in wanted] == list(wanted)
    assert not world.live


def test_prompts_share_what_is_left_of_the_budget() -> None:
    world = make(budget=512)
    for n, length in enumerate((100, 100, 90, 500)):
        world.submit(prompt(length, n), 5, "a")
    # 222 tokens are left for the last prompt, and only a whole tile of them is taken.
    assert shape(world.step()) == [(0, 0, 100), (1, 0, 100), (2, 0, 90), (3, 0, 128)]
    assert shape(world.step())[3:] == [(3, 128, 384)]


def test_answers_never_wait_for_a_long_prompt() -> None:
    world = make(pages=400, budget=256)
    answers = [world.submit(prompt(20, n), 300, "a") for n in range(4)]
    world.step()
    world.submit(prompt(32_000), 1, "a")
    for n in range(120):
        plan = world.step()
        assert [p.sequence for p in plan.pieces[:4]] == answers
        assert sum(p.count for p in plan.pieces[4:]) <= 256
        assert all(len(s.ids) == s.prompt + 2 + n for s in answers)


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one() -> None:
    """Nor a long one for the last of many short ones: each has every other tile."""
    world = make(pages=2000, slots=9, budget=256)
    long = world.submit(prompt(32_000), 1, "a")
    world.step()
    for n in range(60):
        short = world.submit(prompt(100, n), 1, "a")
        before = long.at
        world.step()
        assert short.finish and long.at >= before + 128


def test_resume_points_end_a_chunk() -> None:
    world = make(budget=4096)
    sequence = world.submit(prompt(1000), 1, "a", keep=(300, 5000, 0))
    assert sequence.keep == {256, 896}
    assert [shape(world.step()) for _ in range(3)] == [[(0, 0, 256)], [(0, 256, 896)], [(0, 896, 1000)]]


def test_a_whole_number_of_pages_can_be_repeated_cheaply() -> None:
    assert make().submit(prompt(512), 1, "a").keep == {384, 512}


def test_a_resume_point_every_4096_tokens() -> None:
    world = make(pages=100, budget=100_000)
    world.submit(prompt(10_000), 1, "a")
    ends = [shape(world.step())[0][2] for _ in range(4)]
    assert ends == [4096, 8192, 9984, 10_000]


def test_one_client_with_fifty_requests_does_not_starve_another() -> None:
    world = make(slots=2)
    for n in range(50):
        world.submit(prompt(10, n), 4, "busy")
    late = [world.submit(prompt(10, 99 + n), 4, "late") for n in range(2)]
    order: list[Sequence] = []
    while world.live:
        order += world.step().admitted
    assert [order.index(s) for s in late] == [1, 3]
    assert [s.id for s in order if s.namespace == "busy"] == list(range(50))


def test_one_clients_long_prompt_leaves_half_the_budget_to_another() -> None:
    world = make(pages=400, budget=512)
    world.submit(prompt(30_000), 1, "busy")
    world.step()
    world.submit(prompt(1000), 1, "late")
    assert shape(world.step())[:2] == [(0, 512, 768), (1, 0, 256)]


def test_a_long_prompt_that_does_not_fit_yet_is_not_overtaken() -> None:
    world = make(pages=10)
    first = world.submit(prompt(600), 100, "a")
    world.step()
    long = world.submit(prompt(1000), 1, "a")
    short = world.submit(prompt(10), 1, "b")
    while not first.finish:
        plan = world.step()
        assert not plan.admitted or first.finish
    assert world.step().admitted == (long, short)
    run_to_the_end(world)


def test_the_youngest_gives_way_and_comes_back_with_its_ids() -> None:
    world = make(pages=4, slots=2)
    old, young = (world.submit(prompt(120, n), 300, "a") for n in range(2))
    while not world.preempted:
        plan = world.step()
    assert plan.preempted == (young,)
    sampled = list(young.ids)
    assert len(sampled) > 240
    third = world.submit(prompt(10, 3), 1, "b")
    while not young.slot:
        plan = world.step()
        assert third not in plan.admitted, "it waits in front"
        assert plan.pieces[0].sequence is old or old.finish
        if old.finish and young in plan.admitted:
            break
    assert young.ids[: len(sampled)] == sampled
    assert young.lives == 2
    run_to_the_end(world)
    assert len(young.ids) == 420


def test_one_sequence_may_fill_the_pool_to_the_last_token() -> None:
    world = make(pages=3)
    sequence = world.submit(prompt(300), 85, "a")
    assert sequence.end == world.scheduler.capacity == 385
    run_to_the_end(world)
    assert len(sequence.ids) == 385
    assert not world.preempted


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    world = make(pages=3)
    too_long = GenerateRequest(prompt_ids=prompt(300), params=SamplingParams(max_tokens=86))
    with pytest.raises(ContextError, match=r"386 tokens.* 385"):
        world.scheduler.add(Sequence.open(too_long, 10_000))
    assert world.scheduler.waiting == 0


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="127"):
        Scheduler(PagePool(4), 1, 127)
    with pytest.raises(ConfigError, match="0 sequences"):
        Scheduler(PagePool(4), 0)


def test_pages_of_an_answer_are_neighbours() -> None:
    world = make(pages=50)
    sequence = world.submit(prompt(300), 1000, "a")
    for _ in range(900):
        world.step()
    assert sequence.pages == list(range(sequence.pages[0], sequence.pages[0] + 10))


@pytest.mark.parametrize("when", ["waiting", "prefill", "answer", "preempted"])
def test_cancelled_within_one_step(when: str) -> None:
    world = make(pages=4 if when == "preempted" else 10, slots=2)
    other = world.submit(prompt(120), 300, "a")
    sequence = world.submit(prompt(120 if when == "preempted" else 260, 1), 200, "a")
    reached = {
        "waiting": lambda: True,
        "prefill": lambda: 0 < sequence.at < 260,
        "answer": lambda: len(sequence.ids) > 262,
        "preempted": lambda: world.preempted,
    }
    if when == "prefill":
        world.scheduler.token_budget = 128
    while not reached[when]():
        world.step()
        assert world.steps < 500
    world.cancel(sequence)
    assert sequence not in {p.sequence for p in world.step().pieces}
    assert sequence.slot is None and not sequence.pages
    run_to_the_end(world)
    assert other.finish == FinishReason.LENGTH


def test_cancelled_while_a_step_is_computed() -> None:
    world = make()
    sequence = world.submit(prompt(300), 5, "a")
    plan = world.scheduler.plan()
    world.cancel(sequence)
    world.scheduler.advance(plan)
    assert world.scheduler.plan() == Plan(())
    world.finish()


def test_a_cached_beginning_is_not_computed_again() -> None:
    world = make(draw=random.Random(0))
    first = world.submit(prompt(1000), 1, "a")
    run = 0
    while world.live:
        world.step()
        run += 1
    again, other = world.submit(prompt(1000), 1, "a"), world.submit(prompt(1000), 1, "b")
    assert shape(world.step())[0] == (again.id, 896, 1000)
    assert (first.cached, again.cached, other.cached) == (0, 896, 0)
    assert again.usage.cached_tokens == 896
    run_to_the_end(world)


def test_a_divergence_gets_a_resume_point() -> None:
    world = make(draw=random.Random(0))
    world.submit(prompt(1000), 1, "a")
    while world.live:
        world.step()
    branch = prompt(1000)[:600] + prompt(300, 7)
    sequence = world.submit(branch, 1, "a")
    # 512 tokens are known in whole blocks, but no state stands there: the second that branches there finds one.
    assert shape(world.step()) == [(sequence.id, 0, 512)]
    while world.live:
        world.step()
    third = world.submit(prompt(1000)[:600] + prompt(300, 8), 1, "a")
    world.step()
    assert third.cached == 512
    run_to_the_end(world)


def test_an_unreadable_beginning_is_computed() -> None:
    world = make(draw=random.Random(0))
    world.submit(prompt(1000), 1, "a")
    while world.live:
        world.step()
    assert world.prefix
    world.prefix.failures = 1.0
    sequence = world.submit(prompt(1000), 1, "a")
    assert shape(world.step())[0][1] == 0
    assert sequence.cached == 0
    run_to_the_end(world)
    assert world.prefix.failed


def test_held_memory_is_waited_for() -> None:
    """Pages that somebody else pins: nothing is planned, nothing is lost, and it goes on when they come back."""
    world = make(pages=4)
    held = world.scheduler.pool.allocate(3) or []
    sequence = world.submit(prompt(300), 1, "a")
    assert world.scheduler.plan() == Plan(())
    for page in held:
        world.scheduler.pool.release(page)
    assert sequence.slot is None
    run_to_the_end(world)
    assert sequence.finish == FinishReason.LENGTH
