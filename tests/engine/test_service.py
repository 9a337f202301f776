"""The thread in front of the core: callers on other threads, cancellation, and every way to end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from fathom.api import Engine, Event, FinishReason, GenerateRequest, SamplingParams
from fathom.engine import service as engine_service
from fathom.engine.engine import Core
from fathom.engine.memory import Memory
from fathom.engine.service import Service
from fathom.errors import ContextError, PromptError
from fathom.model.transformer import Transformer
from tests.engine.prompts import tiny

LONG = SamplingParams(max_tokens=2000, stop_ids=(), seed=1)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Its end of sentence is an id that it does not sample soon."""
    return tiny(3, eos_token_id=0)


@pytest.fixture
def service(model: Transformer) -> Iterator[Service]:
    service = Service(Core(model, 4096, Memory(slots=4, device=8 << 20, host=0)))
    yield service
    service.close()


def request(*prompt: int, **params: int) -> GenerateRequest:
    return GenerateRequest(prompt_ids=prompt or [5, 6, 7], params=SamplingParams(seed=1, **params))  # type: ignore[arg-type]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def idle(engine: Engine) -> bool:
    status = engine.status()
    return status.waiting + status.running == 0


def drain(events: SimpleQueue[Event]) -> Event:
    """The last event; fails when it does not come."""
    while not (event := events.get(timeout=20)).finish:
        pass
    assert event.usage
    return event


def test_an_engine_as_the_waist_says(service: Service) -> None:
    engine: Engine = service
    *said, end = engine.generate([5, 6, 7], SamplingParams(max_tokens=4, seed=2))
    assert len(said) == 4 and end.finish is FinishReason.LENGTH
    assert idle(engine)
    assert set(engine.status().tiers) == {"device", "host"}


def test_refusals_come_at_once_on_the_caller_s_thread(service: Service) -> None:
    for prompt, kind in (([], PromptError), ([10**6], PromptError), ([5] * 4096, ContextError)):
        with pytest.raises(kind):
            service.generate(prompt, LONG)
        with pytest.raises(kind):
            service.generate_batch([([5], LONG), (prompt, LONG)])
    assert eventually(lambda: idle(service)), "and of a batch nobody stays behind"


def test_many_callers_at_once(service: Service) -> None:
    """Each gets its own answer, the same that it gets alone."""
    expected = [list(service.generate([n + 2, 9], SamplingParams(max_tokens=6, seed=n))) for n in range(12)]
    found: dict[int, list[Event]] = {}

    def call(n: int) -> None:
        found[n] = list(service.generate([n + 2, 9], SamplingParams(max_tokens=6, seed=n)))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [found[n] for n in range(12)] == expected


def test_cancelled_from_any_thread_any_number_of_times(service: Service) -> None:
    queues = [SimpleQueue[Event]() for _ in range(8)]
    tickets = [service.submit(request(3, n + 3, max_tokens=2000), queue.put) for n, queue in enumerate(queues)]
    queues[0].get(timeout=10)
    for ticket in tickets:
        for _ in range(2):
            threading.Thread(target=ticket.cancel).start()
    assert [drain(queue).finish for queue in queues] == [FinishReason.CANCELLED] * 8
    assert eventually(lambda: idle(service))
    assert all(queue.empty() for queue in queues), "the end comes once, and last"


def test_cancelled_from_its_own_sink(service: Service) -> None:
    events: SimpleQueue[Event] = SimpleQueue()

    def sink(event: Event) -> None:
        events.put(event)
        ticket.cancel()

    with service._worker._wake:
        ticket = service.submit(request(max_tokens=2000), sink)
    assert drain(events).finish is FinishReason.CANCELLED
    assert events.empty()


@pytest.mark.parametrize("begun", [False, True])
def test_leaving_the_iterator_cancels(service: Service, begun: bool) -> None:
    events = service.generate([5, 6], LONG)
    if begun:
        next(events)
    del events
    assert eventually(lambda: idle(service))


def test_ctrl_c_while_waiting_leaves_the_engine_usable(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    events = service.generate([5, 6], LONG)
    next(events)

    def interrupt() -> Event:
        raise KeyboardInterrupt

    monkeypatch.setattr(events, "_events", type("Queue", (), {"get": staticmethod(interrupt), "put": print}))
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert list(events) == []
    assert eventually(lambda: idle(service))
    assert len(list(service.generate([5, 6], SamplingParams(max_tokens=3)))) > 1


def test_closing_ends_what_runs_what_waits_and_what_comes_later(model: Transformer) -> None:
    service = Service(Core(model, 4096, Memory(slots=1, device=8 << 20, host=0)))
    queues = [SimpleQueue[Event]() for _ in range(3)]
    tickets = [service.submit(request(max_tokens=2000), queue.put) for queue in queues]
    queues[0].get(timeout=10)
    service.close()
    service.close()
    assert [drain(queue).finish for queue in queues] == [FinishReason.CANCELLED] * 3
    tickets[0].cancel()
    (end,) = service.generate([5, 6], LONG)
    assert end.finish is FinishReason.CANCELLED and end.usage and end.usage.prompt_tokens == 2
    assert not service._worker._thread.is_alive()


def test_closing_does_not_wait_for_a_device_that_waits_for_ever(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU does within a sum, when another rank is gone."""
    monkeypatch.setattr(engine_service, "_LAST", 0.2)
    core, stuck = Core(model, 4096, Memory(slots=1, device=8 << 20, host=0)), threading.Event()
    release = threading.Event()

    def step() -> bool:
        stuck.set()
        return release.wait(60)

    monkeypatch.setattr(core, "step", step)
    service = Service(core)
    service.submit(request(5, 6), lambda event: None)
    assert stuck.wait(20)
    core.lost = "rank 1 has ended"
    service.close()
    assert not release.is_set()
    release.set()


@pytest.mark.parametrize("part", ["plan", "advance", "add", "cancel", "finish"])
def test_a_fault_that_nobody_foresaw_ends_everyone_but_not_the_engine(
    service: Service, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("not foreseen")

    first: SimpleQueue[Event] = SimpleQueue()
    other: SimpleQueue[Event] = SimpleQueue()
    service.submit(request(max_tokens=2000), first.put)
    first.get(timeout=10)
    monkeypatch.setattr(service.core.scheduler, part, broken)
    service.submit(request(max_tokens=2), other.put).cancel()
    for end in map(drain, (first, other)):
        assert end.finish in (FinishReason.ERROR, FinishReason.CANCELLED)
        assert end.error in (None, "internal error: not foreseen")
    assert len(list(service.generate([5, 6], SamplingParams(max_tokens=2)))) == 3


def test_status_counts_who_has_not_been_taken(service: Service) -> None:
    gate = threading.Event()

    def sink(event: Event) -> None:
        gate.wait(20)

    service.submit(request(max_tokens=2), sink)
    assert eventually(lambda: service.status().running == 1)
    for _ in range(3):
        service.submit(request(max_tokens=2), lambda event: None)
    assert (service.status().running, service.status().waiting) == (1, 3)
    gate.set()
    assert eventually(lambda: idle(service))


def test_a_forgotten_service_ends(model: Transformer) -> None:
    service = Service(Core(model, 4096, Memory(slots=1, device=8 << 20, host=0)))
    assert len(list(service.generate([5, 6], SamplingParams(max_tokens=2)))) > 1
    thread, gone = service._worker._thread, weakref.ref(service)
    del service
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_a_program_that_ends_in_the_middle_of_an_answer_ends_well() -> None:
    code = (
        "from tests.engine.prompts import tiny\n"
        "from fathom.engine.engine import Core\n"
        "from fathom.engine.memory import Memory\n"
        "from fathom.engine.service import Service\n"
        "from fathom.api import SamplingParams\n"
        "service = Service(Core(tiny(3, eos_token_id=0), 4096, Memory(slots=1, device=8 << 20, host=0)))\n"
        "events = service.generate([5, 6], SamplingParams(max_tokens=2000))\n"
        "print(next(events).token is not None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
