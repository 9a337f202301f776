"""What the layers of one model call share: the batch, its token ids, and rotations computed once."""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fathom.config import ModelConfig, RopeScaling
from fathom.kernels.decode import Tokens
from fathom.model.batch import Batch
from fathom.model.rope import frequencies, turns


class Step:
    """One call: tokens [T], batch, compute dtype, and the rotations of the two kinds of layers (plain, compressed)."""

    def __init__(self, config: ModelConfig, tokens: Tensor, batch: Batch, dtype: torch.dtype) -> None:
        self.tokens, self.batch, self.dtype = tokens, batch, dtype
        self._config = config
        self._freqs: dict[bool, Tensor] = {}
        self._turns: dict[bool, tuple[Tensor, Tensor]] = {}
        self._blocks: dict[tuple[int, int, int], Tensor] = {}

    def turns(self, ratio: int) -> tuple[Tensor, Tensor]:
        """Rotations [T, P] of the batch's tokens in a layer of this ratio, forth and back."""
        kind = ratio > 0
        if kind not in self._turns:
            turn = turns(self.batch.positions, self._frequencies(ratio))
            self._turns[kind] = (turn, turn.conj().resolve_conj())
        return self._turns[kind]

    @cached_property
    def where(self) -> Tokens:
        """Slots, positions and all rotations of the batch's tokens, for kernels."""
        plain, compressed = (self._frequencies(ratio) for ratio in (0, 4))
        return Tokens.at(self.batch.slots, self.batch.positions, plain, compressed)

    def begin(self) -> None:
        """Launch what kernels read as soon as they begin: a launch of torch's that follows begins when it has ended,
        and is followed by theirs."""
        _ = self.where

    def block_turns(self, ratio: int, begin: int, end: int) -> Tensor:
        """Rotations of the entries begin .. end - 1: a block stands at its first token's position."""
        key = (ratio, begin, end)
        if key not in self._blocks:
            positions = torch.arange(begin, end, device=self.tokens.device) * ratio
            self._blocks[key] = turns(positions, self._frequencies(ratio))
        return self._blocks[key]

    def _frequencies(self, ratio: int) -> Tensor:
        c, kind = self._config, ratio > 0
        if kind not in self._freqs:
            scaling = c.rope_scaling if kind else None
            theta = c.compress_rope_theta if kind else c.rope_theta
            self._freqs[kind] = _on_device(c.qk_rope_head_dim, theta, scaling, self.tokens.device)
        return self._freqs[kind]


@lru_cache(maxsize=16)
def _on_device(dims: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Frequencies, moved once: nothing is copied from the host while a step is captured."""
    with torch.inference_mode(False):  # kept for later calls, which may be training
        return frequencies(dims, theta, scaling).to(device)
