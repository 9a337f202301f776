"""Documents for training: tasks rendered exactly as inference renders them, packed end to end.

A batch is a function of (seed, number) alone: a run that resumes at step n draws batch n, and worker processes can
prepare batches ahead in any order. Shapes: T tokens of a batch.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult, Pool
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fathom.model.batch import Batch
from fathom.skills.base import EFFORTS, Task
from fathom.skills.mix import SHARES, stream
from fathom.train.config import DataConfig

MOST_TURNS = 3
"""Questions before the last one of a document, at most."""

AHEAD = 4
"""Batches that each worker prepares in advance."""

Message = dict[str, Any]


class Renderer(Protocol):
    """The prompt format of a checkpoint, as the encoding room speaks it."""

    def prompt(self, messages: Sequence[Message], effort: str, tools: Sequence[Any]) -> list[int]:
        """Token ids of a prompt that ends where the model goes on."""
        ...

    def completion(self, task: Task, effort: str) -> list[int]:
        """Token ids that the model should go on with, through the end of the turn."""
        ...


Tasks = Iterator[tuple[Task, str]]


@dataclass(frozen=True)
class Document:
    """tokens, and for each the loss weight of predicting it; the first is never predicted."""

    tokens: list[int]
    weights: list[float]
    effort: str


@dataclass(frozen=True)
class Packed:
    """Documents end to end. Row t holds a token, its target (the next one) and the target's weight.

    targets_after and weights_after are those of the token after the next one (for the prediction block). Rows whose
    target would lie in another document weigh 0. efforts [T] indexes `EFFORTS`.
    """

    batch: Batch
    tokens: Tensor
    targets: Tensor
    weights: Tensor
    targets_after: Tensor
    weights_after: Tensor
    efforts: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        moved = (self.tokens, self.targets, self.weights, self.targets_after, self.weights_after, self.efforts)
        return Packed(self.batch.to(device), *(t.to(device) for t in moved))


def write(task: Task, effort: str, earlier: Sequence[Task], renderer: Renderer, prompt_weight: float) -> Document:
    """A conversation that ends in `task`, thought about at `effort`.

    Turns before the last one are answers alone: the prompt format drops their reasoning, so that is what the model will
    see. Their answers are trained on like completions without thinking.
    """
    messages: list[Message] = []
    for turn in earlier:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    prompt = renderer.prompt([*messages, {"role": "user", "content": task.question}], effort, task.tools)
    completion = renderer.completion(task, effort)
    weights = [prompt_weight] * len(prompt) + [1.0] * len(completion)
    return Document(prompt + completion, weights, effort)


Columns = tuple[list[int], list[npt.NDArray[Any]]]
"""A packed batch on its way between processes: document lengths, then the columns of `Packed`."""


def lay(documents: Sequence[Document], waste: float = 0.0) -> Columns:
    """Documents end to end, longest first; documents of equal length are neighbours and run as one.

    A document is filled up to the length of a longer one before it when that adds at most the share `waste`. What
    follows a document's end cannot change it, and weighs nothing.
    """
    ordered = sorted(documents, key=lambda d: -len(d.tokens))
    lengths: list[int] = []
    for own in (len(d.tokens) for d in ordered):
        lengths.append(lengths[-1] if lengths and lengths[-1] <= own * (1 + waste) else own)
    rows = [_columns(d, n) for d, n in zip(ordered, lengths, strict=True)]
    return lengths, [np.concatenate(column) for column in zip(*rows, strict=True)]


def _columns(d: Document, length: int) -> list[npt.NDArray[Any]]:
    room = length + 2 - len(d.tokens)
    tokens = np.array(d.tokens + d.tokens[-1:] * room)
    weights = np.array(d.weights + [0.0] * room, np.float32)
    shifted = [column[i : i + length] for i in (0, 1, 2) for column in (tokens, weights)]
    return [shifted[0], *shifted[2:], np.full(length, EFFORTS.index(d.effort))]


def pack(laid: Columns) -> Packed:
    """A batch of tensors from laid documents."""
    lengths, columns = laid
    return Packed(Batch.packed(lengths), *(torch.from_numpy(column) for column in columns))


def draw(number: int, config: DataConfig, renderer: Renderer) -> list[Document]:
    """Batch `number` of a run: documents until `tokens_per_batch` is reached, so that no length is favoured."""
    rng = random.Random(f"{config.seed}/{number}")
    tasks = stream(rng.getrandbits(48), config.shares or SHARES, config.efforts)
    documents, total = [], 0
    while total < config.tokens_per_batch:
        document = _next(tasks, rng, config, renderer)
        if len(document.tokens) <= config.max_document:
            documents.append(document)
            total += len(document.tokens)
    return documents


def _next(tasks: Tasks, rng: random.Random, config: DataConfig, renderer: Renderer) -> Document:
    task, effort = next(tasks)
    earlier: list[Task] = []
    while not task.tools and len(earlier) < MOST_TURNS and rng.random() < config.extra_turns:
        other, _ = next(tasks)
        if not other.tools:
            earlier.append(other)
    return write(task, effort, earlier, renderer, config.prompt_weight)


_drawing: tuple[DataConfig, Renderer]


def _begin(config: DataConfig, open_renderer: Callable[[], Renderer]) -> None:
    global _drawing
    torch.set_num_threads(1)
    _drawing = (config, open_renderer())


def _work(number: int) -> Columns:
    config, renderer = _drawing
    return lay(draw(number, config, renderer), config.waste)


class Feed:
    """Batches `first`, `first + 1`, ... prepared ahead by worker processes, or drawn on demand without workers.

    `open_renderer` makes a renderer; with workers it must be picklable, because each of them makes its own.
    """

    def __init__(self, config: DataConfig, open_renderer: Callable[[], Renderer], first: int = 0) -> None:
        self._config, self._number = config, first
        self._renderer = None if config.workers else open_renderer()
        self._pool: Pool | None = None
        if config.workers:
            self._pool = get_context("spawn").Pool(config.workers, _begin, (config, open_renderer))
        self._ahead: deque[AsyncResult[Columns]] = deque()

    def __next__(self) -> Packed:
        """The next batch, on the CPU."""
        if self._pool is None:
            assert self._renderer is not None
            self._number += 1
            return pack(lay(draw(self._number - 1, self._config, self._renderer), self._config.waste))
        while len(self._ahead) < AHEAD * self._config.workers:
            self._ahead.append(self._pool.apply_async(_work, (self._number,)))
            self._number += 1
        return pack(self._ahead.popleft().get(timeout=600))

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
