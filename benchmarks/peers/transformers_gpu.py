"""transformers' DeepseekV4ForCausalLM beside a model of ours on the same GPU: the same weights, dequantised to BF16.

What transformers keeps in float32 stays so, attention is eager (there is no other for this model), experts are computed
as its default says. Nothing is written to disk: every tensor is widened from ours and copied into theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fathom.config import ModelConfig
from fathom.kernels.quant import dequantize
from fathom.kernels.words import from_words
from fathom.model.transformer import Transformer
from tests.oracle import their_name

_EXPERTS = 8
"""Experts widened at a time: what bounds the scratch."""


class Theirs:
    """One sequence through transformers."""

    def __init__(self, ours: Transformer, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = _empty(ours.config, device, dtype)
        _copy(ours, self.model)
        self._cache: Any = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Forget everything and compute a prompt [n]; logits [V] after it."""
        self._cache = None
        return self.step(ids)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Go on with tokens [n]; logits [V] after them."""
        out = self.model(input_ids=ids.unsqueeze(0), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[0, -1]


def _empty(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Their model with room for weights, built as `from_pretrained` would: only rotary tables are filled."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

    raw = config.to_dict()
    dropped = ("rope_scaling", "torch_dtype", "architectures", "topk_method", "quantization_config", "expert_dtype")
    scaling = {**raw["rope_scaling"], "rope_type": "yarn"}
    names = {k: v for k, v in raw.items() if k not in dropped}
    theirs = DeepseekV4Config(**names, rope_scaling=scaling, attn_implementation="eager")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = DeepseekV4ForCausalLM(theirs)
    finally:
        torch.set_default_dtype(before)
    _keep_float32(model)
    model = model.to_empty(device=device)
    for name, module in list(model.named_modules()):
        if isinstance(module, DeepseekV4RotaryEmbedding):
            model.set_submodule(name, DeepseekV4RotaryEmbedding(theirs).to(device))
    return model.eval()


def _keep_float32(model: Any) -> None:
    """What they say, but for the norms' weights: those are BF16 as published, and widened their 5.17 does not run."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    for module_name, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            named = kept & {*module_name.split("."), name} and not module_name.endswith("norm")
            if named and tensor.is_floating_point():
                tensor.data = tensor.data.float()


def _copy(ours: Transformer, theirs: nn.Module) -> None:
    """Every tensor of ours into theirs, all of theirs reached."""
    state = dict(theirs.state_dict(keep_vars=True))
    for name, weight, scale in _weights(ours):
        _widen(weight, scale, state.pop(their_name(name)))
    if state:
        raise KeyError(f"transformers has tensors that ours does not fill: {sorted(state)[:3]}")


def _weights(ours: Transformer) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    state = ours.state_dict()
    for name, tensor in state.items():
        if not name.endswith((".scale", "13_scale", "w2_scale")):
            scale = name.removesuffix("weight") + "scale" if name.endswith(".weight") else f"{name}_scale"
            yield name, tensor, state.get(scale)


@torch.no_grad()
def _widen(weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    if scale is None:
        out.copy_(weight)
    elif weight.ndim == 2:
        out.copy_(dequantize(weight, scale))
    else:
        for at in range(0, len(weight), _EXPERTS):
            some = weight[at : at + _EXPERTS]
            stored = from_words(some) if some.dtype == torch.int32 else some
            out[at : at + _EXPERTS].copy_(dequantize(stored, scale[at : at + _EXPERTS]))
