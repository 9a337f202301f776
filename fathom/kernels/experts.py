"""Routed experts: clamped SwiGLU between two grouped products. Reference 2.10 and 4."""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.kernels.elementwise import silu
from fathom.kernels.linear import linear
from fathom.kernels.packed import Packed
from fathom.kernels.quant import WEIGHT_BLOCK, fp8_sim


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(a, limit)) * clamp(b, -limit, limit) for gate_up = [a, b] [T, 2I] -> [T, I]. Reference 2.10."""
    gate, up = gate_up.chunk(2, -1)
    return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    w13: Tensor | list[Packed],
    s13: Tensor | None,
    w2: Tensor | list[Packed],
    s2: Tensor | None,
    limit: float,
    quantize: bool,
) -> Tensor:
    """sum_k w2[e_k] (weights[t,k] * swiglu(w13[e_k] x[t])) for the k chosen experts of each token.

    x [T, D] (already on the FP8 grid when `quantize`); chosen [T, k] expert ids; weights [T, k] float32;
    w13 [E, 2I, D] with the gate rows first, w2 [E, D, I], both in any stored form with scales s13, s2.
    Returns float32 [T, D]. A token's experts are summed in the order of `chosen`, whatever else is in the batch.
    """
    order, counts = _by_expert(chosen, len(w13))
    gate_up = _grouped(x[order // chosen.shape[1]], counts, w13, s13)
    hidden = swiglu(gate_up.float(), limit) * weights.flatten()[order].unsqueeze(-1)
    hidden = fp8_sim(hidden, WEIGHT_BLOCK) if quantize else hidden
    out = _grouped(hidden.to(x.dtype), counts, w2, s2).float()
    return out[order.argsort()].unflatten(0, chosen.shape).sum(1)


def _grouped(rows: Tensor, counts: list[int], weight: Tensor | list[Packed], scale: Tensor | None) -> Tensor:
    """Each group of `counts[e]` rows times the weight of expert e, end to end."""
    groups = [(e, part) for e, part in enumerate(rows.split(counts)) if part.shape[0]]
    return torch.cat([linear(part, weight[e], None if scale is None else scale[e]) for e, part in groups])


def _by_expert(chosen: Tensor, n: int) -> tuple[Tensor, list[int]]:
    """The (token, slot) pairs in expert order, and how many each expert has (on the host: the loop needs them)."""
    flat = chosen.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=n).tolist()
