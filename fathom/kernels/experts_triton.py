"""Which kernels compute a batch's FP4 experts: of a step `experts_cuda`, before Hopper `experts_few_triton`; of prompts
`experts_many_triton`. The torch reference is `experts.experts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fathom.kernels import experts_cuda, experts_few_triton, experts_many_triton
from fathom.kernels.experts import Down, done
from fathom.kernels.experts_pairs_triton import Fp4Experts

MOST_FEW = 64
"""Tokens of a step at most; more are prompts."""


def experts(
    x: Tensor, chosen: Tensor, shares: Tensor, w13: Any, s13: Tensor | None, w2: Any, s2: Tensor | None, limit: float,
    quantize: bool, shared: Tensor | Down | None = None,
) -> Any:  # fmt: skip
    """`experts.experts` for weights in words and BF16 activations; NotImplemented for other forms."""
    if not isinstance(w13, Tensor) or w13.dtype != torch.int32 or x.dtype != torch.bfloat16 or not quantize:
        return NotImplemented
    assert s13 is not None and s2 is not None
    if s13.dtype == torch.float32 or s2.dtype == torch.float32:
        return NotImplemented
    weights = Fp4Experts(w13, s13.view(torch.uint8), w2, s2.view(torch.uint8))
    if not x.shape[0]:
        return torch.zeros_like(x)
    if x.shape[0] <= MOST_FEW and experts_cuda.has(x, chosen, weights):
        return experts_cuda.few(x, chosen, shares, weights, limit, shared)
    of_some = experts_few_triton.few if x.shape[0] <= MOST_FEW else experts_many_triton.many
    return of_some(x, chosen, shares, weights, limit, done(shared))
