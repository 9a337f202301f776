"""The scripted engine keeps the promises of `api.Engine` that those in front of it rely on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from fathom.api import Engine, Event, FinishReason, GenerateRequest, SamplingParams, Ticket
from fathom.engine.stub import Script, ScriptedEngine
from fathom.errors import ContextError, PromptError


def ask(engine: Engine, ids: list[int], namespace: str = "", **params: object) -> tuple[Ticket, Iterator[Event]]:
    events: SimpleQueue[Event] = SimpleQueue()
    request = GenerateRequest(prompt_ids=ids, params=SamplingParams(**params), namespace=namespace)  # type: ignore[arg-type]
    ticket = engine.submit(request, events.put)

    def listen() -> Iterator[Event]:
        while not (event := events.get(timeout=5)).finish:
            yield event
        yield event

    return ticket, listen()


def answer(engine: Engine, ids: list[int], namespace: str = "", **params: object) -> list[Event]:
    return list(ask(engine, ids, namespace, **params)[1])


def tokens(events: list[Event]) -> list[int]:
    return [e.token for e in events if e.token is not None]


def test_scripts_are_said_in_turn_and_the_last_one_for_ever() -> None:
    engine: Engine = ScriptedEngine([[1, 2], lambda prompt: [*prompt, 9], [3]])
    said = [tokens(answer(engine, [7, 8])) for _ in range(4)]
    assert said == [[1, 2], [7, 8, 9], [3], [3]]


@pytest.mark.parametrize(
    ("script", "params", "said", "finish"),
    [
        ([1, 2, 3], {}, [1, 2, 3], FinishReason.STOP),
        ([1, 2, 3], {"max_tokens": 2}, [1, 2], FinishReason.LENGTH),
        ([1, 2, 3], {"max_tokens": 3}, [1, 2, 3], FinishReason.LENGTH),
        ([1, 2, 3], {"stop_ids": (2,)}, [1], FinishReason.STOP),
        (list(range(20)), {}, list(range(8)), FinishReason.LENGTH),
        (Script([1], FinishReason.LENGTH), {}, [1], FinishReason.LENGTH),
        ([], {}, [], FinishReason.STOP),
    ],
)
def test_how_answers_end(script: list[int] | Script, params: dict[str, object], said: list[int], finish: str) -> None:
    events = answer(ScriptedEngine([script], context=10), [5, 6], **params)
    assert tokens(events) == said
    assert events[-1].finish is finish
    assert events[-1].usage is not None
    assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (2, len(said))


def test_an_error_has_its_line() -> None:
    end = answer(ScriptedEngine([Script([1], FinishReason.ERROR, "it broke")]), [5])[-1]
    assert (end.finish, end.error) == (FinishReason.ERROR, "it broke")


def test_cached_tokens_are_whole_blocks_of_what_the_namespace_has_seen() -> None:
    engine = ScriptedEngine([[1] * 200])
    first, other = [4] * 300, [4] * 130 + [5] * 170

    def cached(ids: list[int], namespace: str) -> int:
        usage = answer(engine, ids, namespace)[-1].usage
        assert usage is not None
        return usage.cached_tokens

    assert cached(first, "a") == 0
    assert cached(first, "b") == 0
    assert cached(first, "a") == 256
    assert cached(other, "a") == 128
    assert cached([*first, *[1] * 200, 6], "a") == 384
    assert cached([4] * 256, "a") == 128


def test_log_probabilities_only_when_asked() -> None:
    engine = ScriptedEngine([[3]])
    assert answer(engine, [5])[0].logprob is None
    found = answer(engine, [5], logprobs=4)[0].logprob
    assert found is not None
    values = [value for _, value in found.top]
    assert len(values) == 4 and values == sorted(values, reverse=True) and found.top[0] == (3, found.logprob)


def test_bad_prompts_are_refused_at_once_and_not_recorded() -> None:
    engine = ScriptedEngine([[1]], context=5)
    with pytest.raises(PromptError, match="empty"):
        engine.generate([], SamplingParams())
    with pytest.raises(ContextError, match=r"5 tokens.* holds 5"):
        engine.generate([1] * 5, SamplingParams())
    assert engine.requests == []


def test_the_gate_holds_answers_back_and_status_says_so() -> None:
    gate = threading.Event()
    engine = ScriptedEngine([[1]], gate=gate)
    (ticket, events), *_ = [ask(engine, [5]) for _ in range(3)]
    assert (engine.status().waiting, engine.status().running) == (3, 0)
    ticket.cancel()
    assert [e.finish for e in events] == [FinishReason.CANCELLED]
    gate.set()
    deadline = time.monotonic() + 5
    while engine.status().waiting + engine.status().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.status().waiting, engine.status().running) == (0, 0)


def test_cancelling_between_two_tokens() -> None:
    engine = ScriptedEngine([[1] * 1000], delay=0.02)
    ticket, events = ask(engine, [5])
    next(events)
    ticket.cancel()
    ticket.cancel()
    rest = list(events)
    assert rest[-1].finish is FinishReason.CANCELLED
    assert len(rest) < 900


@pytest.mark.parametrize("begun", [False, True])
def test_leaving_the_iterator_cancels(begun: bool) -> None:
    engine = ScriptedEngine([[1] * 1000], delay=0.02)
    events = engine.generate([5], SamplingParams())
    if begun:
        next(events)
    del events
    deadline = time.monotonic() + 5
    while engine.status().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.status().running


def test_close_ends_everything_even_what_comes_later() -> None:
    engine = ScriptedEngine([[1] * 1000], delay=0.02)
    _, events = ask(engine, [5])
    engine.close()
    assert list(events)[-1].finish is FinishReason.CANCELLED
    assert answer(engine, [5])[-1].finish is FinishReason.CANCELLED


def test_batches_come_back_in_order() -> None:
    engine = ScriptedEngine([lambda prompt: list(prompt)])
    batch = engine.generate_batch([([n, n + 1], SamplingParams()) for n in range(5)])
    assert [tokens(events) for events in batch] == [[n, n + 1] for n in range(5)]
