"""Number formats of DeepSeek-V4: FP8 (e4m3), FP4 (e2m1) and their power-of-two scales (e8m0). Reference 3.2 and 4.

Two families of functions:
  *_sim       round activations to the grid of a format and return them in their own dtype (what a cache row or a GEMM
              operand really holds); differentiable by a straight-through estimator
  quantize_*  turn weights into stored bytes, dequantize_* turn stored bytes into float32

Every scale is a power of two, so multiplying and dividing by it is exact. All functions accept leading batch dims.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fathom.errors import FormatError
from fathom.kernels.dispatch import beside

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_FLOOR = 1e-4
FP4_FLOOR = FP4_MAX * 2.0**-126
WEIGHT_BLOCK = 128
FP4_BLOCK = 32
_NUMPY_ELEMENTS = 1 << 14
_MANTISSA, _EXPONENT = np.int32(0x7FFFFF), np.int32(0x7F800000)
_FLOOR, _TOP, _EIGHTH, _SMALLEST = (np.float32(v) for v in (FP8_FLOOR, FP8_MAX, 2.0**-3, 2.0**-9))
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def ceil_pow2(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) for positive normal float32 `x`, on the exponent bits: an exact power stays itself."""
    bits = x.view(torch.int32) + 0x7FFFFF
    return (bits & 0x7F800000).view(torch.float32)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., K] -> [..., ceil(K / block), block] in float32, the last block padded with zeros."""
    x = x.float()
    rest = -x.shape[-1] % block
    if rest:
        x = torch.nn.functional.pad(x, (0, rest))
    return x.unflatten(-1, (-1, block))


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return x + (rounded - x).detach()
    return rounded


def _sim(x: Tensor, block: int, floor: float, top: float, rounder: Callable[[Tensor], Tensor]) -> Tensor:
    y = _blocks(x.detach(), block)
    scale = ceil_pow2(y.abs().amax(-1, keepdim=True).clamp_min_(floor).div_(top))
    y = rounder(y / scale).mul_(scale)
    y = y.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return _straight_through(x, y)


def _small(x: Tensor, block: int) -> bool:
    """Whether numpy is the faster way: a few rows on a CPU without gradients, where the number of calls is the cost."""
    few = x.numel() <= _NUMPY_ELEMENTS and x.dtype == torch.float32
    return few and not (x.is_cuda or x.requires_grad or x.shape[-1] % block)


def _fp8_numpy(x: Tensor, block: int) -> Tensor:
    """`fp8_sim`, the same values by other means: every element is rounded to a multiple of its own quantum."""
    y = x.numpy().reshape(-1, block)
    amax = np.maximum.reduce(np.abs(y), -1, keepdims=True)
    amax = np.maximum(amax, _FLOOR) / _TOP
    scale = ((amax.view(np.int32) + _MANTISSA) & _EXPONENT).view(np.float32)
    power = (y.view(np.int32) & _EXPONENT).view(np.float32)  # 2^floor(log2 |y|): e4m3 keeps three bits below it
    quantum = np.maximum(power * _EIGHTH, scale * _SMALLEST)
    return torch.from_numpy((np.rint(y / quantum) * quantum).reshape(x.shape))


def round_e4m3(y: Tensor) -> Tensor:
    """The nearest e4m3 value (ties to even) of float32 `y`, |y| <= 448, as float32."""
    return y.to(torch.float8_e4m3fn).to(torch.float32)


def round_e2m1(y: Tensor) -> Tensor:
    """The nearest e2m1 value (ties to the even code) of float32 `y`, |y| <= 6, as float32."""
    # The grid's step is 0.5 below 2, 1 below 4 and 2 above; torch.round goes to even, which is the even code.
    size = y.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.round(y / step).mul_(step).clamp_(-FP4_MAX, FP4_MAX)


@beside("quant_triton")
def fp8_sim(x: Tensor, block: int) -> Tensor:
    """`x` [..., K] rounded to e4m3 with one power-of-two scale per `block` of K. Reference 4, fp8sim."""
    if _small(x, block):
        return _fp8_numpy(x, block)
    return _sim(x, block, FP8_FLOOR, FP8_MAX, round_e4m3)


def fp4_sim(x: Tensor, block: int = FP4_BLOCK) -> Tensor:
    """`x` [..., K] rounded to e2m1 with one power-of-two scale per `block` of K. Reference 4, fp4sim32."""
    return _sim(x, block, FP4_FLOOR, FP4_MAX, round_e2m1)


def bf16_sim(x: Tensor) -> Tensor:
    """`x` rounded to BF16 and returned in its own dtype."""
    return _straight_through(x, x.detach().to(torch.bfloat16).to(x.dtype))


# --- stored scales ---


def to_e8m0(scale: Tensor) -> Tensor:
    """Powers of two (float32, normal) -> one exponent byte each (`torch.float8_e8m0fnu`)."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)


def from_scale(scale: Tensor) -> Tensor:
    """A stored scale, E8M0 or float, as float32. Byte 255 is NaN."""
    if scale.dtype != torch.float8_e8m0fnu:
        return scale.float()
    byte = scale.view(torch.uint8).to(torch.int32)
    value = torch.where(byte == 0, torch.full_like(byte, 0x00400000), byte << 23).view(torch.float32)
    return torch.where(byte == 255, torch.full_like(value, torch.nan), value)


# --- FP8 weights: e4m3 with one scale per 128 x 128 ---


def _expand(scale: Tensor, rows: int, cols: int, block_rows: int, block_cols: int) -> Tensor:
    full = from_scale(scale).repeat_interleave(block_rows, -2).repeat_interleave(block_cols, -1)
    return full[..., :rows, :cols]


def _tile_amax(w: Tensor) -> Tensor:
    rows, cols = w.shape[-2:]
    b = WEIGHT_BLOCK
    padded = torch.nn.functional.pad(w.float().abs(), (0, -cols % b, 0, -rows % b))
    return padded.unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).amax((-1, -3))


def quantize_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [..., O, I] -> (e4m3 [..., O, I], e8m0 [..., ceil(O/128), ceil(I/128)])."""
    scale = ceil_pow2(_tile_amax(w).clamp_min(FP8_FLOOR) / FP8_MAX)
    full = _expand(scale, w.shape[-2], w.shape[-1], WEIGHT_BLOCK, WEIGHT_BLOCK)
    return (w.float() / full).to(torch.float8_e4m3fn), to_e8m0(scale)


def dequantize_fp8(w: Tensor, scale: Tensor) -> Tensor:
    """Stored e4m3 [..., O, I] and block scales (E8M0 or F32) -> float32 [..., O, I]."""
    return w.float() * _expand(scale, w.shape[-2], w.shape[-1], WEIGHT_BLOCK, WEIGHT_BLOCK)


# --- FP4 weights: e2m1 packed two a byte with one scale per 1 x 32 ---


def pack_fp4(codes: Tensor) -> Tensor:
    """Codes 0..15 (uint8 [..., I]) -> int8 [..., I/2]: element 2j in the low nibble of byte j."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8)


def unpack_fp4(packed: Tensor) -> Tensor:
    """The inverse of `pack_fp4`: int8 [..., I/2] -> uint8 codes [..., I]."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), -1).flatten(-2)


@lru_cache(maxsize=8)
def _fp4_table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may be training
        return torch.tensor(_FP4_VALUES + tuple(-v for v in _FP4_VALUES), device=device)


def _fp4_codes(y: Tensor) -> Tensor:
    """The code of the nearest e2m1 value of float32 `y`; a negative value that rounds to zero keeps its sign."""
    grid = round_e2m1(y).abs()
    mids = torch.tensor(_FP4_MIDPOINTS, device=y.device)
    return torch.bucketize(grid, mids).to(torch.uint8) | (torch.signbit(y).to(torch.uint8) << 3)


def quantize_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [..., O, I] -> (packed int8 [..., O, I/2], e8m0 [..., O, I/32]); scale 2^ceil(log2(amax/6))."""
    if w.shape[-1] % FP4_BLOCK:
        raise FormatError(f"FP4 needs rows of a multiple of {FP4_BLOCK} values, got {w.shape[-1]}; store them as FP8")
    y = _blocks(w, FP4_BLOCK)
    scale = ceil_pow2(y.abs().amax(-1).clamp_min(FP4_FLOOR) / FP4_MAX)
    codes = _fp4_codes((y / scale.unsqueeze(-1)).flatten(-2))
    return pack_fp4(codes), to_e8m0(scale)


def dequantize_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Stored FP4 (int8 [..., O, I/2]) and its scales [..., O, I/32] -> float32 [..., O, I]."""
    values = _fp4_table(packed.device)[unpack_fp4(packed).long()]
    return (values.unflatten(-1, (-1, FP4_BLOCK)) * from_scale(scale).unsqueeze(-1)).flatten(-2)


def fp4_to_fp8(packed: Tensor, scale: Tensor, lossy: bool = False) -> tuple[Tensor, Tensor]:
    """Repack FP4 as FP8 with 128 x 128 scales of max(block scales) / 2^6. Reference 3.2.

    Exact while the scales inside a block do not spread wider than e4m3's exponents; otherwise FormatError,
    unless `lossy` (then the smallest values round).
    """
    exact = dequantize_fp4(packed, scale)
    per_row = from_scale(scale).repeat_interleave(FP4_BLOCK, -1)
    new = (_tile_amax(per_row) * 2.0**-6).clamp_min(2.0**-127)
    codes = (exact / _expand(new, exact.shape[-2], exact.shape[-1], WEIGHT_BLOCK, WEIGHT_BLOCK)).to(torch.float8_e4m3fn)
    stored = to_e8m0(new)
    if not lossy and not torch.equal(dequantize_fp8(codes, stored), exact):
        raise FormatError("the FP4 scales spread too widely inside a 128x128 block to repack as FP8 exactly")
    return codes, stored


def dequantize(w: Tensor, scale: Tensor | None) -> Tensor:
    """Any stored weight as float32: float (no scale), FP8 (e4m3 + scale) or FP4 (int8 + scale)."""
    if scale is None:
        return w.float()
    return dequantize_fp4(w, scale) if w.dtype == torch.int8 else dequantize_fp8(w, scale)


# --- Hadamard ---


@lru_cache(maxsize=8)
def hadamard_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n, n], orthonormal; n a power of two."""
    with torch.inference_mode(False):  # kept for later calls, which may be training
        h = torch.ones(1, 1, dtype=torch.float64)
        while h.shape[0] < n:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
        return (h * n**-0.5).to(device=device, dtype=dtype)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last axis (a power of two), Sylvester order. Reference 2.8."""
    return x @ hadamard_matrix(x.shape[-1], x.dtype, x.device)
