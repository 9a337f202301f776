"""RMS normalisation of rows on a GPU. Reference 2.4; the torch reference is `norm.rms_norm`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import options, power_of_two

_PROGRAM = 2048
"""Values a program normalises, rows of a head size together."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Any:
    """`norm.rms_norm` over the last axis of x [..., K], BF16 or float32; NotImplemented for other dtypes."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return NotImplemented
    k, x = x.shape[-1], x.contiguous()
    rows, columns = x.numel() // k, power_of_two(k)
    out, together = torch.empty_like(x), max(1, _PROGRAM // columns)
    if rows:
        _norm[(triton.cdiv(rows, together),)](
            x, x if weight is None else weight, out, rows, k, together, columns, eps, weight is not None,
            **options(x, 4 if columns <= _PROGRAM else 8),
        )  # fmt: skip
    return out


@triton.jit
def _norm(
    x, weight, out, ROWS, K, R: tl.constexpr, B: tl.constexpr, EPS, WEIGHTED: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    r = tl.arange(0, B)
    inside = (row < ROWS)[:, None] & (r < K)[None, :]
    place = row.to(tl.int64)[:, None] * K + r[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    v = v * (1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / K + EPS))[:, None]
    if WEIGHTED:
        v = v * tl.load(weight + r, mask=r < K, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, v.to(out.dtype.element_ty), mask=inside)
