"""DeepSeek-V4, the table of contents: embed, widen to n streams, blocks, fold, head. Reference 2.

Shapes: T tokens of a ragged batch, R wanted rows, n residual streams, D hidden size, V vocabulary.
Parameter names are those of the published checkpoints, except that the routed experts of a layer are stacked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels.linear import linear
from fathom.kernels.packed import PackedSum
from fathom.model.attention import Attention
from fathom.model.batch import Batch
from fathom.model.cache import Cache, LayerState, NoState
from fathom.model.hyper import HyperParameters, hc_head, hc_post, hc_pre
from fathom.model.indexer import Indexer
from fathom.model.layers import Linear, Numerics, RMSNorm
from fathom.model.moe import Experts, Gate, MoE
from fathom.model.step import Step


class Block(HyperParameters):
    """Attention and experts, each wrapped by its own hyper-connection; there is no other residual path."""

    def __init__(self, config: ModelConfig, index: int, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.index = config, index
        n = config.hc_mult
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, config.ratio(index), numerics)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, config.is_hash(index), numerics)
        self.declare("hc_attn", config, (2 + n) * n, 3)
        self.declare("hc_ffn", config, (2 + n) * n, 3)

    def forward(
        self, x_TnD: Tensor, step: Step, state: LayerState, following: Tensor | PackedSum | None = None
    ) -> Tensor:
        """[T, n, D] -> [T, n, D]; following: fn of the hyper-connection that comes next, if that is known."""
        x, post, comb = hc_pre(x_TnD, *self.mixing("hc_attn"), self.attn_norm, self.config)
        y = self.attn(x, step, state)
        x_TnD = hc_post(y, x_TnD, post, comb, self.mixing("hc_ffn")[0])
        x, post, comb = hc_pre(x_TnD, *self.mixing("hc_ffn"), self.ffn_norm, self.config)
        y = self.ffn(x, step.tokens)
        return hc_post(y, x_TnD, post, comb, following)


class MTPBlock(Block):
    """The extra prediction block: from the streams at t and the token at t + 1 it predicts t + 2. Reference 2.12."""

    def __init__(self, config: ModelConfig, index: int, numerics: Numerics) -> None:
        super().__init__(config, index, numerics)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.numerics = numerics
        self.e_proj, self.h_proj = Linear(hidden, hidden), Linear(hidden, hidden)
        self.enorm, self.hnorm, self.norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.declare("hc_head", config, config.hc_mult, 1)

    def merge(self, x_RnD: Tensor, embedded_RD: Tensor) -> Tensor:
        """The block's input streams: the model's own, each projected, plus the next token's embedding."""
        h = self.h_proj(self.numerics.operand(self.hnorm(x_RnD)).flatten(0, 1)).unflatten(0, x_RnD.shape[:2])
        e = self.e_proj(self.numerics.operand(self.enorm(embedded_RD)))
        return h + e.unsqueeze(1)


class Transformer(HyperParameters):
    """The whole model. `numerics` chooses the compute dtype and whether activations are quantised."""

    def __init__(self, config: ModelConfig, numerics: Numerics | None = None) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics or Numerics()
        depth = config.num_hidden_layers
        # Given its weight, Embedding does not import torch's compiler to fill it: 2.5 s of a command's start.
        self.embed = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(Block(config, i, self.numerics) for i in range(depth))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.declare("hc_head", config, config.hc_mult, 1)
        extra = range(depth, depth + config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(MTPBlock(config, i, self.numerics) for i in extra)

    def forward(self, tokens: Tensor, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Token ids [T] -> the streams [R, n, D] at the batch's wanted rows, before folding and the final norm.

        With a cache, the call goes on where the sequences' slots stand; without, every sequence begins and ends here
        and the result is differentiable.
        """
        if cache:
            cache.admit(batch.tiles)
        step = Step(self.config, tokens, batch, self.numerics.dtype)
        if cache and cache.layer(0).memory is not None:
            step.begin()
        x_TnD = self._embedded(tokens).unsqueeze(1).expand(-1, self.config.hc_mult, -1)
        for i, (block, following) in enumerate(zip(self.layers, self._following(), strict=True)):
            x_TnD = block(x_TnD, step, cache.layer(i) if cache else NoState(), following)
        return x_TnD if batch.wanted is None else x_TnD[batch.wanted]

    def logits(self, x_RnD: Tensor) -> Tensor:
        """Streams [R, n, D] -> float32 logits [R, V]."""
        return self._scores(hc_head(x_RnD, *self.mixing("hc_head"), self.norm, self.config))

    def draft(self, x_TnD: Tensor, following: Tensor, batch: Batch, cache: Cache | None = None) -> Tensor:
        """The MTP block on streams [T, n, D] and the ids [T] of the tokens that follow each: its streams [R, n, D]."""
        block = self._draft_block()
        step = Step(self.config, following, batch, self.numerics.dtype)
        if cache and cache.layer(0).memory is not None:
            step.begin()
        state = cache.layer(self.config.num_hidden_layers) if cache else NoState()
        out = block(block.merge(x_TnD, self._embedded(following)), step, state)
        return out if batch.wanted is None else out[batch.wanted]

    def draft_logits(self, x_RnD: Tensor) -> Tensor:
        """The MTP block's streams [R, n, D] -> float32 logits [R, V]; embedding and head are shared with the model."""
        block = self._draft_block()
        return self._scores(hc_head(x_RnD, *block.mixing("hc_head"), block.norm, self.config))

    def share_index(self, rank: int, ranks: int, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        """Have this rank of several choose entries for its part of a prompt's queries; `gather` brings the rest.

        Without it, as when a rank is measured alone, its own choices stand for the others'.
        """
        for module in self.modules():
            if isinstance(module, Indexer):
                module.share = rank, ranks, gather

    def densify(self, dtype: torch.dtype | None = None) -> None:
        """Replace every FP8 and FP4 weight by its exact values in `dtype` (the compute dtype): faster on a CPU.

        In float32, BF16 weights are widened as well, which is exact and saves a cast a call, and weights are packed
        (`kernels.packed`), which is exact too. The model must not be trained afterwards.
        """
        dtype = dtype or self.numerics.dtype
        for module in self.modules():
            if isinstance(module, Linear | Experts | Gate):
                module.densify(dtype)
            elif isinstance(module, HyperParameters):
                module.pack_mixing()
        if dtype == torch.float32:
            for parameter in self.parameters():
                parameter.data = parameter.data.float() if parameter.dtype == torch.bfloat16 else parameter.data

    def _scores(self, h: Tensor) -> Tensor:
        return linear(h, self.head.packed or self.head.weight, dtype=torch.float32)

    def _following(self) -> list[Tensor | PackedSum]:
        """For each layer the mixing weights that its streams meet next: the next layer's, at last the head's."""
        blocks = [block for block in self.layers if isinstance(block, Block)]
        return [*(block.mixing("hc_attn")[0] for block in blocks[1:]), self.mixing("hc_head")[0]]

    def _draft_block(self) -> MTPBlock:
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        return block

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).to(self.numerics.dtype)
