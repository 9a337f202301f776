"""A step's work through the model: ids in, logits out. It knows of no request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fathom.engine.cache import PagedCache
from fathom.engine.device_cache import DeviceCache
from fathom.engine.graphs import MOST, Steps
from fathom.engine.request import PAGE, pages_for
from fathom.engine.scheduler import Piece
from fathom.errors import ConfigError
from fathom.model.batch import DECODE_TOKENS, Batch, Span
from fathom.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of a sequence from position `start` on, that has `pages` and of whose ids the first `prompt` were given.

    samples: its last row gives a new token.
    """

    slot: int
    pages: Sequence[int]
    prompt: int
    start: int
    tokens: Sequence[int]
    samples: bool

    @staticmethod
    def of(piece: Piece) -> Work:
        """A piece of a plan."""
        sequence, ids = piece.sequence, piece.sequence.ids[piece.start : piece.end]
        assert sequence.slot is not None
        return Work(sequence.slot, sequence.pages, sequence.prompt, piece.start, ids, piece.samples)

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.tokens)

    @property
    def border(self) -> int:
        """Where in it the prompt ends and what was sampled begins."""
        return min(max(self.start, self.prompt), self.end)

    @property
    def is_token(self) -> bool:
        """Whether it is one sampled token."""
        return self.samples and len(self.tokens) == 1 and self.start >= self.prompt


class Runner(Protocol):
    """One model over one cache."""

    def run(self, works: Sequence[Work]) -> Tensor:
        """Compute all of a step, one work a sequence; float32 logits [S, V] of the S that sample, in their order.

        The next run may overwrite them.
        """


class TileRunner:
    """Everything in one call of the model, by tiles, over rows that torch reads."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model.eval(), cache

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> Tensor:
        """See `Runner`."""
        ids = [i for work in works for i in work.tokens]
        spans, rows = self._spans(works)
        batch = Batch.step(spans, wanted="last", device=self.cache.device)
        x_RnD = self.model(torch.tensor(ids, device=self.cache.device), batch, self.cache)
        return self.model.logits(x_RnD if len(rows) == len(spans) else x_RnD[rows]).float()

    def _spans(self, works: Sequence[Work]) -> tuple[list[Span], list[int]]:
        """The spans of all works, and which of them end where a token is to be sampled."""
        spans: list[Span] = []
        rows = []
        for work in works:
            self.cache.bind(work.slot, work.pages)
            spans += [Span(start, end - start, work.slot) for start, end in _cuts(work)]
            if work.samples:
                rows.append(len(spans) - 1)
        return spans, rows


_FORMS = PAGE, 2 * PAGE + 1, 5 * PAGE, 10 * PAGE
"""Prompt tokens for which experts' and linears' kernels take different tiles."""


class DeviceRunner:
    """By kernels over a cache of bytes: prompts in one call, answers a token of each in another, as a graph.

    What was sampled is always computed by the second, also when it is computed again, so that it has the same bits.
    """

    def __init__(self, model: Transformer, cache: DeviceCache, steps: Steps) -> None:
        self.model, self.cache, self.steps = model.eval(), cache, steps

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> Tensor:
        """See `Runner`."""
        for work in works:
            self.cache.bind(work.slot, work.pages)
        single = [work for work in works if work.is_token]
        if len(single) == len(works) <= MOST and works:
            return self._together(single)  # most steps: nothing is copied
        logits = dict(zip((w.slot for w in single), self._step(single) if single else (), strict=True))
        others = [work for work in works if not work.is_token]
        logits |= self._prompts([work for work in others if work.start < work.prompt])
        for work in others:
            logits |= self._again(work)
        rows = [logits[work.slot] for work in works if work.samples]
        return torch.stack(rows) if rows else torch.empty(0, self.model.config.vocab_size, device=self.cache.device)

    @torch.inference_mode()
    def warm_up(self, tokens: int) -> None:
        """Compile what prompts of a few tokens to `tokens` need, which take other forms of some kernels.

        What it leaves in slot 0 and the first pages nobody reads. Raises ConfigError where so many do not fit.
        """
        try:
            for count in (*_FORMS, tokens):
                self._read_nothing(min(count, self.cache.max_context))
        except torch.OutOfMemoryError as error:
            text = f"a step of {tokens} prompt tokens does not fit beside weights and cache"
            raise ConfigError(f"{text}: lower --kv-gb or --max-seqs ({str(error).splitlines()[0]})") from error

    def _read_nothing(self, count: int) -> None:
        self.cache.bind(0, list(range(pages_for(count))))
        batch = Batch.pieces([Span(0, count, 0)], self.cache.device)
        ids = torch.zeros(len(batch.positions), dtype=torch.long, device=self.cache.device)
        self.model.logits(self.model(ids, batch, self.cache))

    def _step(self, works: list[Work]) -> Tensor:
        """The next token of every sequence."""
        return torch.cat([self._together(works[i : i + MOST]).clone() for i in range(0, len(works), MOST)])

    def _together(self, works: list[Work]) -> Tensor:
        tokens, starts = [work.tokens[0] for work in works], [work.start for work in works]
        return self.steps.run(tokens, starts, [work.slot for work in works])

    def _prompts(self, works: list[Work]) -> dict[int, Tensor]:
        """The parts that belong to prompts, all at once; by slot, logits of those that end there and sample."""
        if not works:
            return {}
        spans = [Span(w.start, w.border - w.start, w.slot) for w in works]
        ids = [i for w in works for i in w.tokens[: w.border - w.start]]
        batch = Batch.pieces(spans, self.cache.device)
        ids += [0] * (len(batch.positions) - len(ids))
        x_RnD = self.model(torch.tensor(ids, device=self.cache.device), batch, self.cache)
        rows = [i for i, w in enumerate(works) if w.samples and w.end == w.border]
        # As few rows at a time as in a step: of more, the head's product belongs to another class.
        logits = [row for i in range(0, len(rows), MOST) for row in self.model.logits(x_RnD[rows[i : i + MOST]])]
        return dict(zip((works[i].slot for i in rows), logits, strict=True))

    def _again(self, work: Work) -> dict[int, Tensor]:
        """What a work has of tokens that were sampled before."""
        last = None
        for start in range(work.border, work.end, DECODE_TOKENS):
            at = range(start, min(start + DECODE_TOKENS, work.end))
            tokens = work.tokens[at.start - work.start : at.stop - work.start]
            last = self.steps.run(tokens, at, [work.slot] * len(at))[-1]
        return {work.slot: last.clone()} if last is not None else {}


def _cuts(work: Work) -> Iterator[tuple[int, int]]:
    """The prompt's part in one; what was sampled, if it is computed again, so that it is computed as it was at first.

    That is as decode, token by token: the model does so for spans of at most `DECODE_TOKENS`.
    """
    if work.border > work.start:
        yield work.start, work.border
    for start in range(work.border, work.end, DECODE_TOKENS):
        yield start, min(start + DECODE_TOKENS, work.end)
