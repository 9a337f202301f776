"""Tensor parallelism as a table: along which axis each tensor is cut, and what one rank's model looks like.

The model does not know of it. A rank has its heads and its groups of the output projection, its part of every expert's
width, its rows of the head, and the whole of the rest: the one key-value head, the low-rank projections, compressors,
indexer, router, hyper-connections and the embedding. What its attention and its experts return are parts of sums over
the ranks: two all-reduces a layer (`summed`). The ranks' logits are end to end those of the whole.

Cuts fall on multiples of 128, the blocks of stored weights and of quantised operands, so that a rank computes with the
same rounded numbers as the whole would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.errors import ConfigError
from fathom.kernels.mailbox import Unsummed
from fathom.kernels.quant import WEIGHT_BLOCK
from fathom.model.layers import Linear, Numerics
from fathom.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Cut:
    """Along `axis` into as many pieces as there are ranks; each of `stacked` equal parts of the axis for itself."""

    axis: int
    stacked: int = 1


TABLE = (
    (r"attn\.wq_b\.(weight|scale)", Cut(0)),  # heads
    (r"attn\.attn_sink", Cut(0)),  # heads
    (r"attn\.wo_a\.(weight|scale)", Cut(0)),  # groups of heads
    (r"attn\.wo_b\.(weight|scale)", Cut(1)),  # what the groups give
    (r"ffn\.experts\.w13(_scale)?", Cut(1, stacked=2)),  # width: gate rows, then up rows
    (r"ffn\.experts\.w2(_scale)?", Cut(2)),  # width
    (r"ffn\.shared_experts\.w[13]\.(weight|scale)", Cut(0)),  # width
    (r"ffn\.shared_experts\.w2\.(weight|scale)", Cut(1)),  # width
    (r"head\.weight", Cut(0)),  # vocabulary
)
"""Names of our parameters, from the block's own part on, and their cuts; what is not here is whole on every rank."""
_TABLE = [(re.compile(rf"(.*\.)?{pattern}"), cut) for pattern, cut in TABLE]


def cut_of(name: str) -> Cut | None:
    """How a parameter of the model is cut, by its full name."""
    return next((cut for pattern, cut in _TABLE if pattern.fullmatch(name)), None)


def share(name: str, tensor: Tensor, rank: int, tp: int) -> Tensor:
    """The part of a parameter, in any stored form of a checkpoint, that rank `rank` of `tp` holds: a copy if cut."""
    return _part(tensor, cut_of(name), rank, tp)


def expert_share(name: str, matrix: Tensor, rank: int, tp: int) -> Tensor:
    """The same of one expert's matrix, as a checkpoint has it, of those that are stacked in the parameter `name`."""
    cut = cut_of(name)
    return _part(matrix, cut and Cut(cut.axis - 1), rank, tp)


def _part(tensor: Tensor, cut: Cut | None, rank: int, tp: int) -> Tensor:
    if cut is None or tp == 1:
        return tensor
    plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # few ops know 8-bit floats
    parts = [part.chunk(tp, cut.axis)[rank] for part in plain.chunk(cut.stacked, cut.axis)]
    return torch.cat(parts, cut.axis).contiguous().view(tensor.dtype)


def rank_config(config: ModelConfig, tp: int) -> ModelConfig:
    """The configuration of one of `tp` ranks' models, the head's rows apart. Raises ConfigError."""
    if tp == 1:
        return config
    for what, size, unit in _axes(config):
        if size % (tp * unit):
            text = f"{what} ({size}) cannot be cut into {tp} equal parts"
            raise ConfigError(f"{text}{f' of whole blocks of {unit}' if unit > 1 else ''}: use fewer ranks")
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // tp,
        o_groups=config.o_groups // tp,
        moe_intermediate_size=config.moe_intermediate_size // tp,
    )


def _axes(c: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """What is cut: its name, its size, and what a part must be a multiple of."""
    yield "num_attention_heads", c.num_attention_heads, 1
    yield "o_groups", c.o_groups, 1
    yield "num_attention_heads x head_dim", c.num_attention_heads * c.head_dim, WEIGHT_BLOCK
    yield "o_groups x o_lora_rank", c.o_groups * c.o_lora_rank, WEIGHT_BLOCK
    yield "moe_intermediate_size", c.moe_intermediate_size, WEIGHT_BLOCK
    yield "vocab_size", c.vocab_size, 1  # the head is BF16: it has no blocks


def rank_model(config: ModelConfig, numerics: Numerics, tp: int) -> Transformer:
    """One rank's empty model: to be made on the meta device and filled with `share`s, or at random."""
    model = Transformer(rank_config(config, tp), numerics)
    if tp > 1:
        model.head = Linear(config.hidden_size, config.vocab_size // tp)
    return model


class Ranks(Protocol):
    """Who this process is among `count` that hold one model together, and how they exchange: `tensor.Ranks`."""

    rank: int
    count: int

    def sum_later(self, part: Tensor) -> Tensor | Unsummed:
        """The sum of all ranks' parts, which may be left to its reader: the same bits on every rank, and for every row
        whatever the others are."""

    def gathered(self, part: Tensor, axis: int = -1) -> Tensor:
        """All ranks' parts end to end along an axis."""


def meet(model: Transformer, ranks: Ranks) -> None:
    """Have a rank's model compute what the whole would, and of the logits its part: sums, and shared index choices."""
    summed(model, ranks.sum_later)
    model.share_index(ranks.rank, ranks.count, partial(ranks.gathered, axis=0))


def summed(
    model: Transformer, reduce: Callable[[Tensor], Tensor | Unsummed]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Have `reduce` sum over the ranks what every attention and every feed-forward half returns."""

    def hook(module: nn.Module, given: object, out: Tensor) -> Tensor | Unsummed:
        return reduce(out)

    blocks = [*model.layers, *model.mtp]
    return [half.register_forward_hook(hook) for block in blocks for half in (block.attn, block.ffn)]
