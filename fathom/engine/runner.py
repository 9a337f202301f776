"""A plan's pieces through the model: ids in, logits out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fathom.engine.cache import PagedCache
from fathom.engine.graphs import Graphs
from fathom.engine.scheduler import Piece, Plan
from fathom.model.batch import DECODE_TOKENS, Batch, Span
from fathom.model.transformer import Transformer


class Runner:
    """One model over one cache."""

    def __init__(self, model: Transformer, cache: PagedCache, graphs: Graphs | None = None) -> None:
        self.model, self.cache, self.graphs = model.eval(), cache, graphs

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """Compute all pieces; float32 logits [S, V] on the CPU of the S that sample, in the plan's order."""
        if self.graphs and all(_is_token(piece) for piece in plan.pieces):
            return self._tokens(self.graphs, plan).cpu()
        ids = [i for piece in plan.pieces for i in piece.sequence.ids[piece.start : piece.end]]
        spans, rows = self._spans(plan)
        batch = Batch.step(spans, wanted="last", device=self.cache.device)
        x_RnD = self.model(torch.tensor(ids, device=self.cache.device), batch, self.cache)
        return self.model.logits(x_RnD if len(rows) == len(spans) else x_RnD[rows]).float().cpu()

    def _tokens(self, graphs: Graphs, plan: Plan) -> Tensor:
        """The next token of every sequence, as one graph."""
        slots = [self._bound(piece) for piece in plan.pieces]
        starts = [piece.start for piece in plan.pieces]
        return graphs.run([piece.sequence.ids[piece.start] for piece in plan.pieces], starts, slots)

    def _bound(self, piece: Piece) -> int:
        slot = piece.sequence.slot
        assert slot is not None
        self.cache.bind(slot, piece.sequence.pages)
        return slot

    def _spans(self, plan: Plan) -> tuple[list[Span], list[int]]:
        """The spans of all pieces, and which of them end where a token is to be sampled."""
        spans: list[Span] = []
        rows = []
        for piece in plan.pieces:
            slot = self._bound(piece)
            spans += [Span(start, end - start, slot) for start, end in _cuts(piece)]
            if piece.samples:
                rows.append(len(spans) - 1)
        return spans, rows


def _is_token(piece: Piece) -> bool:
    """Whether a piece is one sampled token, for which there is a graph."""
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
