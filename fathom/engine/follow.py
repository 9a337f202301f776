"""A process of a team that is not its leader: loads its part, then does as it is told. See `team`.

Orders come in on standard input, answers go out where standard output was; what anything prints goes to stderr.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fathom.engine.cache import PagedCache
from fathom.engine.device_cache import DeviceCache
from fathom.engine.llm import load_part
from fathom.engine.memory import furnish, room
from fathom.engine.runner import Runner, Work
from fathom.engine.team import Part
from fathom.errors import FathomError
from fathom.parallel.tensor import Ranks


class Follower:
    """One rank's cache and runner, and the orders to it."""

    def __init__(self, ranks: Ranks, cache: PagedCache | DeviceCache, runner: Runner) -> None:
        self.ranks, self.cache, self.runner = ranks, cache, runner
        self._pages: dict[int, Sequence[int]] = {}

    def obey(self, orders: Iterable[Sequence[Any]]) -> None:
        """Do what is ordered, until there is no more. What is refused, the leader has refused as well."""
        cache = self.cache
        known: dict[str, Callable[..., None]] = {
            "run": self._run,
            "load_blocks": cache.load_blocks,
            "load_state": cache.load_state,
        }
        for name, *values in orders:
            try:
                known[name](*values)
            except FathomError:
                continue

    def _run(self, news: Sequence[tuple[Any, ...]]) -> None:
        works = []
        for slot, pages, prompt, start, tokens, samples in news:
            if pages is not None:
                self._pages[slot] = pages
            works.append(Work(slot, self._pages[slot], prompt, start, tokens, samples))
        self.ranks.gathered(self.runner.run(works))


def follow(part: Part, hear: Callable[[], Any], say: Callable[[str, Any], None]) -> None:
    """A follower's whole life. Raises EOFError when the leader has nothing more to say."""
    say("here", part.rank)
    ranks = part.join()
    model = load_part(part, ranks)
    context = part.context or model.config.max_position_embeddings
    say("room", room(model, part.memory, context))
    (pages,) = hear()
    Follower(ranks, *furnish(model, part.memory, context, pages, alone=False)).obey(iter(hear, None))


def main() -> None:
    """The process that `team` starts."""
    for number in (signal.SIGINT, signal.SIGTERM):  # who signals all of them means the leader, whose answers may go on
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()

    def hear() -> Any:
        return pickle.load(sys.stdin.buffer)

    def say(kind: str, value: Any) -> None:
        answers.write(pickle.dumps((kind, value)))

    code = 2
    try:
        follow(hear(), hear, say)
    except EOFError:
        code = 0
    except Exception as error:
        if not isinstance(error, FathomError):
            traceback.print_exc()
        say("failed", str(error).split("\n")[0] or type(error).__name__)
    finally:
        os._exit(code)  # a device may wait for others


def _leave_with(leader: int) -> None:
    """End when the leader is gone, also in the middle of a sum."""
    while os.getppid() == leader:
        time.sleep(1)
    os._exit(1)
