"""The feed between an engine's thread and the event loop, and the bytes of a frame."""

from __future__ import annotations

import asyncio
import random
import threading
import time

from fathom.api import Event, FinishReason
from fathom.encoding.answer import Frame
from fathom.server.sse import Feed, frame_bytes


def test_frames_are_what_the_standard_says() -> None:
    assert frame_bytes(Frame('{"a":1}')) == b'data: {"a":1}\n\n'
    assert frame_bytes(Frame("{}", "message_stop")) == b"event: message_stop\ndata: {}\n\n"


def test_every_event_arrives_once_and_in_order() -> None:
    """Four threads, each with its own feed, put at random moments; the loop takes whenever it can."""
    count = 3000

    def say(feed: Feed, draw: random.Random) -> None:
        for n in range(count):
            feed.put(Event(token=n))
            if draw.random() < 0.01:
                time.sleep(draw.random() / 500)
        feed.put(Event(finish=FinishReason.STOP))

    async def listen(feed: Feed) -> list[int | None]:
        heard: list[Event] = []
        while not heard or not heard[-1].finish:
            batch = await feed.take(5)
            assert batch, "an event was lost, or nobody was woken"
            heard += batch
        return [event.token for event in heard[:-1]]

    async def main() -> list[list[int | None]]:
        feeds = [Feed() for _ in range(4)]
        threads = [threading.Thread(target=say, args=(feed, random.Random(n))) for n, feed in enumerate(feeds)]
        for thread in threads:
            thread.start()
        heard = await asyncio.gather(*map(listen, feeds))
        for thread in threads:
            thread.join()
        return heard

    assert asyncio.run(main()) == [list(range(count))] * 4


def test_a_batch_wakes_the_loop_once() -> None:
    async def main() -> int:
        feed, woken = Feed(), 0
        wake = feed._ready.set

        def count() -> None:
            nonlocal woken
            woken += 1
            wake()

        feed._ready.set = count  # type: ignore[method-assign]
        for n in range(100):
            feed.put(Event(token=n))
        assert len(await feed.take(5)) == 100
        return woken

    assert asyncio.run(main()) == 1


def test_waiting_has_an_end() -> None:
    async def main() -> tuple[list[Event], float, list[Event]]:
        feed, begun = Feed(), time.monotonic()
        nothing = await feed.take(0.05)
        waited = time.monotonic() - begun
        asyncio.get_running_loop().call_later(0.05, feed.ring)
        return nothing, waited, await feed.take(30)

    nothing, waited, rung = asyncio.run(main())
    assert nothing == rung == [] and 0.04 < waited < 10


def test_it_holds_no_more_than_its_limit_but_always_the_end() -> None:
    async def main() -> list[Event]:
        feed = Feed(limit=10)
        for n in range(1000):
            feed.put(Event(token=n))
        feed.put(Event(finish=FinishReason.STOP))
        assert feed.overflown
        return await feed.take(5)

    held = asyncio.run(main())
    assert len(held) == 11 and held[-1].finish is FinishReason.STOP


def test_an_engine_may_speak_after_the_loop_has_ended() -> None:
    async def main() -> Feed:
        return Feed()

    asyncio.run(main()).put(Event(token=1))
