"""A cache as if the context had been computed: random rows, keys and tails of usual sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fathom.engine.device_cache import DeviceCache

_PART = 1 << 16
"""Index keys that are made at a time."""


def filled(cache: DeviceCache) -> DeviceCache:
    """Random rows, keys and tails of usual sizes in every place; index scores are all distinct."""
    for memory in cache.layers:
        for rows in (memory.window, memory.entries):
            if rows is not None:
                _fill_rows(rows.data, rows.scales, rows.rope)
        for tail in (memory.tail, memory.key_tail):
            if tail is not None:
                tail.normal_()
        if memory.keys is not None:
            _fill_keys(memory.keys)
    return cache


def _fill_rows(data: torch.Tensor, scales: torch.Tensor, rope: int) -> None:
    """e4m3 below the half of its exponents, so no NaN, under scales that make values of about one; BF16 rope dims."""
    import torch

    front = data.shape[-1] - 2 * rope
    data.random_(0, 256).bitwise_and_(0b1011_1111)
    data[..., front:].view(torch.bfloat16).normal_()
    scales.random_(126, 129)


def _fill_keys(keys: Any) -> None:
    import torch

    planes = [plane.flatten(0, 1) for plane in keys.planes]
    for at in range(0, len(planes[0]), _PART):
        count = min(_PART, len(planes[0]) - at)
        values = torch.randn(count, keys.width, device=planes[0].device)
        for plane, new in zip(planes, keys.pack(values), strict=True):
            plane[at : at + count] = new
