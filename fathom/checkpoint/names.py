"""Which tensors a checkpoint has, and where each lives in the model. Reference 3.1 and 3.2.

Official names are our parameter names, except that the routed experts of a layer are stacked: `experts.e.w1` and
`experts.e.w3` are the two halves of the rows of `experts.w13[e]`, `experts.e.w2` is `experts.w2[e]`, scales likewise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.kernels.quant import FP4_BLOCK, WEIGHT_BLOCK
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer

DUPLICATES = ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")
"""Copies of embed and head in the Base checkpoints: accepted and ignored. Reference 3.3."""

_LINEAR = re.compile(
    r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|shared_experts\.w[123]|mtp\.\d\.[eh]_proj)\.weight$"
)
_EXPERT = re.compile(r"ffn\.experts\.(w13|w2|\d+\.w[123]\.weight)$")
_FULL = re.compile(r"(hc_\w+_(fn|base|scale)|\.ape|\.attn_sink|\.gate\.bias)$")


class Kind(Enum):
    """What a tensor is, which decides how it may be stored; the value is the dtypes, the published one first."""

    EXPERT = (torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32)
    LINEAR = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
    PLAIN = (torch.bfloat16, torch.float32)
    FULL = (torch.float32, torch.bfloat16)
    TABLE = (torch.int64,)

    @staticmethod
    def of(name: str) -> Kind:
        """By official name or by parameter name."""
        if name.endswith(".tid2eid"):
            return Kind.TABLE
        for kind, pattern in ((Kind.EXPERT, _EXPERT), (Kind.LINEAR, _LINEAR), (Kind.FULL, _FULL)):
            if pattern.search(name):
                return kind
        return Kind.PLAIN


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of a checkpoint: official name, logical shape (FP4 unpacked), kind, and where the model keeps it.

    part, parts: which of the equal cuts of the parameter's rows it is, for routed experts.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    @property
    def scale(self) -> str:
        """The official name of its scale, if it is stored quantised."""
        return self.name.removesuffix("weight") + "scale"

    @property
    def scale_parameter(self) -> str:
        """The name of the scale in the model."""
        if self.kind is Kind.EXPERT:
            return self.parameter + "_scale"
        return self.parameter.removesuffix("weight") + "scale"

    def of(self, stored: Tensor) -> Tensor:
        """Its own part of the parameter, or of the parameter's scale: a contiguous view."""
        if self.expert is None:
            return stored
        return stored[self.expert].chunk(self.parts)[self.part]


def skeleton(config: ModelConfig, numerics: Numerics | None = None) -> Transformer:
    """The model without memory: shapes only."""
    with torch.device("meta"):
        return Transformer(config, numerics)


def inventory(config: ModelConfig) -> dict[str, Place]:
    """Every tensor that a checkpoint of this model has, by official name, without scales."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}
    return {place.name: place for name, shape in shapes.items() for place in _places(name, shape)}


def _places(parameter: str, shape: tuple[int, ...]) -> Iterator[Place]:
    """The official tensors of one parameter or table."""
    kind = Kind.of(parameter)
    if kind is not Kind.EXPERT:
        yield Place(parameter, shape, kind, parameter)
        return
    prefix, stack = parameter.rsplit(".", 1)
    inner = ("w1", "w3") if stack == "w13" else ("w2",)
    own = (shape[1] // len(inner), shape[2])
    for e in range(shape[0]):
        for part, w in enumerate(inner):
            yield Place(f"{prefix}.{e}.{w}.weight", own, kind, parameter, e, part, len(inner))


def stored_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape in the file: FP4 is packed two a byte along the last axis."""
    return (*shape[:-1], shape[-1] // 2) if dtype == torch.int8 else shape


def scale_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...] | None:
    """The shape of the scale that belongs to a weight stored in `dtype`; None for float weights."""
    if dtype == torch.int8:
        return (*shape[:-1], -(-shape[-1] // FP4_BLOCK))
    if dtype == torch.float8_e4m3fn:
        return (*shape[:-2], -(-shape[-2] // WEIGHT_BLOCK), -(-shape[-1] // WEIGHT_BLOCK))
    return None
