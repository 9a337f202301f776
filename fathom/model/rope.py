"""Rotary positions on the last dims of a vector: interleaved pairs, YaRN in compressed layers. Reference 2.5."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fathom.config import RopeScaling


def frequencies(dims: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """float32 [dims / 2] angular frequencies of rotations by `theta`, scaled by YaRN where there is `scaling`.

    Layers without compression have `rope_theta` and no YaRN; all others `compress_rope_theta` with YaRN, for everything
    in them: window, entries and indexer alike.
    """
    exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
    plain = 1.0 / theta**exponents
    return _yarn(plain, theta, scaling) if scaling else plain


def _yarn(plain: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    dims = 2 * plain.shape[0]

    def dim_of(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return dims * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(dim_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_of(scaling.beta_slow)), dims - 1)
    steps = torch.arange(dims // 2, dtype=torch.float32) - low
    ramp = (steps / max(high - low, 1e-3)).clamp(0.0, 1.0)
    return plain * (1 - ramp) + plain / scaling.factor * ramp


def turns(positions: Tensor, freqs: Tensor) -> Tensor:
    """exp(i * position * frequency): [T] and [P] -> complex64 [T, P]."""
    angles = positions.float().unsqueeze(-1) * freqs
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the last 2P dims of `x` [..., C] by `turn` [..., P], which broadcasts; its conjugate rotates back."""
    split = x.shape[-1] - 2 * turn.shape[-1]
    if x.dtype == torch.float32 and not (x.is_cuda or torch.is_grad_enabled()):
        out = x.numpy().copy()
        turned = out[..., split:].view(np.complex64)
        np.multiply(turned, turn.numpy(), out=turned)
        return torch.from_numpy(out)
    pairs = torch.view_as_complex(x[..., split:].float().unflatten(-1, (-1, 2)))
    return torch.cat((x[..., :split], torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)), -1)
