"""The lightning indexer: which compressed entries a query of a CSA layer attends to. Reference 2.8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels import prefill
from fathom.kernels.indexer import index_scores, select_topk
from fathom.model.batch import Tile
from fathom.model.compressor import Compressor
from fathom.model.layers import Linear, Numerics
from fathom.model.rope import rotate
from fathom.model.step import Step

Share = tuple[int, int, Callable[[Tensor], Tensor] | None]
"""Which rank of how many, and what makes [t, k] of all ranks' parts [t / ranks, k], in their order."""


class Indexer(nn.Module):
    """Scores all visible entries with small heads of its own and keeps the `index_topk` best."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        self.heads, self.dim, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.numerics = numerics
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, 4, self.dim, "indexer")
        self.share: Share | None = None

    def queries(self, x: Tensor, latent: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Index queries [T, h, d] from the query latent, and the weight [T, h] of each head, which may be negative."""
        q = rotate(self.wq_b(latent).unflatten(-1, (self.heads, self.dim)), step.turns(4)[0].unsqueeze(1))
        return self.numerics.index(q), self._weights(x)

    def chosen(self, tile: Tile, q: Tensor, weights: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        """By kernels: the entries that each query of a piece of a prompt keeps, int32 [t, topk] in order, -1 behind.

        q [T, h, d] and weights [T, h] of the whole batch; keys as `prefill.keys` gives them.
        """
        rank, ranks, gather = self.share or (0, 1, None)
        part = -(-tile.count // ranks)
        first = min(rank * part, tile.count - 1)
        rows = slice(tile.row + first, tile.row + min(first + part, tile.count))
        own = prefill.select(q[rows], self.scaled(weights[rows]).float(), *keys, tile.start + first, self.topk)
        if ranks == 1:
            return own
        whole = torch.nn.functional.pad(own, (0, 0, 0, part - len(own)), value=-1)
        return (gather(whole) if gather else whole.repeat(ranks, 1))[: tile.count]

    def _weights(self, x: Tensor) -> Tensor:
        return self.scaled(self.weights_proj(x))

    def scaled(self, weights: Tensor) -> Tensor:
        """What the products of `weights_proj` weigh in the scores."""
        return weights * (self.dim**-0.5 * self.heads**-0.5)

    def forward(self, tile: Tile, keys: Tensor, q: Tensor, weights: Tensor, visible: Tensor | None) -> Tensor | None:
        """The entries that each query keeps: keys [N, d], q [t, h, d], weights [t, h], visible [t, N] -> bool [t, N].
        All but `visible` may have a leading axis of documents; None: all are visible.

        While no query sees more than `index_topk` entries every visible one is kept and nothing is scored.
        """
        if tile.end // 4 <= self.topk:
            return visible
        scores = index_scores(q, weights, keys)
        return select_topk(scores if visible is None else scores.masked_fill(~visible, float("-inf")), self.topk)


def visible_entries(tile: Tile, ratio: int, device: torch.device) -> Tensor:
    """bool [t, n]: entry b is visible to the query at t iff its last token is at or before t: b < (t + 1) // ratio."""
    closed = torch.arange(tile.start + 1, tile.end + 1, device=device) // ratio
    return torch.arange(tile.end // ratio, device=device) < closed.unsqueeze(1)
