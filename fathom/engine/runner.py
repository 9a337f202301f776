"""A plan's pieces through the model: ids in, logits out."""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.engine.cache import PagedCache
from fathom.engine.scheduler import Plan
from fathom.model.batch import Batch, Span
from fathom.model.transformer import Transformer


class Runner:
    """One model over one cache."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model.eval(), cache

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """Compute all pieces; float32 logits [S, V] on the CPU of the S that sample, in the plan's order."""
        ids = [i for p in plan.pieces for i in p.sequence.ids[p.start : p.end]]
        x_RnD = self.model(torch.tensor(ids, device=self.cache.device), self._batch(plan), self.cache)
        rows = [n for n, piece in enumerate(plan.pieces) if piece.samples]
        return self.model.logits(x_RnD[rows] if len(rows) < len(plan.pieces) else x_RnD).float().cpu()

    def _batch(self, plan: Plan) -> Batch:
        spans = []
        for piece in plan.pieces:
            slot = piece.sequence.slot
            assert slot is not None
            self.cache.bind(slot, piece.sequence.pages)
            spans.append(Span(piece.start, piece.count, slot))
        return Batch.step(spans, wanted="last", device=self.cache.device)
