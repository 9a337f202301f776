"""What a prompt reads of the cache, through the page table and laid end to end. Reference 4.

The torch references are `prefill.read_rows` and `prefill.read_keys`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fathom.kernels.common_triton import PLAIN, from_e8m0, inverse_pow2, options, power_of_two
from fathom.kernels.index_triton import _e2m1, _one_scale
from fathom.kernels.stored import BLOCK, Keys, Rows

_READ = 16
"""Rows that a program reads; of keys four times as many."""


def read_rows(table: Tensor, rows: Rows, slot: int, first: int, count: int) -> Any:
    """`prefill.read_rows`; NotImplemented for fronts that are no multiple of 64."""
    front = rows.width - rows.rope
    if front % BLOCK:
        return NotImplemented
    out = torch.empty((count, rows.width), dtype=torch.bfloat16, device=table.device)
    if count:
        _read_rows[(triton.cdiv(count, _READ),)](
            rows.data.view(torch.float8_e4m3fn), rows.data.view(torch.bfloat16), rows.scales, table[slot], out, first,
            count, front, power_of_two(front), rows.rope, power_of_two(rows.rope), rows.scales.shape[2], rows.per,
            _READ, PLAIN, **options(out, 4),
        )  # fmt: skip
    return out


def read_keys(table: Tensor, store: Keys, slot: int, count: int) -> Any:
    """`prefill.read_keys`; NotImplemented for key widths that are no power of two."""
    width = store.width
    if width != power_of_two(width):
        return NotImplemented
    data = torch.empty((count, width), dtype=torch.float8_e4m3fn, device=table.device)
    scales = torch.empty(count, dtype=torch.float32, device=table.device)
    if count:
        _read_keys[(triton.cdiv(count, 4 * _READ),)](
            *store.planes, table[slot], data if store.packed else data.view(torch.uint8), scales, count, width,
            store.per, 4 * _READ, store.packed, **options(data, 4),
        )  # fmt: skip
    return data, scales


@triton.jit(do_not_specialize=["FIRST", "COUNT"])
def _read_rows(
    codes, rope, scales, table, out, FIRST, COUNT, FRONT: tl.constexpr, FB: tl.constexpr, ROPE: tl.constexpr,
    RB: tl.constexpr, S: tl.constexpr, PER: tl.constexpr, B: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * B + tl.arange(0, B)
    real = n < COUNT
    rc, rr, rs = tl.arange(0, FB), tl.arange(0, RB), tl.arange(0, FB // 64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    page = tl.load(table + (FIRST + n) // PER, mask=real, other=0).to(tl.int64)
    row = page * PER + (FIRST + n) % PER
    front = real[:, None] & (rc < FRONT)[None, :]
    code = tl.load(codes + row[:, None] * (FRONT + 2 * ROPE) + rc[None, :], mask=front, other=0.0).to(tl.float32)
    power = tl.load(scales + row[:, None] * S + rs[None, :], mask=real[:, None] & (rs * 64 < FRONT)[None, :], other=0)
    values = tl.reshape(tl.reshape(code, (B, FB // 64, 64)) * from_e8m0(power)[:, :, None], (B, FB))
    place = out + n.to(tl.int64)[:, None] * (FRONT + ROPE)
    tl.store(place + rc[None, :], values.to(tl.bfloat16), mask=front)
    back = real[:, None] & (rr < ROPE)[None, :]
    end = tl.load(rope + row[:, None] * (FRONT // 2 + ROPE) + FRONT // 2 + rr[None, :], mask=back, other=0.0)
    tl.store(place + FRONT + rr[None, :], end, mask=back)


@triton.jit(do_not_specialize=["COUNT"])
def _read_keys(
    data, scales, table, out, out_scales, COUNT, D: tl.constexpr, PER: tl.constexpr, B: tl.constexpr,
    PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * B + tl.arange(0, B)
    real = n < COUNT
    rd = tl.arange(0, D)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    page = tl.load(table + n // PER, mask=real, other=0).to(tl.int64)
    row = page * PER + n % PER
    place = out + n.to(tl.int64)[:, None] * D + rd[None, :]
    if PACKED:
        rh, rs = tl.arange(0, D // 2), tl.arange(0, D // 32)
        code = tl.load(data + row[:, None] * (D // 2) + rh[None, :], mask=real[:, None], other=0).to(tl.int32)
        scale = from_e8m0(tl.load(scales + row[:, None] * (D // 32) + rs[None, :], mask=real[:, None], other=127))
        x = tl.reshape(tl.join(_e2m1(code & 15), _e2m1(code >> 4)), (B, D // 32, 32))
        x = tl.reshape(x * scale[:, :, None], (B, D))
        one = _one_scale(x)
        tl.store(place, (x * inverse_pow2(one)[:, None]).to(tl.float8e4nv), mask=real[:, None])
    else:
        tl.store(place, tl.load(data + row[:, None] * D + rd[None, :], mask=real[:, None], other=0), mask=real[:, None])
        one = tl.load(scales + row, mask=real, other=1.0)
    tl.store(out_scales + n, one, mask=real)
