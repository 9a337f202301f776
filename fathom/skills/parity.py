"""Is the sum of some digits even or odd: one running bit."""

import random
import re

from fathom.skills.base import Completion, Task, phrase, same_text, traces

_ASK = (
    "Is the sum even or odd? {items}",
    "Even or odd: the sum of {items}",
    "Tell me if these add up to an even or odd number: {items}",
    "Say whether the total is even or odd: {items}",
    "Is {items} in total even or odd?",
    "Parity of the sum of {items}",
)


class Parity:
    """Level n: 2n + 2 different digits."""

    name = "parity"

    def generate(self, rng: random.Random, level: int) -> Task:
        digits = rng.sample(range(10), 2 * level + 2)
        items = ",".join(map(str, digits))
        answer = "odd" if sum(digits) % 2 else "even"
        both = traces(_run(digits, 2), _run(digits, 1))
        return Task(self.name, level, phrase(rng, _ASK, items=items), answer, both, key=f"parity {items}")

    def verify(self, task: Task, completion: Completion) -> bool:
        odd = sum(d in "13579" for d in re.findall(r"\d", task.question))
        return same_text(completion, ("even", "odd")[odd % 2])


def _run(digits: list[int], stride: int) -> str:
    """The digits, and after every `stride` of them e or o for the sum so far: `4e7o2o`."""
    text, total = "", 0
    for i in range(0, len(digits), stride):
        group = digits[i : i + stride]
        total += sum(group)
        text += ",".join(map(str, group)) + ("o" if total % 2 else "e")
    return text
