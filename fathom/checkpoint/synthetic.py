"""A model of random weights in the published forms, made where it will run: sizes are measured without fetching them.

Every code of FP4 and every finite one of FP8 occurs; scales vary by a factor of four, around what keeps activations in
range, as in `random`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fathom.checkpoint.names import kind_of
from fathom.checkpoint.random import SPREAD, distribution
from fathom.config import ModelConfig
from fathom.kernels.quant import FP4_BLOCK, WEIGHT_BLOCK
from fathom.model.layers import Linear, Numerics
from fathom.model.moe import Experts
from fathom.model.transformer import Transformer
from fathom.parallel.plan import rank_model


def synthetic_model(
    config: ModelConfig,
    numerics: Numerics,
    device: torch.device | str,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    tp: int = 1,
) -> Transformer:
    """A frozen model on `device`: linears FP8, experts FP4, the rest BF16 or float32 as published.

    tp: as one of so many ranks holds it (`parallel.plan`). Raises ConfigError where it cannot be cut so.
    progress: called with the bytes of every module once it is there.
    """
    with torch.device("meta"):
        model = rank_model(config, numerics, tp)
    random = torch.Generator(device).manual_seed(seed)
    for path, module in model.named_modules():
        _fill(path, module, random)
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if progress and own:
            progress(sum(t.nbytes for t in own))
    return model.eval()


def _fill(path: str, module: nn.Module, random: torch.Generator) -> None:
    if isinstance(module, Experts):
        module.store(*_fp4(module.w13.shape, random), *_fp4(module.w2.shape, random))
        module.place()
        return
    if isinstance(module, Linear) and kind_of(f"{path}.weight") == "linear":
        module.store(*_fp8(module.weight.shape, random))
        return
    for name, parameter in module.named_parameters(recurse=False):
        value = _normal(f"{path}.{name}".lstrip("."), parameter.shape, random)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, _buffer(name, buffer, module, random))


def _normal(name: str, shape: torch.Size, random: torch.Generator) -> Tensor:
    centre, spread = distribution(name, tuple(shape))
    dtype = torch.bfloat16 if kind_of(name) == "bf16" else torch.float32
    return torch.randn(shape, dtype=dtype, device=random.device, generator=random).mul_(spread).add_(centre)


def _buffer(name: str, buffer: Tensor, module: nn.Module, random: torch.Generator) -> Tensor:
    """The router's bias and counts are zeros, its table gives every token id distinct experts."""
    zeros = torch.zeros(buffer.shape, dtype=buffer.dtype, device=random.device)
    if name != "tid2eid":
        return zeros
    experts = module.get_parameter("weight").shape[0]
    first = torch.randint(experts, (buffer.shape[0], 1), device=random.device, generator=random)
    return (first + torch.arange(buffer.shape[1], device=random.device) * (experts // buffer.shape[1])) % experts


def _fp4(shape: torch.Size, random: torch.Generator) -> tuple[Tensor, Tensor]:
    codes = _bytes((*shape[:-1], shape[-1] // 2), 0, 256, random).view(torch.int8)
    return codes, _scales((*shape[:-1], shape[-1] // FP4_BLOCK), "fp4", shape[-1], random)


def _fp8(shape: torch.Size, random: torch.Generator) -> tuple[Tensor, Tensor]:
    codes = _bytes(tuple(shape), 0, 256, random).bitwise_and_(0b1011_1111)  # the lower half of the exponents: no NaN
    blocks = tuple(-(-size // WEIGHT_BLOCK) for size in shape)
    return codes.view(torch.float8_e4m3fn), _scales(blocks, "fp8", shape[-1], random)


def _scales(shape: tuple[int, ...], form: str, inputs: int, random: torch.Generator) -> Tensor:
    """Powers of two around the one that gives the weights a standard deviation of inputs^-0.5."""
    middle = 127 + round(math.log2(inputs**-0.5 / SPREAD[form]))
    return _bytes(shape, middle - 1, middle + 2, random).view(torch.float8_e8m0fnu)


def _bytes(shape: tuple[int, ...], low: int, high: int, random: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, device=random.device, generator=random)
