"""Routed experts: clamped SwiGLU between two grouped products. Reference 2.10 and 4."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fathom.kernels.dispatch import beside
from fathom.kernels.elementwise import silu
from fathom.kernels.linear import Part, linear
from fathom.kernels.packed import Packed
from fathom.kernels.quant import WEIGHT_BLOCK, fp8_sim
from fathom.kernels.words import from_words


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(a, limit)) * clamp(b, -limit, limit) for float32 gate_up = [a, b] [T, 2I] -> [T, I]. Reference 2.10."""
    if gate_up.is_cuda or torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, -1)
        return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    values, top = gate_up.numpy(), np.float32(limit)
    gate = np.minimum(values[:, : values.shape[1] // 2], top)
    up = np.minimum(np.maximum(values[:, values.shape[1] // 2 :], -top), top)
    return torch.from_numpy(gate / (np.exp(-gate) + np.float32(1)) * up)


@beside("quant_triton")
def gated(gate_up: Tensor, limit: float, quantize: bool) -> Tensor:
    """`swiglu` of gate_up [T, 2I] in its own dtype, and as the operand of an FP8 linear when `quantize`: [T, I]."""
    hidden = swiglu(gate_up.float(), limit).to(gate_up.dtype)
    return fp8_sim(hidden, WEIGHT_BLOCK) if quantize else hidden


@beside("linear_cuda")
def gated_linear(gate_up: Tensor, part: Part, limit: float, quantize: bool) -> Tensor:
    """`gated` of gate_up [T, 2I], times the weight [D, I] of `part`: [T, D]."""
    return linear(gated(gate_up, limit, quantize), part.weight, part.scale, part.dtype)


@dataclass(frozen=True)
class Down:
    """What is left to do of an expert that every token passes: `gated_linear` of these."""

    gate_up: Tensor
    part: Part
    limit: float
    quantize: bool

    def product(self) -> Tensor:
        """[T, D]."""
        return gated_linear(self.gate_up, self.part, self.limit, self.quantize)


def done(shared: Tensor | Down | None) -> Tensor | None:
    """With nothing left to do."""
    return shared.product() if isinstance(shared, Down) else shared


@beside("experts_triton")
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
    shared: Tensor | Down | None = None,
) -> Tensor:
    """sum_k w2[e_k] (weights[t,k] * swiglu(w13[e_k] x[t])) for the k chosen experts of each token.

    x [T, D], rounded to e4m3 per 128 when `quantize`; chosen [T, k] expert ids; weights [T, k] float32;
    w13 [E, 2I, D] with the gate rows first, w2 [E, D, I], both in any stored form with scales s13, s2, FP4 also in the
    order of `kernels.words`. Returns float32 [T, D]; with `shared` [T, D], done or not, that is added last and the sum
    has its dtype.
    A token's experts are summed in the order of `chosen`, whatever else is in the batch.
    """
    x, shared = fp8_sim(x, WEIGHT_BLOCK) if quantize else x, done(shared)
    order, groups = _by_expert(chosen, len(w13))
    if order is None:
        rows, shares = x.expand(chosen.shape[1], -1), weights.flatten()
    else:
        rows, shares = x[order // chosen.shape[1]], weights.flatten()[order]
    hidden = swiglu(_grouped(rows, groups, w13, s13).float(), limit) * shares.unsqueeze(-1)
    hidden = fp8_sim(hidden, WEIGHT_BLOCK) if quantize else hidden
    out = _grouped(hidden.to(x.dtype), groups, w2, s2).float()
    routed = (out if order is None else out[order.argsort()]).unflatten(0, chosen.shape).sum(1)
    return routed if shared is None else (routed + shared.float()).to(shared.dtype)


def _grouped(
    rows: Tensor, groups: list[tuple[int, int]], weight: Tensor | list[Packed], scale: Tensor | None
) -> Tensor:
    """Each group of rows times the weight of its expert, end to end."""
    parts = zip(groups, rows.split([count for _, count in groups]), strict=True)
    return torch.cat([linear(part, _stored(weight[e]), None if scale is None else scale[e]) for (e, _), part in parts])


def _stored(weight: Tensor | Packed) -> Tensor | Packed:
    return from_words(weight) if isinstance(weight, Tensor) and weight.dtype == torch.int32 else weight


def _by_expert(chosen: Tensor, n: int) -> tuple[Tensor | None, list[tuple[int, int]]]:
    """The (token, slot) pairs in expert order, and which experts have how many (on the host: the loop needs them).

    The pairs of a single token stay as they are: None.
    """
    if chosen.shape[0] == 1:
        return None, [(e, 1) for e in chosen[0].tolist()]
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=n).tolist()
    return flat.argsort(stable=True), [(e, count) for e, count in enumerate(counts) if count]
