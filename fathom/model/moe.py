"""Mixture of experts: routing by token id or by score, routed experts and one shared expert. Reference 2.10."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels import dispatch
from fathom.kernels.experts import Down, experts
from fathom.kernels.linear import Part, linears
from fathom.kernels.packed import pack, pack_all
from fathom.kernels.quant import dequantize
from fathom.kernels.router import route
from fathom.kernels.words import to_words
from fathom.model.layers import Linear, Numerics, Packable, joined


class Gate(Packable):
    """Chooses `num_experts_per_tok` experts for each token and weighs them."""

    tid2eid: Tensor
    bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig, by_hash: bool) -> None:
        super().__init__()
        self.config, self.by_hash = config, by_hash
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if by_hash:
            table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def densify(self, dtype: torch.dtype) -> None:
        """Pack the weight where that is possible: scores are computed in float32 whatever `dtype` is."""
        self.packed = pack(self.weight.float())

    def part(self) -> Part:
        """The product with the input that makes the scores' logits, in float32."""
        return Part(self.packed or self.weight, dtype=torch.float32)

    def forward(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, E], tokens [T] -> expert ids [T, k] and their float32 weights [T, k].

        The bias moves the choice only; the weights are the unbiased scores, which sum to `routed_scaling_factor`.
        """
        bias, table = (None, self.tid2eid) if self.by_hash else (self.bias, None)
        k, factor = self.config.num_experts_per_tok, self.config.routed_scaling_factor
        chosen, weights = route(logits, bias, table, tokens, k, factor)
        if self.training:
            self.load += torch.bincount(chosen.flatten(), minlength=logits.shape[1])
        return chosen, weights


class Experts(Packable):
    """The routed experts, stacked: w13 [E, 2I, D] (gate rows, then up rows) and w2 [E, D, I], in any stored form."""

    w13_scale: nn.Parameter | None
    w2_scale: nn.Parameter | None

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        count, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.limit, self.numerics = config.swiglu_limit, numerics
        self.w13 = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, width))
        self.register_parameter("w13_scale", None)
        self.register_parameter("w2_scale", None)

    def store(self, w13: Tensor, s13: Tensor | None, w2: Tensor, s2: Tensor | None) -> None:
        """Replace the weights by a stored form of them, which no longer takes gradients."""
        self.w13, self.w2 = nn.Parameter(w13, requires_grad=False), nn.Parameter(w2, requires_grad=False)
        self.w13_scale = None if s13 is None else nn.Parameter(s13, requires_grad=False)
        self.w2_scale = None if s2 is None else nn.Parameter(s2, requires_grad=False)
        self.packed = None

    def densify(self, dtype: torch.dtype) -> None:
        """Replace FP4 or FP8 weights, and any by float32, by their exact values; float32 is packed where possible."""
        if self.w13_scale is not None or dtype == torch.float32:
            w13, w2 = dequantize(self.w13, self.w13_scale), dequantize(self.w2, self.w2_scale)
            self.store(w13.to(dtype), None, w2.to(dtype), None)
        if dtype == torch.float32:
            packed = pack_all(self.w13), pack_all(self.w2)
            self.packed = None if None in packed else packed

    def place(self) -> None:
        """Rearrange FP4 weights, in their own memory, for the kernels of the device where they are. Once, at load."""
        if self.w13.dtype == torch.int8 and dispatch.on(self.w13.device):
            self.store(to_words(self.w13.data), self.w13_scale, to_words(self.w2.data), self.w2_scale)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, shared: Down) -> Tensor:
        """x [T, D] -> [T, D]: the weighted sum of each token's experts, plus the shared one."""
        w13, w2 = self.packed or (self.w13, self.w2)
        scales = self.w13_scale, self.w2_scale
        return experts(x, chosen, weights, w13, scales[0], w2, scales[1], self.limit, self.numerics.quantize, shared)


class SharedExpert(nn.Module):
    """The expert that every token passes; the same clamps as the routed ones."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.limit, self.numerics = config.swiglu_limit, numerics
        self.w1, self.w2, self.w3 = Linear(hidden, width), Linear(width, hidden), Linear(hidden, width)

    def parts(self) -> list[Part]:
        """The products with the input: gate rows, then up rows."""
        whole = joined(self.w1, self.w3)
        parts = [whole] if whole else [self.w1.part(), self.w3.part()]
        return [replace(part, quantised=self.numerics.quantize) for part in parts]

    def down(self, products: list[Tensor]) -> Down:
        """What is left to do when the `parts` of x [T, D] are there."""
        up = products[0] if len(products) == 1 else torch.cat(products, -1)
        return Down(up, self.w2.part(), self.limit, self.numerics.quantize)


class MoE(nn.Module):
    """The feed-forward half of a block: every layer is a mixture of experts, there is no dense one."""

    def __init__(self, config: ModelConfig, by_hash: bool, numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        self.gate = Gate(config, by_hash)
        self.experts = Experts(config, numerics)
        self.shared_experts = SharedExpert(config, numerics)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [T, D], tokens [T] -> [T, D]. The router reads x unquantised."""
        logits, *products = linears(x, (self.gate.part(), *self.shared_experts.parts()))
        chosen, weights = self.gate(logits, tokens)
        return self.experts(x, chosen, weights, self.shared_experts.down(products))
