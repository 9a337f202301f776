"""For tests of kernels: where they run, and memory that shows what a kernel forgot to write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def device() -> torch.device | None:
    """The device for Triton kernels: the GPU, the CPU under Triton's interpreter, or None where there is neither."""
    if INTERPRETED:
        return torch.device("cpu")
    return torch.device("cuda") if torch.cuda.is_available() else None


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what `torch.empty` returns holds NaN (integers: their largest value) until something is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Euclidean norm, in float64; NaN anywhere gives NaN."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))
