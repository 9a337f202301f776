"""Quantisation-aware training: the forward sees the weights that the checkpoint will hold. Reference training 8.

The gradient with respect to the rounded weight goes to the full-precision one unchanged (straight through), so nothing
has to be traced: the values are swapped for the forward and backward and put back before the update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fathom.kernels import quant
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer

_FP8 = re.compile(r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|indexer\.wq_b|shared_experts\.w[123]|mtp\.0\.[eh]_proj)\.weight$")
_FP4 = re.compile(r"experts\.(w13|w2)$")
_F32 = re.compile(r"hc_\w+_(fn|base|scale)$|\.ape$|attn_sink$")


def as_stored(name: str, weight: Tensor) -> Tensor:
    """The values that a weight has after export: FP4 for routed experts, FP8 for linears, BF16 or F32 for the rest."""
    if _FP4.search(name):
        return quant.fp4_sim(weight)
    if _FP8.search(name):
        return quant.dequantize_fp8(*quant.quantize_fp8(weight))
    return weight if _F32.search(name) else quant.bf16_sim(weight)


@contextmanager
def stored_weights(model: Transformer) -> Iterator[None]:
    """Inside, every parameter of `model` has the values of `as_stored`; outside, its own."""
    with torch.no_grad():
        kept = {name: p.data for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.data = as_stored(name, p.data)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.data = kept[name]


def set_numerics(model: Transformer, numerics: Numerics) -> None:
    """Switch a built model to other numerics."""
    for module in model.modules():
        if isinstance(getattr(module, "numerics", None), Numerics):
            setattr(module, "numerics", numerics)  # noqa: B010  (modules have no common class that declares it)
