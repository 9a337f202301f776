"""What all kernels of FP4 experts share: the weights as they read them, the sum over a token's pairs. Reference 2.10.

A pair is a token with one of its k experts; P = T * k pairs, in the order of the tokens.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import options
from fathom.kernels.words import to_words


@dataclass(frozen=True)
class Fp4Experts:
    """The weights of a layer's experts as the kernels read them; as many bytes as stored.

    w13 int32 [E, 2I, D / 8] (gate rows first), s13 uint8 [E, 2I, D / 32]; w2 int32 [E, D, I / 8], s2 [E, D, I / 32]
    """

    w13: Tensor
    s13: Tensor
    w2: Tensor
    s2: Tensor

    @classmethod
    def load(cls, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor) -> Fp4Experts:
        """From the stored form, int8 [E, 2I, D / 2] and [E, D, I / 2] with E8M0 scales per 32, in its own memory."""
        return cls(to_words(w13), s13.view(torch.uint8), to_words(w2), s2.view(torch.uint8))


def combine(parts: Tensor, k: int, shared: Tensor | None = None) -> Tensor:
    """The sum over each token's k pairs in their order, parts [T * k, D] float32 or BF16: float32 [T, D].

    With `shared` [T, D] that is added last, and the sum has its dtype.
    """
    tokens, hidden = parts.shape[0] // k, parts.shape[1]
    out = torch.empty((tokens, hidden), dtype=torch.float32 if shared is None else shared.dtype, device=parts.device)
    block = 512
    _combine[(triton.cdiv(hidden, block), tokens)](
        parts,
        parts if shared is None else shared,
        out,
        hidden,
        k,
        block,
        shared is not None,
        **options(parts, 4, early=False),
    )
    return out


@triton.jit
def _combine(parts, shared, out, D, TOPK: tl.constexpr, B: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr):
    r = tl.program_id(0) * B + tl.arange(0, B)
    t = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((B,), tl.float32)
    for j in tl.static_range(TOPK):
        total += tl.load(parts + (t * TOPK + j) * D + r, mask=r < D, other=0.0).to(tl.float32)
    if SHARED:
        total += tl.load(shared + t * D + r, mask=r < D, other=0.0).to(tl.float32)
    tl.store(out + t * D + r, total.to(out.dtype.element_ty), mask=r < D)
