"""Chains of additions and subtractions modulo 10: one running digit."""

import random
import re

from fathom.skills.base import Completion, Task, phrase, same_text, traces

_WORDS = (
    "Modulo 10, start at {start}{words}. Where do you end?",
    "Count modulo 10. Start with {start}{words}.",
    "A dial shows the digits 0 to 9. It is at {start}{words}. What does it show?",
    "Keep only the last digit. Begin with {start}{words}.",
)
_SIGNS = (
    "Work modulo 10: {start}{signs}",
    "What is {start}{signs} modulo 10?",
    "Compute modulo 10: {start}{signs}",
    "Give the value modulo 10 of {start}{signs}",
)


class Chain:
    """Level n: 2n + 1 steps. The step sizes differ, so that "the next step" is one lookup."""

    name = "chain"

    def generate(self, rng: random.Random, level: int) -> Task:
        start = rng.randrange(10)
        steps = [rng.choice((1, -1)) * size for size in rng.sample(range(1, 10), 2 * level + 1)]
        words = "".join(f", {'add' if s > 0 else 'subtract'} {abs(s)}" for s in steps)
        signs = "".join(f"{s:+d}" for s in steps)
        question = phrase(rng, _WORDS + _SIGNS, start=start, words=words, signs=signs)
        answer = str((start + sum(steps)) % 10)
        both = traces(_run(start, steps, 2), _run(start, steps, 1))
        return Task(self.name, level, question, answer, both, key=f"{start}{signs} mod 10")

    def verify(self, task: Task, completion: Completion) -> bool:
        text = re.sub(r"(?i)modulo 10|0 to 9", "", task.question)
        text = text.replace("add ", "+").replace("subtract ", "-")
        return same_text(completion, str(sum(int(t) for t in re.findall(r"[+-]?\d", text)) % 10))


def _run(value: int, steps: list[int], stride: int) -> str:
    """The running value, written after every `stride` steps: `7+5=2-3=9`."""
    text = str(value)
    for i in range(0, len(steps), stride):
        group = steps[i : i + stride]
        value = (value + sum(group)) % 10
        text += "".join(f"{s:+d}" for s in group) + f"={value}"
    return text
