"""What the Triton kernels share: launch options, power-of-two scales, rounding to e4m3, unpacked FP4.

Every kernel is launched with programmatic dependent launch where the device has it: the next kernel's programs start
early and load their weights, then wait (`gdc_wait`) until everything before them is complete. Two rules follow. A
kernel reads nothing before its wait but weights and what says where a step's tokens stand (slots, positions, rotations,
page tables: written before the last ordinary launch, `Step.begin`), and every program waits, also one that has nothing
to do: completion is passed on only through the waits. Exceptions are stated where they are made: attention of a step,
the shared expert, experts of one token. They rest on routers and index scores being ordinary launches.

PLAIN selects variants without inline assembly and without dependent launch: Triton's interpreter runs those.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN = os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=8)
def _dependent_launch(device: torch.device) -> bool:
    return not PLAIN and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def ready() -> None:
    """Raises where Triton cannot launch: it compiles its launcher by the C compiler, which may be missing."""
    triton.runtime.driver.active.get_current_target()


def options(x: Tensor, warps: int, stages: int = 0, early: bool = True) -> dict[str, int | bool]:
    """The launch options of a kernel over `x`: warps, pipeline stages (0: the default), dependent launch.

    early: whether its programs may take their places before the kernel before is complete. They take what is free just
    then, several on one multiprocessor, and hold it while they wait: for small kernels between large ones that costs
    more than the launch.
    """
    pdl = _dependent_launch(x.device)
    chosen: dict[str, int | bool] = {"PDL": pdl, "num_warps": warps}
    if stages:
        chosen["num_stages"] = stages
    return {**chosen, "launch_pdl": early} if pdl else chosen


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def fetch(pointer, mask, MASKED: tl.constexpr):
    """A load that is masked (zero outside) only where a shape needs it."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    return tl.load(pointer)


@triton.jit
def operand(x, PLAIN: tl.constexpr):
    """An operand of a product as it is, or as float32 for the interpreter, which cannot multiply BF16."""
    if PLAIN:
        return x.to(tl.float32)
    return x


@triton.jit
def from_e8m0(byte):
    """Exponent bytes 1..254 as float32."""
    return (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_pow2(scale):
    """1 / scale for a normal power of two: exact."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def fp8_scale(amax):
    """The power-of-two scale of a block whose largest magnitude is `amax`. Reference 4."""
    ratio = tl.div_rn(tl.maximum(amax, 1e-4), 448.0 + tl.zeros_like(amax))
    return ((ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def round_e4m3(y):
    """The nearest e4m3 value (ties to even) of float32 |y| <= 448, as float32: a multiple of its own quantum."""
    power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    quantum = tl.maximum(power * 0.125, 0.001953125)
    whole = (y * inverse_pow2(quantum) + 12582912.0) - 12582912.0
    return whole * quantum


@triton.jit
def fp4(word, J: tl.constexpr):
    """Weight J of the eight of a word (`words`), float32."""
    code = (word >> (J // 2 * 8 + J % 2 * 3)) & 7
    exponent = code >> 1
    half = 0.5 * (code & 1).to(tl.float32)
    size = tl.where(exponent == 0, half, (1.0 + half) * from_e8m0(exponent + 126))
    return tl.where(((word >> (J // 2 * 8 + 6 + J % 2)) & 1) == 1, -size, size)


@triton.jit
def swiglu(a, b, LIMIT: tl.constexpr):
    """silu(min(a, limit)) * clamp(b, -limit, limit) in float32. Reference 2.10."""
    a = tl.minimum(a, LIMIT)
    return a / (1.0 + tl.exp(-a)) * tl.minimum(tl.maximum(b, -LIMIT), LIMIT)
