"""Compressors: every `ratio` tokens become one entry by gated pooling. Reference 2.7.

Ratio 4 (CSA) pools overlapping windows of 8 tokens, ratio 128 (HCA) disjoint ones. The pooling is a function
(`kernels.pool`); what waits for its block to close is the state's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels.linear import Part
from fathom.kernels.pool import overlap, pool
from fathom.kernels.store import Pooling
from fathom.model.batch import Tile
from fathom.model.cache import LayerState
from fathom.model.layers import Linear, RMSNorm, both, joined
from fathom.model.rope import rotate
from fathom.model.step import Step


class Compressor(nn.Module):
    """Makes entries of `dim` channels from the layer's input. `name` is where the state keeps them."""

    def __init__(self, config: ModelConfig, ratio: int, dim: int, name: str) -> None:
        super().__init__()
        self.ratio, self.dim, self.name = ratio, dim, name
        width = dim * (2 if ratio == 4 else 1)
        self.wkv = Linear(config.hidden_size, width)
        self.wgate = Linear(config.hidden_size, width)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.norm = RMSNorm(dim, config.rms_norm_eps)

    def part(self) -> Part:
        """The projections to values and gates without the slots' bias, in float32."""
        part = joined(self.wkv, self.wgate) or Part(torch.cat((self.wkv.weight, self.wgate.weight)))
        return replace(part, dtype=torch.float32)

    @property
    def pooling(self) -> Pooling:
        """The weights behind the projections."""
        return Pooling(self.ape, self.norm.weight)

    def projections(self, x: Tensor, positions: Tensor) -> Tensor:
        """Values and gate logits of each token, float32 [T, 2 * width]; the slot's bias goes on the gates only."""
        projected = both(x, self.wkv, self.wgate, torch.float32)
        projected[:, self.ape.shape[1] :] += self.ape[positions % self.ratio]
        return projected

    def forward(
        self, tile: Tile, projected: Tensor, step: Step, state: LayerState, stored: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """All entries [(docs,) n, dim] of the tile's sequence, up to and including the blocks that the tile closes.

        projected: the tile's rows of `projections`. A new entry is normalised, rotated as a token at its block's first
        position, and brought by `stored` to the form in which it is kept.
        """
        begin, end = tile.start // self.ratio, tile.end // self.ratio
        first = max(begin - (self.ratio == 4), 0) * self.ratio
        rows = state.recent(self.name, tile, projected, first)
        if begin == end:
            return state.entries(self.name, tile, begin, rows[..., :0, : self.dim].to(step.dtype))
        values, gates = rows[..., : end * self.ratio - first, :].chunk(2, -1)
        pooled = pool(self._windows(values, begin, 0.0), self._windows(gates, begin, float("-inf")))
        entry = rotate(self.norm(pooled.to(step.dtype)), step.block_turns(self.ratio, begin, end))
        return state.entries(self.name, tile, begin, stored(entry))

    def _windows(self, rows: Tensor, begin: int, absent: float) -> Tensor:
        if self.ratio == 4:
            return overlap(rows, begin == 0, absent)
        return rows.unflatten(-2, (-1, self.ratio))
