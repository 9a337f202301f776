"""The shell game: a coin under one of five cups, and swaps."""

import itertools
import random
import re

from fathom.skills.base import Completion, Task, phrase, same_text, traces

_CUPS = "ABCDE"
_ASK = (
    "A coin is under cup {start}. Swap cups {swaps}. Where is the coin?",
    "The coin starts under cup {start}. These cups are swapped: {swaps}",
    "Cup {start} hides a coin. I swap {swaps}. Which cup hides it now?",
    "Follow the coin under cup {start}: {swaps}",
    "There are five cups, the coin is under {start}. Swaps: {swaps}",
    "Where does a coin under cup {start} end after the swaps {swaps}?",
)


class Cups:
    """Level n: 2n + 1 swaps, no pair of cups twice."""

    name = "cups"

    def generate(self, rng: random.Random, level: int) -> Task:
        start = rng.choice(_CUPS)
        pairs = rng.sample(list(itertools.combinations(_CUPS, 2)), 2 * level + 1)
        swaps = [rng.sample(pair, 2) for pair in pairs]
        listed = ",".join("-".join(swap) for swap in swaps)
        question = phrase(rng, _ASK, start=start, swaps=listed)
        answer, fine = _follow(start, swaps, 1)
        coarse = _follow(start, swaps, 2)[1]
        return Task(self.name, level, question, answer, traces(coarse, fine), key=f"coin {start} {listed}")

    def verify(self, task: Task, completion: Completion) -> bool:
        cups = {cup: False for cup in _CUPS}
        cups[re.findall(r"(?:[Cc]up|under) ([A-E])\b", task.question)[0]] = True
        for a, b in re.findall(r"([A-E])-([A-E])", task.question):
            cups[a], cups[b] = cups[b], cups[a]
        return same_text(completion, next(cup for cup, coin in cups.items() if coin))


def _follow(place: str, swaps: list[list[str]], stride: int) -> tuple[str, str]:
    """The last place and the run: swaps, and after every `stride` of them where the coin is: `B,A-B=A,C-A=C`."""
    text = place
    for i, (a, b) in enumerate(swaps, 1):
        place = {a: b, b: a}.get(place, place)
        text += f",{a}-{b}" + (f"={place}" if i % stride == 0 or i == len(swaps) else "")
    return place, text
