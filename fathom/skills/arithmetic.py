"""Adding and subtracting numbers of two to four digits, column by column."""

import random
import re

from fathom.skills.base import Completion, Task, phrase, same_text, traces

_ADD = (
    "What is {a} + {b}?",
    "Compute {a} + {b}.",
    "Add {a} and {b}.",
    "{a} + {b} = ?",
    "Please calculate {a} + {b}.",
    "What is the sum of {a} and {b}?",
    "How much is {a} plus {b}?",
)
_SUBTRACT = (
    "What is {a} - {b}?",
    "Compute {a} - {b}.",
    "{a} - {b} = ?",
    "Please calculate {a} - {b}.",
    "How much is {a} minus {b}?",
    "What is {a} minus {b}?",
    "What is {a} take away {b}?",
)


class Arithmetic:
    """Level n: two numbers of n + 1 digits; differences keep that width."""

    name = "arithmetic"

    def generate(self, rng: random.Random, level: int) -> Task:
        plus = rng.random() < 0.5
        a, b = _operands(rng, level + 1, plus)
        question = phrase(rng, _ADD if plus else _SUBTRACT, a=a, b=b)
        answer = str(a + b if plus else a - b)
        sign = "+" if plus else "-"
        both = traces(_columns(a, b, sign), _long(a, b, sign))
        return Task(self.name, level, question, answer, both, key=f"{a}{sign}{b}")

    def verify(self, task: Task, completion: Completion) -> bool:
        a, b = map(int, re.findall(r"\d+", task.question))
        minus = re.search(r" - |minus|take away", task.question)
        return same_text(completion, str(a - b if minus else a + b))


def _operands(rng: random.Random, width: int, plus: bool) -> tuple[int, int]:
    low = 10 ** (width - 1)
    while True:
        a, b = rng.randrange(low, 10 * low), rng.randrange(low, 10 * low)
        if plus or a - b >= low:
            return a, b


def _columns(a: int, b: int, sign: str) -> str:
    """The sums of the columns from the left, carries still to be made."""
    pairs = zip(str(a), str(b), strict=True)
    return " ".join(str(int(x) + int(y) if sign == "+" else int(x) - int(y)) for x, y in pairs)


def _long(a: int, b: int, sign: str) -> str:
    """State and operation in turn: what is left of both numbers, the carry, the result so far."""
    left, right, carry, result = str(a), str(b), 0, ""
    mark = "c" if sign == "+" else "b"
    lines = []
    while left:
        x, y = int(left[-1]), int(right[-1])
        lines.append(f"{left} {right} {mark}{carry}" + (f" r{result}" if result else ""))
        value = x + y + carry if sign == "+" else (x - y - carry) % 10
        lines.append(f"{x}{sign}{y}{sign}{carry}={value}")
        carry = value // 10 if sign == "+" else int(x - y - carry < 0)
        left, right, result = left[:-1], right[:-1], f"{value % 10}{result}"
    lines.append("r" + (str(carry) if carry else "") + result)
    return "\n".join(lines)
