"""The floors of `fathom bench` are those that were computed apart from it for V4-Flash on two H200s."""

from __future__ import annotations

import pytest

from fathom.cli.bench_floor import (
    all_reduce_seconds,
    distinct_experts,
    kept_bytes,
    prompt_seconds,
    read_rows,
    step_bytes,
)
from fathom.config import FLASH
from fathom.engine.device_cache import DeviceCache
from fathom.parallel.plan import rank_config

MILLION = 1 << 20
HALF = rank_config(FLASH, 2)


def test_bytes_of_a_step() -> None:
    assert step_bytes(FLASH, 4096, 1).always == pytest.approx(7.76e9, rel=2e-3)
    assert step_bytes(FLASH, 4096, 1).experts == pytest.approx(43 * 6 * 13.37e6, rel=1e-3)
    assert distinct_experts(FLASH, 8) == pytest.approx(44.2, abs=0.1)
    rows = [read_rows(FLASH, n, fp8) for fp8 in (True, False) for n in (4096, 131072, MILLION)]
    assert rows == pytest.approx([12.7e6, 112e6, 832e6, 11.3e6, 68e6, 480e6], rel=4e-3)


@pytest.mark.parametrize(
    ("context", "batch", "fp8", "ms"),
    [(4096, 1, True, 1.46), (MILLION, 1, True, 1.65), (MILLION, 1, False, 1.57), (131072, 32, True, 11.0)],
)
def test_one_rank_of_two(context: int, batch: int, fp8: bool, ms: float) -> None:
    floor = 1e3 * step_bytes(HALF, context, batch, tp=2, fp8_keys=fp8).seconds
    assert floor == pytest.approx(ms, abs=0.011)


@pytest.mark.parametrize(("tokens", "rate"), [(4096, 105e3), (131072, 83e3), (MILLION, 32.6e3)])
def test_a_prompt_over_two_gpus(tokens: int, rate: float) -> None:
    """Both GPUs together do the whole model's work once."""
    assert 2 * tokens / prompt_seconds(FLASH, tokens) == pytest.approx(rate, rel=0.03)


def test_all_reduces() -> None:
    assert all_reduce_seconds(FLASH, 1) == pytest.approx(86 * 6.3e-6)
    assert all_reduce_seconds(FLASH, 8192) == pytest.approx(86 * 67.1e6 / 245e9, rel=0.03)


@pytest.mark.parametrize("fp8", [True, False])
def test_a_sequence_of_a_million_tokens_in_the_cache(fp8: bool) -> None:
    """Pages and a slot as the cache allocates them, within 5 % of accounting: a tenth or less of DeepSeek-V3.2's."""
    cache = DeviceCache(FLASH, 1, MILLION // 128, MILLION, "meta", packed_keys=not fp8)
    held = cache.pages * cache.page_bytes + cache.slots * cache.slot_bytes
    counted, other = kept_bytes(FLASH, MILLION, fp8)
    assert counted <= held <= 1.05 * counted
    assert other / MILLION == pytest.approx(48_068)
    assert held < (0.1 if fp8 else 0.0925) * other
