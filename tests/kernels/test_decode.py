"""A decode step over the device's memory against the model's own path, token by token over a contiguous cache."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.accounting import kv_bytes, v32_kv_bytes
from fathom.config import ModelConfig, preset
from fathom.engine.device_cache import DeviceCache
from fathom.errors import ContextError
from fathom.kernels import decode, quant
from fathom.kernels.decode import Memory, Tokens
from fathom.kernels.store import Norms, Pooling, Projected, prepare
from fathom.kernels.stored import Keys, Rows
from fathom.model.attention import Attention
from fathom.model.batch import Batch, Span
from fathom.model.cache import ContiguousCache
from fathom.model.layers import Numerics, both
from fathom.model.rope import frequencies
from fathom.model.step import Step
from tests import oracle

NUMERICS = Numerics(torch.bfloat16, quantize=True)
CONTEXT = 1664
SLOTS = 4
EDGES = (0, 2, 3, 6, 120, 124, 127, 128, 131, 250, 255, 258, 380, 511, 512, 1020, 1150, 1530)
TOLERANCE = 0.01
"""Relative, of the attention's output: the model's path rounds every logit to BF16, this one none."""


def build(seed: int, ratio: int, **fixed: Any) -> tuple[ModelConfig, Attention]:
    shape = {"head_dim": 192, "qk_rope_head_dim": 64, "num_attention_heads": 4, "index_n_heads": 32, "index_topk": 8}
    raw = oracle.draw_config(seed, blocked=True, num_hidden_layers=1, compress_ratios=[ratio, 0], **{**shape, **fixed})
    model = oracle.our_model(raw, oracle.draw_weights(raw, seed), NUMERICS).to(torch.bfloat16)
    return model.config, model.layers[0].attn


def rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


class Twin:
    """One layer, its sequences held twice: contiguously, and as a device holds them, in pages placed at random."""

    def __init__(self, seed: int, ratio: int, packed: bool = False, **fixed: Any) -> None:
        self.config, self.layer = build(seed, ratio, **fixed)
        self.g, self.rng, self.ratio = torch.Generator().manual_seed(seed), random.Random(seed), ratio
        self.contiguous = ContiguousCache(self.config, NUMERICS, SLOTS, CONTEXT)
        pages = SLOTS * CONTEXT // 128
        self.device = DeviceCache(self.config, SLOTS, pages + 3, CONTEXT, "cpu", packed)
        self.memory = self.device.layers[0]
        order = self.rng.sample(range(pages + 3), pages)
        for slot in range(SLOTS):
            self.device.bind(slot, order[slot::SLOTS])

    def place(self, slot: int, entry: int) -> Tensor:
        per = 128 // self.ratio
        return decode.page_rows(self.memory.table, torch.tensor([slot]), torch.tensor([entry]), per)[0]

    def fill(self, slot: int, position: int) -> None:
        """What a sequence that stands at `position` has left behind, the same random rows in both."""
        c, state = self.config, self.contiguous.layer(0)
        first = max(0, position - c.sliding_window - 8)
        at = torch.arange(first, position)
        rows = self._rows(self.memory.window, slot * self.memory.window.per + at % self.memory.window.per, c.head_dim)
        state.recents["window"].put(slot, first, rows)
        kinds = (
            ("compressor", self.memory.tail, self.memory.entries),
            ("indexer", self.memory.key_tail, self.memory.keys),
        )
        for name, tail, store in kinds:
            if tail is None or store is None:
                continue
            tail[slot, at % tail.shape[1]] = values = rand(self.g, position - first, tail.shape[2])
            state.recents[name].put(slot, first, values)
            count = position // self.ratio
            if count:
                index = torch.cat([self.place(slot, e) for e in range(count)])
                state.stores[name][slot, :count] = self._rows(store, index, store.width)

    def _rows(self, store: Rows | Keys, index: Tensor, width: int) -> Tensor:
        """New random rows at `index`, and their values."""
        new = rand(self.g, len(index), width).bfloat16()
        for plane, packed in zip(store.planes, store.pack(new), strict=True):
            plane.flatten(0, 1)[index] = packed
        return store.read(index)

    def expected(self, x: Tensor, slot: int, position: int) -> tuple[Tensor, Tensor | None]:
        """What the model attends to for one token [1, H, C], and what its indexer kept."""
        kept: list[Tensor] = []
        seen: list[Tensor] = []
        hooks = [self.layer.wo_a.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
        if self.ratio == 4:
            hooks.append(self.layer.indexer.register_forward_hook(lambda *args: kept.append(args[2])))
        step = Step(
            self.config, torch.zeros(1, dtype=torch.long), Batch.step([Span(position, 1, slot)]), torch.bfloat16
        )
        self.layer(x, step, self.contiguous.layer(0))
        for hook in hooks:
            hook.remove()
        return seen[0].reshape(1, self.config.num_attention_heads, -1), kept[0] if kept else None

    def tokens(self, slots: list[int], positions: list[int]) -> Tokens:
        c = self.config
        freqs = (
            frequencies(c.qk_rope_head_dim, theta, scaling)
            for theta, scaling in ((c.rope_theta, None), (c.compress_rope_theta, c.rope_scaling))
        )
        return Tokens.at(torch.tensor(slots, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32), *freqs)

    def step(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The same of the device's path, for all tokens at once."""
        a, n = self.layer, NUMERICS
        operand = n.operand(x)
        latent = n.operand(a.q_norm(a.wq_a(operand)))
        q = a.wq_b(latent).unflatten(-1, (self.config.num_attention_heads, self.config.head_dim))
        projected = index_q = index_projected = chosen = None
        pooling: list[Pooling] = []
        if self.ratio:
            projected = both(x.float(), a.compressor.wkv, a.compressor.wgate)
            pooling.append(Pooling(a.compressor.ape, a.compressor.norm.weight))
        if self.ratio == 4:
            i = a.indexer
            index_q = i.wq_b(latent).unflatten(-1, (i.heads, i.dim))
            index_projected = both(x.float(), i.compressor.wkv, i.compressor.wgate)
            pooling.append(Pooling(i.compressor.ape, i.compressor.norm.weight))
        norms = Norms(a.kv_norm.weight, self.config.rms_norm_eps, *pooling)
        made = Projected(q, a.wkv(operand), projected, index_q, index_projected)
        q, index_q = prepare(made, tokens, self.memory, norms)
        if index_q is not None:
            weights = a.indexer.weights_proj(x)
            self.scored = index_q, weights
            chosen = decode.select(index_q, weights, tokens, self.memory, self.config.index_topk, CONTEXT)
        return decode.attend(q, a.attn_sink, tokens, self.memory, CONTEXT, chosen), chosen

    def check_rows(self, slot: int, position: int) -> None:
        """What a token left behind is the same, bit for bit."""
        state, m = self.contiguous.layer(0), self.memory
        got = m.window.read(torch.tensor(slot * m.window.per + position % m.window.per))
        assert torch.equal(got, state.recents["window"].take(slot, position, position + 1)[0])
        for name, tail, store in (("compressor", m.tail, m.entries), ("indexer", m.key_tail, m.keys)):
            if tail is None or store is None:
                continue
            kept = state.recents[name].take(slot, position, position + 1)[0]
            assert torch.equal(tail[slot, position % tail.shape[1]], kept)
            for entry in {position // self.ratio - 1, (position + 1) // self.ratio - 1} - {-1}:
                assert torch.equal(store.read(self.place(slot, entry))[0], state.stores[name][slot, entry])


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(
    ("seed", "ratio", "packed", "fixed"),
    [
        (1, 0, False, {"sliding_window": 128}),
        (2, 0, False, {"sliding_window": 16, "head_dim": 128}),
        (3, 4, False, {"sliding_window": 128}),
        (4, 4, True, {"sliding_window": 64, "index_head_dim": 128}),
        (5, 4, False, {"sliding_window": 128, "head_dim": 128, "index_topk": 512}),
        (6, 128, False, {"sliding_window": 128}),
        (7, 128, False, {"sliding_window": 150, "head_dim": 128}),
    ],
)
def test_a_step_equals_the_model(seed: int, ratio: int, packed: bool, fixed: dict[str, Any]) -> None:
    twin = Twin(seed, ratio, packed, **fixed)
    agreed = total = 0
    for _ in range(4):
        slots = twin.rng.sample(range(SLOTS), twin.rng.randint(1, SLOTS))
        positions = [twin.rng.choice(EDGES) for _ in slots]
        for slot, position in zip(slots, positions, strict=True):
            twin.fill(slot, position)
        for _ in range(5):
            x = rand(twin.g, len(slots), twin.config.hidden_size).bfloat16()
            out, chosen = twin.step(x, twin.tokens(slots, positions))
            for b, (slot, position) in enumerate(zip(slots, positions, strict=True)):
                want, kept = twin.expected(x[b : b + 1], slot, position)
                twin.check_rows(slot, position)
                total += 1
                if kept is not None and chosen is not None:
                    rows = torch.cat([twin.place(slot, e) for e in kept[0].nonzero().flatten().tolist()])
                    if rows.tolist() != [r for r in chosen[b].tolist() if r >= 0]:
                        continue
                agreed += 1
                assert relative(out[b : b + 1], want) < TOLERANCE
            positions = [p + 1 for p in positions]
    assert agreed >= 0.8 * total, "the model's path rounds scores to BF16, but seldom turns the choice"


def test_the_choice_is_that_of_exact_scores() -> None:
    twin = Twin(11, 4)
    for position in (40, 700, 1663):
        twin.fill(1, position)
        tokens = twin.tokens([1], [position])
        _, chosen = twin.step(rand(twin.g, 1, twin.config.hidden_size).bfloat16(), tokens)
        (q, weights), n = twin.scored, (position + 1) // 4
        rows = torch.cat([twin.place(1, e) for e in range(n)])
        keys = twin.memory.keys.read(rows).double()
        scale = (weights * (q.shape[2] ** -0.5 * q.shape[1] ** -0.5)).double()
        scores = (q[0].double() @ keys.T).relu().T @ scale[0]
        best = scores.topk(min(8, n)).indices.sort().values
        assert chosen[0, : len(best)].tolist() == rows[best].tolist()


def test_equal_scores_go_to_the_earlier_entry_and_few_are_all_kept() -> None:
    twin = Twin(12, 4)
    twin.fill(0, 400)
    q, weights = torch.zeros(2, 32, twin.memory.keys.width).bfloat16(), torch.ones(2, 32).bfloat16()
    twin.fill(2, 23)
    chosen = decode.select(q, weights, twin.tokens([0, 2], [399, 22]), twin.memory, 8, CONTEXT)
    assert chosen[0].tolist() == [int(twin.place(0, e)) for e in range(8)]
    assert chosen[1].tolist() == [int(twin.place(2, e)) for e in range(5)] + [-1] * 3


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("position", [123, 509])
def test_drafts_of_a_sequence_equal_single_steps(ratio: int, position: int) -> None:
    one, many = Twin(13, ratio), Twin(13, ratio)
    x = rand(torch.Generator().manual_seed(1), 8, one.config.hidden_size).bfloat16()
    one.fill(2, position)
    many.fill(2, position)
    singles = [one.step(x[i : i + 1], one.tokens([2], [position + i]))[0] for i in range(8)]
    together, _ = many.step(x, many.tokens([2] * 8, list(range(position, position + 8))))
    assert torch.equal(one.memory.window.data, many.memory.window.data)
    assert torch.equal(one.memory.entries.data, many.memory.entries.data)
    assert relative(together, torch.cat(singles)) < 1e-3


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_padding_stores_nothing(ratio: int) -> None:
    twin = Twin(14, ratio)
    for slot in range(SLOTS):
        twin.fill(slot, 511)
    before = [t.clone() for t in planes(twin.memory)]
    x = rand(twin.g, 3, twin.config.hidden_size).bfloat16()
    out, _ = twin.step(x, twin.tokens([1, -1, -1], [511, 0, 0]))
    assert out[0].isfinite().all()
    for old, new in zip(before, planes(twin.memory), strict=True):
        share = len(new) // SLOTS
        changed = set((old != new).flatten(1).any(1).nonzero().flatten().tolist())
        assert changed <= ({1} if share == 1 else {int(twin.memory.table[1, 3])})


def planes(memory: Memory) -> list[Tensor]:
    stores = [s for s in (memory.window, memory.entries, memory.keys) if s is not None]
    return [p for s in stores for p in s.planes] + [t for t in (memory.tail, memory.key_tail) if t is not None]


class _NoHost(TorchDispatchMode):
    """Refuses what would make the host wait for data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "unique")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_nothing_waits_for_the_host(ratio: int) -> None:
    twin = Twin(15, ratio)
    x, tokens = rand(twin.g, 2, twin.config.hidden_size).bfloat16(), twin.tokens([1, 2], [5, 9])
    with _NoHost():
        twin.step(x, tokens)


def test_stored_forms_lose_nothing_of_what_the_model_rounds() -> None:
    g = torch.Generator().manual_seed(3)
    x = (rand(g, 200, 192) * torch.logspace(-8, 3, 200).unsqueeze(1)).bfloat16()
    rows = Rows.empty(200, 1, 192, 64, torch.device("cpu"))
    assert [p.shape[2] for p in rows.planes] == [128 + 128, 8]
    for plane, packed in zip(rows.planes, rows.pack(x), strict=True):
        plane[:, 0] = packed
    assert torch.equal(rows.read(torch.arange(200)), NUMERICS.row(x, 64))
    for packed, size in ((True, 68), (False, 132)):
        keys = Keys.empty(200, 1, 128, packed, torch.device("cpu"))
        assert sum(p.shape[2] * p.element_size() for p in keys.planes) == size
        for plane, new in zip(keys.planes, keys.pack(x[:, :128]), strict=True):
            plane[:, 0] = new
        assert torch.equal(keys.read(torch.arange(200)), quant.fp4_sim(x[:, :128]))


def test_bytes_are_those_of_the_accounting() -> None:
    config, context = preset("flash"), 1 << 20
    for packed, most in ((True, 0.076), (False, 0.083)):
        cache = DeviceCache(config, 1, context // 128, context, "meta", packed)
        assert cache.page_bytes == 128 * (21 * (584 + (68 if packed else 132)) // 4) + 20 * 584
        assert (
            cache.total_bytes == sum(t.numel() * t.element_size() for m in cache.layers for t in planes(m)) + 4 * 8192
        )
        assert cache.total_bytes <= most * v32_kv_bytes(context)
        if packed:
            assert cache.total_bytes >= kv_bytes(config, context)
    with pytest.raises(ContextError, match="more than this cache"):
        DeviceCache(config, 1, 8, 1024, "meta").bind(0, list(range(9)))
