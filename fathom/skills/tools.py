"""Tool calls: pick one of one to three functions and copy its arguments from the request."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fathom.skills.base import Completion, Task, ToolCall, traces

_CITY = ("Paris", "Berlin", "Tokyo", "Cairo", "Lima", "Oslo", "Rome", "Madrid", "Delhi", "Seoul", "Dublin", "Athens")
_NAME = ("Ann", "Bob", "Carla", "Dan", "Eva", "Finn", "Grace", "Hugo", "Ida", "Jack", "Kim", "Leo")
_TEXT = ("I am late", "call me", "good morning", "see you soon", "the train is here", "dinner is ready", "thank you")
_TOPIC = ("red pandas", "old maps", "green tea", "steam engines", "paper boats", "night trains", "wild horses")
_SONG = ("Blue Moon", "Yesterday", "Summertime", "Hallelujah", "Imagine", "Moon River", "Dancing Queen")
_UNIT = ("euros", "dollars", "pounds", "yen")


@dataclass(frozen=True)
class _Function:
    """A function that requests can call for: its schema, its phrasings, and what its arguments are drawn from."""

    name: str
    about: str
    arguments: Mapping[str, tuple[str, ...] | range]
    requests: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        kinds = {key: "integer" if isinstance(pool, range) else "string" for key, pool in self.arguments.items()}
        parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in kinds.items()}}
        function = {"name": self.name, "description": self.about, "parameters": parameters}
        return {"type": "function", "function": function}


_FUNCTIONS = (
    _Function(
        "get_weather",
        "Weather in a city",
        {"city": _CITY},
        (
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "Is it raining in {city}?",
            "Weather for {city}, please.",
            "Do I need a coat in {city}?",
        ),
    ),
    _Function(
        "get_time",
        "Local time in a city",
        {"city": _CITY},
        (
            "What time is it in {city}?",
            "Tell me the time in {city}.",
            "How late is it in {city}?",
            "Current time in {city}, please.",
            "What does the clock say in {city}?",
        ),
    ),
    _Function(
        "send_message",
        "Send a text to a person",
        {"to": _NAME, "text": _TEXT},
        (
            "Send {to} a message: {text}",
            "Tell {to}: {text}",
            "Write to {to} that {text}",
            "Message {to} saying {text}",
            "Text {to} the words {text}",
        ),
    ),
    _Function(
        "search",
        "Search the web",
        {"query": _TOPIC},
        (
            "Search for {query}.",
            "Find pages about {query}.",
            "Look up {query} on the web.",
            "What can you find on {query}?",
            "I want to read about {query}.",
        ),
    ),
    _Function(
        "set_timer",
        "Set a timer",
        {"minutes": range(2, 100)},
        (
            "Set a timer for {minutes} minutes.",
            "Wake me in {minutes} minutes.",
            "Start a {minutes} minute timer.",
            "Timer: {minutes} minutes, please.",
            "Remind me in {minutes} minutes.",
        ),
    ),
    _Function(
        "play_song",
        "Play a song",
        {"title": _SONG},
        (
            "Play {title}.",
            "I want to hear {title}.",
            "Put on {title}, please.",
            "Can you play the song {title}?",
            "Start the song {title}.",
        ),
    ),
    _Function(
        "convert",
        "Convert money",
        {"amount": range(2, 100), "to": _UNIT},
        (
            "Convert {amount} to {to}.",
            "How much is {amount} in {to}?",
            "Change {amount} into {to}, please.",
            "Turn {amount} into {to}.",
            "What are {amount} worth in {to}?",
        ),
    ),
)


class Tools:
    """Level n: n functions to choose from. Right means the one function with exactly its arguments."""

    name = "tools"

    def generate(self, rng: random.Random, level: int) -> Task:
        offered = rng.sample(_FUNCTIONS, level)
        chosen = rng.choice(offered)
        arguments = {key: rng.choice(pool) for key, pool in chosen.arguments.items()}
        question = rng.choice(chosen.requests).format(**arguments)
        listed = ", ".join(f"{key}: {value}" for key, value in arguments.items())
        both = traces(f"{chosen.name}", f"{chosen.name}, {listed}")
        schemas = tuple(function.schema() for function in offered)
        # The pools are too small to keep contents for evaluation: the wording is the key.
        return Task(self.name, level, question, "", both, question, schemas, (chosen.name, arguments))

    def verify(self, task: Task, completion: Completion) -> bool:
        if not isinstance(completion, tuple):
            return False
        return completion[0] in _names(task) and (completion[0], dict(completion[1])) == _understand(task.question)


def _names(task: Task) -> set[str]:
    return {tool["function"]["name"] for tool in task.tools}


def _understand(question: str) -> ToolCall | None:
    """Read a request back: the function and arguments whose phrasing gives exactly these words."""
    for function in _FUNCTIONS:
        for request in function.requests:
            arguments = _read(question, request, function.arguments)
            if arguments is not None:
                return function.name, arguments
    return None


def _read(question: str, request: str, pools: Mapping[str, tuple[str, ...] | range]) -> dict[str, Any] | None:
    keys = sorted(pools, key=lambda key: request.index("{" + key + "}"))
    arguments: dict[str, Any] = {}
    for key in keys:
        found = [value for value in pools[key] if str(value) in question]
        if not found:
            return None
        arguments[key] = max(found, key=lambda value: len(str(value)))
    ordered = {key: arguments[key] for key in pools}
    return ordered if request.format(**ordered) == question else None
