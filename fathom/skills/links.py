"""Following links: look a key up, then look up what was found, and so on."""

import itertools
import random
import re
import string

from fathom.skills.base import Completion, Task, phrase, same_text, traces

_ASK = (
    "{pairs}. Start at {first} and follow {hops} links. Where are you?",
    "Given {pairs}, where do {hops} links from {first} lead?",
    "The map is {pairs}. Go {hops} steps from {first}.",
    "Look it up {hops} times, beginning with {first}: {pairs}",
    "Links: {pairs}. Which one is {hops} steps after {first}?",
    "Begin at {first} and take {hops} steps: {pairs}",
)


class Links:
    """Level n: n + 1 links to follow among n + 4 pairs, in any order."""

    name = "links"

    def generate(self, rng: random.Random, level: int) -> Task:
        hops, size = level + 1, level + 4
        names = rng.sample(string.ascii_lowercase, size + 1)
        path = names[: hops + 1]
        table = dict(itertools.pairwise(path))
        # One name has no pair of its own. Were it always the end of the walk, it would be found without walking.
        table |= {source: rng.choice(names) for source in rng.sample(names[hops:], size - hops)}
        order = rng.sample(sorted(table), len(table))
        pairs = ",".join(f"{source}>{table[source]}" for source in order)
        question = phrase(rng, _ASK, pairs=pairs, first=path[0], hops=hops)
        return Task(
            self.name, level, question, path[-1], traces(_walk(path, 2), _walk(path, 1)), key=f"{path[0]}{hops} {pairs}"
        )

    def verify(self, task: Task, completion: Completion) -> bool:
        table = dict(re.findall(r"(\w)>(\w)", task.question))
        place = re.findall(r"(?:at|from|with|after) (\w)\b", task.question)[-1]
        for _ in range(int(re.findall(r"\d", task.question)[0])):
            place = table[place]
        return same_text(completion, place)


def _walk(path: list[str], stride: int) -> str:
    """Numbered links, every `stride` of them taken at once: `1a>d,2d>f`."""
    last = len(path) - 1
    stops = [*range(0, last, stride), last]
    return ",".join(f"{b}{path[a]}>{path[b]}" for a, b in itertools.pairwise(stops))
