"""The attention of a step in clusters, against its reference, alone and in company."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fathom.config import FLASH
from fathom.engine.device_cache import DeviceCache
from fathom.kernels import decode
from fathom.kernels.decode import Memory, Tokens
from fathom.kernels.testing import error, poisoned

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import attend_cuda, quant_triton

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
TOLERANCE = 4e-3


def memory_of(ratio: int, slots: int, context: int) -> Memory:
    """Random rows on random pages."""
    layers = FLASH.num_hidden_layers + FLASH.num_nextn_predict_layers
    config = replace(FLASH, compress_ratios=(ratio,) + (0,) * (layers - 1))
    pages = context // 128
    cache = DeviceCache(config, slots, slots * pages, context, DEVICE)
    order = random.Random(1).sample(range(slots * pages), slots * pages)
    for slot in range(slots):
        cache.bind(slot, order[slot * pages : (slot + 1) * pages])
    memory, g = cache.layers[0], torch.Generator(DEVICE).manual_seed(ratio)
    for rows in (memory.window, memory.entries):
        if rows is not None:
            for first in range(0, rows.data.shape[0], 256):
                part = rows.data[first : first + 256]
                values = torch.randn(*part.shape[:2], rows.width, generator=g, device=DEVICE).bfloat16()
                data, scales = rows.pack(values)
                part.copy_(data)
                rows.scales[first : first + 256].copy_(scales)
    return memory


def tokens_of(slots: list[int], positions: list[int]) -> Tokens:
    there = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (slots, positions))
    return Tokens.at(*there, *(torch.rand(2, 32, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))))


def chosen_of(positions: list[int], memory: Memory) -> Tensor | None:
    if memory.ratio != 4:
        return None
    rng, rows = random.Random(2), []
    for slot, position in enumerate(positions):
        seen = (position + 1) // 4
        some = sorted(rng.sample(range(seen), min(seen, FLASH.index_topk)))
        place = [int(memory.table[slot, i // 32]) * 32 + i % 32 for i in some]
        rows.append(place + [-1] * (FLASH.index_topk - len(place)))
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@torch.inference_mode()
@pytest.mark.parametrize("heads", [32, 24, 64])
@pytest.mark.parametrize(("ratio", "context"), [(0, 1024), (4, 4096), (128, 4096), (128, 1 << 17), (128, 1 << 20)])
def test_rows_of_all_kinds(ratio: int, context: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = [0, 31, 126, 127, 128, 511, context // 2 - 1, context - 1]
    memory, slots = memory_of(ratio, len(positions), context), list(range(len(positions)))
    tokens, chosen = tokens_of([*slots, -1], [*positions, 0]), chosen_of([*positions, 0], memory)
    g = torch.Generator(DEVICE).manual_seed(heads)
    q = torch.randn(len(positions) + 1, heads, 512, generator=g, device=DEVICE).bfloat16()
    sink = torch.randn(heads, generator=g, device=DEVICE)
    with poisoned():
        got = attend_cuda.attend(q, sink, tokens, memory, context, chosen)
    with monkeypatch.context() as patch:
        patch.setattr("fathom.kernels.dispatch.on", lambda device: False)
        want = decode.attend(q, sink, tokens, memory, context, chosen)
    assert error(got[:-1], want[:-1]) < TOLERANCE
    assert got.isfinite().all()
    values, scales = quant_triton.halves(got) or (got, got)
    assert torch.equal((values.float().unflatten(-1, (-1, 64)) * scales.unsqueeze(-1)).flatten(-2), got.float())
    for i in random.Random(heads).sample(slots, 3):
        one = tokens_of([i], [positions[i]])
        alone = attend_cuda.attend(
            q[i : i + 1], sink, one, memory, context, None if chosen is None else chosen[i : i + 1]
        )
        assert torch.equal(alone[0], got[i])
    if ratio != 4:
        part = slots[:6]
        fewer = attend_cuda.attend(q[:6], sink, tokens_of(part, positions[:6]), memory, 1024, None)
        assert torch.equal(fewer, got[:6]), "the longest sequence that is allowed changes nothing"
