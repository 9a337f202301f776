"""A step's stores, choice and attention by kernels, against their references from the same memory."""

from __future__ import annotations

import random
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fathom.config import WEIGHTS, ModelConfig, preset
from fathom.engine.device_cache import DeviceCache
from fathom.kernels import decode, store
from fathom.kernels.decode import Memory, Tokens
from fathom.kernels.store import Norms, Pooling, Projected
from fathom.kernels.testing import INTERPRETED, device, error, poisoned
from fathom.model.rope import frequencies

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)
from fathom.kernels import attend_triton, index_triton, store_cuda, store_triton, stored_triton  # noqa: E402

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
TOLERANCE, COARSE = 0.03, 0.1
"""Relative, of e4m3 and FP4 values: a last bit of float32 (the interpreter cuts BF16 off) now and then turns one."""
CONTEXT, SLOTS = 768, 3
SIZES = ["small"] if INTERPRETED else ["small", "flash"]
MODULES = [store_triton] if INTERPRETED else [store_triton, store_cuda]


def config_of(size: str) -> ModelConfig:
    return replace(ModelConfig.load(WEIGHTS / "small"), index_topk=16) if size == "small" else preset("flash")


class Layer:
    """Random weights and a random past: two copies of one layer's memory, for a kernel and for its reference."""

    def __init__(self, seed: int, ratio: int, size: str = "small", packed: bool = False) -> None:
        c = config_of(size)
        count = c.num_hidden_layers + c.num_nextn_predict_layers
        self.config = replace(c, compress_ratios=(ratio,) + (0,) * (count - 1))
        self.g, self.ratio = torch.Generator().manual_seed(seed), ratio
        self.ours, self.theirs = (self._memory(packed) for _ in range(2))
        for mine, other in zip(planes(self.ours), planes(self.theirs), strict=True):
            mine.copy_(self._filled(mine))
            other.copy_(mine)
        wide = (2 if ratio == 4 else 1) * c.head_dim
        pooling = [Pooling(self.rand(ratio, wide), self.rand(c.head_dim).bfloat16())] if ratio else []
        if ratio == 4:
            pooling.append(Pooling(self.rand(4, 2 * c.index_head_dim), self.rand(c.index_head_dim).bfloat16()))
        self.norms = Norms(self.rand(c.head_dim).bfloat16(), c.rms_norm_eps, *pooling)

    def _memory(self, packed: bool) -> Memory:
        cache = DeviceCache(self.config, SLOTS, 20, CONTEXT, DEVICE, packed)
        order = random.Random(1).sample(range(20), 18)
        for slot in range(SLOTS):
            cache.bind(slot, order[6 * slot : 6 * slot + 6])
        return cache.layers[0]

    def _filled(self, like: Tensor) -> Tensor:
        """Bytes of rows are finite e4m3 and BF16, scales near one."""
        if like.dtype == torch.float32:
            return self.rand(*like.shape).abs() if like.shape[-1] == 1 else self.rand(*like.shape)
        scale = like.shape[-1] <= 8
        low, high = (124, 130) if scale else (0, 64)
        return torch.randint(low, high, like.shape, generator=self.g, dtype=torch.uint8)

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g).to(DEVICE)

    def made(self, count: int) -> Projected:
        c, entries = self.config, None
        q, kv = self.rand(count, c.num_attention_heads, c.head_dim).bfloat16(), self.rand(count, c.head_dim).bfloat16()
        if not self.ratio:
            return Projected(q, kv)
        entries = self.rand(count, 2 * (2 if self.ratio == 4 else 1) * c.head_dim)
        if self.ratio != 4:
            return Projected(q, kv, entries)
        index_q = self.rand(count, c.index_n_heads, c.index_head_dim).bfloat16()
        return Projected(q, kv, entries, index_q, self.rand(count, 4 * c.index_head_dim))

    def tokens(self, slots: list[int], positions: list[int]) -> Tokens:
        c = self.config
        freqs = (
            frequencies(c.qk_rope_head_dim, theta, scaling).to(DEVICE)
            for theta, scaling in ((c.rope_theta, None), (c.compress_rope_theta, c.rope_scaling))
        )
        there = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (slots, positions))
        return Tokens.at(*there, *freqs)

    def check(self) -> None:
        """The two memories hold the same, but for roundings."""
        for kind in ("window", "entries", "keys"):
            mine, other = getattr(self.ours, kind), getattr(self.theirs, kind)
            if mine is not None:
                everything = torch.arange(mine.data.shape[0] * mine.per, device=DEVICE)
                far = error(mine.read(everything), other.read(everything))
                assert far < (COARSE if kind == "keys" else TOLERANCE), kind
        for mine, other in ((self.ours.tail, self.theirs.tail), (self.ours.key_tail, self.theirs.key_tail)):
            assert mine is None or torch.equal(mine, other)


def planes(memory: Memory) -> list[Tensor]:
    stores = [s for s in (memory.window, memory.entries, memory.keys) if s is not None]
    return [p for s in stores for p in s.planes] + [t for t in (memory.tail, memory.key_tail) if t is not None]


@torch.inference_mode()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ops", MODULES)
@pytest.mark.parametrize(("ratio", "packed"), [(0, False), (4, False), (4, True), (128, False)])
def test_a_step(ratio: int, packed: bool, ops: ModuleType, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(ratio + packed, ratio, size, packed)
    positions = [131, 127, 511] if ratio == 128 else [3, 254, 511]
    for _ in range(2):
        made, tokens = layer.made(4), layer.tokens([2, 0, 1, -1], [*positions, 0])
        with poisoned():
            q, index_q = ops.prepare(made, tokens, layer.ours, layer.norms)
        with monkeypatch.context() as patch:
            patch.setattr("fathom.kernels.dispatch.on", lambda device: False)
            want, index_want = store.prepare(made, tokens, layer.theirs, layer.norms)
        assert error(q[:3], want[:3]) < TOLERANCE
        layer.check()
        chosen = None
        if index_q is not None:
            assert error(index_q[:3], index_want[:3]) < COARSE
            weights = layer.rand(4, layer.config.index_n_heads).bfloat16()
            chosen = decode.select(index_want, weights, tokens, layer.theirs, layer.config.index_topk, CONTEXT)
            ours = index_triton.select(index_want, weights, tokens, layer.theirs, layer.config.index_topk, CONTEXT)
            for mine, other in zip(ours[:3].tolist(), chosen[:3].tolist(), strict=True):
                assert len({*mine} & {*other}) >= 0.9 * len({*other}), "scores are summed in another order, no more"
        sink = layer.rand(layer.config.num_attention_heads)
        with poisoned():
            out = attend_triton.attend(want, sink, tokens, layer.theirs, CONTEXT, chosen)
        assert error(out[:3], decode.attend(want, sink, tokens, layer.theirs, CONTEXT, chosen)[:3]) < TOLERANCE
        positions = [p + 1 for p in positions]


@torch.inference_mode()
@pytest.mark.skipif(INTERPRETED, reason="CUDA C++")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("ratio", "packed"), [(0, False), (4, False), (4, True), (128, False)])
def test_a_token_has_the_same_bits_alone(ratio: int, packed: bool, size: str) -> None:
    """Of 32: sequences with drafts, which close blocks of both kinds, and padding; at once, and one after the other."""
    layer = Layer(20 + ratio + packed, ratio, size, packed)
    slots = [slot for slot in (1, 0, 2) for _ in range(8)] + [-1] * 8
    positions = [first + i for first in (124, 252, 0) for i in range(8)] + [0] * 8
    made, tokens = layer.made(32), layer.tokens(slots, positions)
    with poisoned():
        together = store_cuda.prepare(made, tokens, layer.ours, layer.norms)
        for i in range(32):
            own = Tokens(tokens.slots[i : i + 1], tokens.positions[i : i + 1], tokens.turns[:, i : i + 1].contiguous())
            alone = store_cuda.prepare(made.rows(i, i + 1), own, layer.theirs, layer.norms)
            for one, of_all in zip(alone, together, strict=True):
                assert one is None or torch.equal(one[0], of_all[i])
    for mine, other in zip(planes(layer.ours), planes(layer.theirs), strict=True):
        assert torch.equal(mine, other)


@torch.inference_mode()
@pytest.mark.parametrize(("ratio", "packed"), [(0, False), (4, False), (4, True), (128, False)])
def test_pieces_of_prompts(ratio: int, packed: bool) -> None:
    layer = Layer(10 + ratio + packed, ratio, "small", packed)
    spans = [(0, 200, 41), (2, 0, 9)] if INTERPRETED else [(0, 200, 300), (2, 0, 9), (1, 384, 128)]
    count = sum(n for _, _, n in spans) + 3
    slots = [slot for slot, _, n in spans for _ in range(n)] + [-1] * 3
    positions = [p for _, start, n in spans for p in range(start, start + n)] + [0] * 3
    made, tokens = layer.made(count), layer.tokens(slots, positions)
    with poisoned():
        got = store_triton.enter(made, tokens, layer.ours, layer.norms)
    want = store.enter(made, tokens, layer.theirs, layer.norms)
    for mine, other in zip(got, want, strict=True):
        assert mine is None or error(mine[:-3], other[:-3]) < COARSE
    first = 0
    for slot, start, n in spans:
        before = (slot, max(0, start - 127), min(start, 127))
        rows = stored_triton.recent(layer.ours.window, *before)
        assert error(rows, store.recent(layer.ours.window, *before)) < 1e-6
        assert store_triton.remember(made, tokens, layer.ours, layer.norms, first, first + n, start + n) is None
        store.remember(made, tokens, layer.theirs, layer.norms, first, first + n, start + n)
        first += n
    layer.check()
