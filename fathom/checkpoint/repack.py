"""One weight from one stored form to another: FP4, FP8, BF16. Reference 3.2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fathom.checkpoint.names import Kind
from fathom.config import ModelConfig, Quantization
from fathom.errors import FormatError
from fathom.kernels import quant

DTYPES = {"fp4": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
FORMS = {dtype: form for form, dtype in DTYPES.items()}
CHOICES = {Kind.EXPERT: ("fp4", "fp8", "bf16"), Kind.LINEAR: ("fp8", "bf16")}
"""The forms that experts and linears can have in a file."""


def target(kind: Kind, experts: str, linears: str) -> torch.dtype:
    """The dtype in which a tensor of this kind is written."""
    if kind is Kind.EXPERT:
        return DTYPES[experts]
    return DTYPES[linears] if kind is Kind.LINEAR else kind.value[0]


def repack(name: str, weight: Tensor, scale: Tensor | None, dtype: torch.dtype, lossy: bool) -> list[Tensor]:
    """A weight in the form of `dtype`: the tensor, and its E8M0 scale if it has one.

    Raises FormatError if a value would change, unless `lossy`; and for a shape that the form cannot hold.
    """
    try:
        out = _packed(weight, scale, dtype)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None
    if not lossy:
        new = quant.dequantize(out[0], out[1] if len(out) > 1 else None)
        if not torch.equal(new, quant.dequantize(weight, scale)):
            raise FormatError(f"{name} cannot be stored as {FORMS[dtype]} exactly: add --lossy to round it")
    return out


def _packed(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    if dtype == torch.float8_e4m3fn:
        if weight.dtype == torch.int8 and scale is not None:
            return list(quant.fp4_to_fp8(weight, scale, lossy=True))
        return list(quant.quantize_fp8(quant.dequantize(weight, scale)))
    if dtype == torch.int8:
        return list(quant.quantize_fp4(quant.dequantize(weight, scale)))
    return [quant.dequantize(weight, scale).to(dtype)]


def check_choice(experts: str, linears: str) -> None:
    """Refuse forms that do not exist, or that no config.json can describe together. Raises FormatError."""
    for what, form, kind in (("experts", experts, Kind.EXPERT), ("linears", linears, Kind.LINEAR)):
        if form not in CHOICES[kind]:
            raise FormatError(f"{what} cannot be stored as {form!r}: use {', '.join(CHOICES[kind])}")
    if experts == "bf16" and linears == "fp8":
        raise FormatError("BF16 experts beside FP8 linears have no published configuration: store linears as bf16 too")


def described(config: ModelConfig, experts: str, linears: str) -> dict[str, Any]:
    """The config.json of a checkpoint of these forms."""
    stored = Quantization() if linears == "fp8" else None
    return replace(config, expert_dtype=None if experts == "bf16" else experts, quantization_config=stored).to_dict()
