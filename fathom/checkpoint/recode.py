"""One weight from one stored form to another: FP4, FP8 or BF16. Reference 3.2."""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.checkpoint.names import Entry
from fathom.errors import FormatError
from fathom.kernels import quant

_QUANTISE = {"fp4": quant.quantize_fp4, "fp8": quant.quantize_fp8}
_PLAIN = {"bf16": torch.bfloat16, "f32": torch.float32, "table": torch.int64}


def chosen_form(entry: Entry, form: str, experts: str | None, linears: str | None) -> str:
    """The form to store `entry` in, which is in `form` now; None keeps it."""
    return {"expert": experts, "linear": linears}.get(entry.kind) or form


def recode(
    entry: Entry, weight: Tensor, scale: Tensor | None, form: str, wanted: str, lossy: bool = False
) -> tuple[Tensor, ...]:
    """`weight` and `scale`, stored in `form`, as the tensors of the form `wanted`: what `names.specs` describes.

    A stored value that the new form cannot hold is a FormatError unless `lossy`; rounding to FP4, or a float to FP8 or
    BF16, is what was asked for.
    """
    if entry.kind in _PLAIN:
        return (weight.to(_PLAIN[entry.kind]),)
    if form == wanted and scale is not None:
        return weight, scale
    if (form, wanted) == ("fp4", "fp8") and scale is not None:
        return _repacked(entry, weight, scale, lossy)
    if wanted == "bf16":
        return (_as_bf16(entry, weight, scale, lossy),)
    return _QUANTISE[wanted](quant.dequantize(weight, scale))


def _repacked(entry: Entry, weight: Tensor, scale: Tensor, lossy: bool) -> tuple[Tensor, Tensor]:
    try:
        return quant.fp4_to_fp8(weight, scale, lossy)
    except FormatError as error:
        raise FormatError(f"{entry.name}: {error}; add --lossy to round the smallest values, or use bf16") from None


def _as_bf16(entry: Entry, weight: Tensor, scale: Tensor | None, lossy: bool) -> Tensor:
    if scale is None:
        return weight.to(torch.bfloat16)
    exact = quant.dequantize(weight, scale)
    rounded = exact.to(torch.bfloat16)
    if not lossy and not torch.equal(rounded.float(), exact):
        text = f"{entry.name}: its scales are no powers of two, so BF16 cannot hold its values exactly"
        raise FormatError(f"{text}; add --lossy to round them")
    return rounded
