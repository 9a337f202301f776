"""A plan's pieces through the model: ids in, logits out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fathom.engine.cache import PagedCache
from fathom.engine.device_cache import DeviceCache
from fathom.engine.graphs import MOST, Steps
from fathom.engine.request import PAGE, pages_for
from fathom.engine.scheduler import Piece, Plan
from fathom.errors import ConfigError
from fathom.model.batch import DECODE_TOKENS, Batch, Span
from fathom.model.transformer import Transformer


class Runner(Protocol):
    """One model over one cache."""

    def run(self, plan: Plan) -> Tensor:
        """Compute all pieces; float32 logits [S, V] of the S that sample, in the plan's order."""


class TileRunner:
    """Everything in one call of the model, by tiles, over rows that torch reads."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model.eval(), cache

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """See `Runner`."""
        ids = [i for piece in plan.pieces for i in piece.sequence.ids[piece.start : piece.end]]
        spans, rows = self._spans(plan)
        batch = Batch.step(spans, wanted="last", device=self.cache.device)
        x_RnD = self.model(torch.tensor(ids, device=self.cache.device), batch, self.cache)
        return self.model.logits(x_RnD if len(rows) == len(spans) else x_RnD[rows]).float()

    def _spans(self, plan: Plan) -> tuple[list[Span], list[int]]:
        """The spans of all pieces, and which of them end where a token is to be sampled."""
        spans: list[Span] = []
        rows = []
        for piece in plan.pieces:
            slot = _bound(piece, self.cache)
            spans += [Span(start, end - start, slot) for start, end in _cuts(piece)]
            if piece.samples:
                rows.append(len(spans) - 1)
        return spans, rows


class DeviceRunner:
    """By kernels over a cache of bytes: prompts in one call, answers a token of each in another, as a graph.

    What was sampled is always computed by the second, also when it is computed again, so that it has the same bits.
    """

    def __init__(self, model: Transformer, cache: DeviceCache, steps: Steps) -> None:
        self.model, self.cache, self.steps = model.eval(), cache, steps

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """See `Runner`."""
        for piece in plan.pieces:
            _bound(piece, self.cache)
        logits: dict[Piece, Tensor] = {}
        single = [piece for piece in plan.pieces if _is_token(piece)]
        logits |= zip(single, self._step(single) if single else (), strict=True)
        prompts = [piece for piece in plan.pieces if piece not in logits]
        logits |= self._prompts([piece for piece in prompts if piece.start < piece.sequence.prompt])
        for piece in prompts:
            logits |= self._again(piece)
        rows = [logits[piece] for piece in plan.pieces if piece.samples]
        return torch.stack(rows) if rows else torch.empty(0, self.model.config.vocab_size, device=self.cache.device)

    @torch.inference_mode()
    def warm_up(self, tokens: int) -> None:
        """Compile what prompts of a few tokens and of `tokens` need, which take other forms of some kernels.

        What it leaves in slot 0 and the first pages nobody reads. Raises ConfigError where so many do not fit.
        """
        try:
            for count in (2 * PAGE + 1, tokens):
                self._read_nothing(min(count, self.cache.max_context))
        except torch.OutOfMemoryError as error:
            text = f"a step of {tokens} prompt tokens does not fit beside weights and cache"
            raise ConfigError(f"{text}: lower --kv-gb or --max-seqs ({str(error).splitlines()[0]})") from error

    def _read_nothing(self, count: int) -> None:
        self.cache.bind(0, list(range(pages_for(count))))
        batch = Batch.pieces([Span(0, count, 0)], self.cache.device)
        ids = torch.zeros(len(batch.positions), dtype=torch.long, device=self.cache.device)
        self.model.logits(self.model(ids, batch, self.cache))

    def _step(self, pieces: list[Piece]) -> Tensor:
        """The next token of every sequence."""
        parts = [self._together(pieces[i : i + MOST]) for i in range(0, len(pieces), MOST)]
        return torch.cat(parts)

    def _together(self, pieces: list[Piece]) -> Tensor:
        starts = [piece.start for piece in pieces]
        return self.steps.run([p.sequence.ids[p.start] for p in pieces], starts, [_slot(p) for p in pieces]).clone()

    def _prompts(self, pieces: list[Piece]) -> dict[Piece, Tensor]:
        """The parts of pieces that belong to prompts, all at once; logits of those that end there and sample."""
        if not pieces:
            return {}
        ends = [min(piece.end, piece.sequence.prompt) for piece in pieces]
        spans = [Span(p.start, end - p.start, _slot(p)) for p, end in zip(pieces, ends, strict=True)]
        ids = [i for p, end in zip(pieces, ends, strict=True) for i in p.sequence.ids[p.start : end]]
        batch = Batch.pieces(spans, self.cache.device)
        ids += [0] * (len(batch.positions) - len(ids))
        x_RnD = self.model(torch.tensor(ids, device=self.cache.device), batch, self.cache)
        rows = [i for i, (p, end) in enumerate(zip(pieces, ends, strict=True)) if p.samples and p.end == end]
        # As few rows at a time as in a step: of more, the head's product belongs to another class.
        logits = [row for i in range(0, len(rows), MOST) for row in self.model.logits(x_RnD[rows[i : i + MOST]])]
        return dict(zip((pieces[i] for i in rows), logits, strict=True))

    def _again(self, piece: Piece) -> dict[Piece, Tensor]:
        """What a piece has of tokens that were sampled before."""
        last = None
        for start in range(max(piece.start, piece.sequence.prompt), piece.end, DECODE_TOKENS):
            at = range(start, min(start + DECODE_TOKENS, piece.end))
            last = self.steps.run([piece.sequence.ids[p] for p in at], at, [_slot(piece)] * len(at))[-1]
        return {piece: last.clone()} if last is not None else {}


def _slot(piece: Piece) -> int:
    assert piece.sequence.slot is not None
    return piece.sequence.slot


def _bound(piece: Piece, cache: PagedCache | DeviceCache) -> int:
    cache.bind(_slot(piece), piece.sequence.pages)
    return _slot(piece)


def _is_token(piece: Piece) -> bool:
    """Whether a piece is one sampled token."""
    return piece.samples and piece.end == piece.start + 1 and piece.start >= piece.sequence.prompt


def _cuts(piece: Piece) -> Iterator[tuple[int, int]]:
    """The prompt's part in one; what was sampled, if it is computed again, so that it is computed as it was at first.

    That is as decode, token by token: the model does so for spans of at most `DECODE_TOKENS`.
    """
    border = min(max(piece.start, piece.sequence.prompt), piece.end)
    if border > piece.start:
        yield piece.start, border
    for start in range(border, piece.end, DECODE_TOKENS):
        yield start, min(start + DECODE_TOKENS, piece.end)
