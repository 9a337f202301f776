"""Skills on spelled strings: reversing, and counting a letter. Strings are spelled "m-a-p-l-e", digits likewise."""

import random
import re
import string

from fathom.skills.base import Completion, Task, phrase, same_text, traces

_REVERSE = (
    'Reverse "{text}".',
    "Reverse {text}",
    'Spell this backwards: "{text}"',
    'What is "{text}" reversed?',
    'Write "{text}" in reverse order.',
    "Read it backwards: {text}",
    'Turn "{text}" around.',
)
_COUNT = (
    'How many times does {letter} occur in "{text}"?',
    'Count the letter {letter} in "{text}".',
    'How many {letter} are in "{text}"?',
    "How often does {letter} appear in {text}",
    'Number of {letter} in "{text}"?',
    'Look for {letter} in "{text}". How many are there?',
)


class Reverse:
    """Level n: 2n + 2 different letters, or as many different digits."""

    name = "reverse"

    def generate(self, rng: random.Random, level: int) -> Task:
        digits = rng.random() < 0.4
        items = rng.sample(string.digits if digits else string.ascii_lowercase, 2 * level + 2)
        marks = list(string.ascii_lowercase if digits else "123456789")
        text, answer = "-".join(items), "-".join(reversed(items))
        both = traces(_pairs(items), _numbered(items, marks))
        return Task(self.name, level, phrase(rng, _REVERSE, text=text), answer, both, key=f"reverse {text}")

    def verify(self, task: Task, completion: Completion) -> bool:
        found = re.findall(r"(?:\w-)+\w", task.question)
        return same_text(completion, found[-1][::-1])


def _pairs(items: list[str]) -> str:
    """Pairs turned around one by one, still in the old order."""
    return ",".join(f"{b}-{a}" for a, b in zip(items[::2], items[1::2], strict=True))


def _numbered(items: list[str], marks: list[str]) -> str:
    """Every item with its number, then the numbers counted down; digits are numbered by letters."""
    pairs = [mark + item for mark, item in zip(marks, items, strict=False)]
    return "".join(pairs) + "\n" + "".join(reversed(pairs))


class Count:
    """Level n: 3n + 3 letters; the one asked for occurs up to five times, the others once."""

    name = "count"

    def generate(self, rng: random.Random, level: int) -> Task:
        size = 3 * level + 3
        letter, *others = rng.sample(string.ascii_lowercase, size + 1)
        times = rng.randint(0, min(5, size // 2 + 1))
        items = [letter] * times + others[: size - times]
        rng.shuffle(items)
        text = "-".join(items)
        question = phrase(rng, _COUNT, letter=letter, text=text)
        both = traces(_marked(items, letter, 3), _marked(items, letter, 1))
        return Task(self.name, level, question, str(times), both, key=f"{letter} in {text}")

    def verify(self, task: Task, completion: Completion) -> bool:
        text = re.findall(r"(?:\w-)+\w", task.question)[-1]
        letter = re.findall(r" (\w)(?= )", task.question)[0]
        return same_text(completion, str(text.count(letter)))


def _marked(items: list[str], letter: str, stride: int) -> str:
    """The letters with the count so far after every `stride` of them: `b0a1n1a2`."""
    text, seen = "", 0
    for i in range(0, len(items), stride):
        group = items[i : i + stride]
        seen += group.count(letter)
        text += "-".join(group) + str(seen)
    return text
