"""Routing on Hopper: the launcher of router.cu. Reference 2.10; what that lacks goes to `router_triton`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fathom.kernels import router_triton
from fathom.kernels.cuda import compiles, kernel, pointer

_MOST_EXPERTS, _MOST_CHOSEN = 1024, 32


def route(logits: Tensor, bias: Tensor | None, table: Tensor | None, tokens: Tensor, k: int, factor: float) -> Any:
    """`router_triton.route`."""
    if not _has(logits, bias, table, tokens, k):
        return router_triton.route(logits, bias, table, tokens, k, factor)
    rows, experts = logits.shape
    logits = logits.contiguous()
    chosen = torch.empty((rows, k), dtype=torch.int32, device=logits.device)
    shares = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    constants = {"E": experts, "TOP": k, "BY_HASH": int(table is not None), "WIDE": int(tokens.dtype == torch.int64)}
    run = kernel("router.cu", "route", logits.device, **constants)
    pointers = map(pointer, (logits, bias, table, tokens, chosen, shares))
    # An ordinary launch: the experts' kernels rely on all before it having ended when they begin.
    run((rows, 1), -(-experts // 32) * 32, logits.device, *pointers, ctypes.c_float(factor), early=False)
    return chosen, shares


def _has(logits: Tensor, bias: Tensor | None, table: Tensor | None, tokens: Tensor, k: int) -> bool:
    rows, experts = logits.shape
    fits = rows > 0 and k <= min(experts, _MOST_CHOSEN) and experts <= _MOST_EXPERTS and logits.dtype == torch.float32
    if table is None:
        types = bias is not None and bias.dtype == torch.float32
    else:
        types = table.dtype == torch.int64 and tokens.dtype in (torch.int32, torch.int64)
    return fits and types and compiles(logits.device, "router.cu")
