"""Which skills there are, and streams of tasks that keep held-out problems out of training."""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping

from fathom.skills.arithmetic import Arithmetic
from fathom.skills.base import EFFORTS, LEVELS, Skill, Task
from fathom.skills.chain import Chain
from fathom.skills.cups import Cups
from fathom.skills.letters import Count, Reverse
from fathom.skills.links import Links
from fathom.skills.parity import Parity
from fathom.skills.smalltalk import Smalltalk
from fathom.skills.sort import Sort
from fathom.skills.tools import Tools

_MEASURED: tuple[Skill, ...] = (
    Arithmetic(),
    Chain(),
    Sort(),
    Reverse(),
    Count(),
    Parity(),
    Links(),
    Cups(),
    Tools(),
)
SKILLS: dict[str, Skill] = {skill.name: skill for skill in _MEASURED}
SOURCES: dict[str, Skill] = {**SKILLS, "smalltalk": Smalltalk()}
SHARES: dict[str, float] = {
    "arithmetic": 2.0,
    "chain": 1.0,
    "sort": 1.5,
    "reverse": 1.2,
    "count": 1.0,
    "parity": 0.8,
    "links": 1.0,
    "cups": 1.0,
    "tools": 0.8,
    "smalltalk": 0.4,
}
_HELD_OUT_ONE_IN = 20


def is_held_out(task: Task) -> bool:
    """Whether a task is kept for evaluation: decided by its content, in every phrasing. Small talk never is."""
    if task.skill not in SKILLS:
        return False
    normal = re.sub(r"\s+", " ", task.key).strip().lower()
    return int(hashlib.sha256(normal.encode()).hexdigest(), 16) % _HELD_OUT_ONE_IN == 0


def stream(
    seed: int,
    shares: Mapping[str, float] = SHARES,
    efforts: Mapping[str, float] | None = None,
    levels: tuple[int, ...] = LEVELS,
) -> Iterator[tuple[Task, str]]:
    """Endless training tasks with an effort each; held-out ones never appear.

    `shares` weighs the sources (names of `SOURCES`), `efforts` the efforts (equal if None); both need not sum to 1.
    The same arguments give the same stream.
    """
    rng = random.Random(seed)
    names, weights = list(shares), list(shares.values())
    modes = dict.fromkeys(EFFORTS, 1.0) if efforts is None else efforts
    while True:
        source = SOURCES[rng.choices(names, weights)[0]]
        task = source.generate(rng, rng.choice(levels))
        if not is_held_out(task):
            yield task, rng.choices(list(modes), list(modes.values()))[0]


def held_out(skill: str, level: int, n: int, seed: int) -> list[Task]:
    """`n` different held-out tasks of a skill (fewer when it has no more), the same for the same seed."""
    rng = random.Random(f"{seed} {skill} {level}")
    found: dict[str, Task] = {}
    for _ in range(n * _HELD_OUT_ONE_IN * 20):
        if len(found) == n:
            break
        task = SKILLS[skill].generate(rng, level)
        if is_held_out(task):
            found.setdefault(task.question + repr(task.tools), task)
    return list(found.values())
