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

    eos: int

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
        return Packed(self.batch.to(device), *(t.to(device, non_blocking=True) for t in moved))


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


Columns = tuple[list[int], list[np.ndarray]]
"""A packed batch on its way between processes: document lengths, then the columns of `Packed`."""


def lay(documents: Sequence[Document], multiple: int = 1) -> Columns:
    """Documents end to end, longest first; each is filled up to a multiple of so many tokens, which weigh nothing.

    Documents of equal length are neighbours and run as one, so a coarse `multiple` makes few and large pieces.
    """
    ordered = sorted(documents, key=lambda d: -len(d.tokens))
    rows = [_columns(d, -len(d.tokens) % multiple) for d in ordered]
    return [len(r[0]) for r in rows], [np.concatenate(column) for column in zip(*rows, strict=True)]


def _columns(d: Document, fill: int) -> list[np.ndarray]:
    tokens = np.array(d.tokens + d.tokens[-1:] * (fill + 2))
    weights = np.array(d.weights + [0.0] * (fill + 2), np.float32)
    n = len(d.tokens) + fill
    shifted = [column[i : i + n] for i in (0, 1, 2) for column in (tokens, weights)]
    return [shifted[0], *shifted[2:], np.full(n, EFFORTS.index(d.effort))]


def pack(columns: Columns) -> Packed:
    """The batch that `lay` wrote."""
    lengths, arrays = columns
    return Packed(Batch.packed(lengths), *(torch.from_numpy(a) for a in arrays))


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
    return lay(draw(number, config, renderer), config.length_multiple)


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
            documents = draw(self._number - 1, self._config, self._renderer)
            return pack(lay(documents, self._config.length_multiple))
        while len(self._ahead) < AHEAD * self._config.workers:
            self._ahead.append(self._pool.apply_async(_work, (self._number,)))
            self._number += 1
        return pack(self._ahead.popleft().get(timeout=600))

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
