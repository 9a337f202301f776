"""The paged cache against the contiguous one, and stored forms against the rows they came from: all bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom import accounting
from fathom.config import WEIGHTS, ModelConfig
from fathom.engine.cache import PagedCache
from fathom.engine.rows import IndexKey, KeyValueRow
from fathom.errors import ContextError
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from tests import oracle
from tests.oracle import Session

PAGE = 128
LENGTH, PROMPT = 534, 530
BASE: dict[str, Any] = {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4, 0], "index_topk": 8}
SETTINGS = [
    (False, Numerics(), {"sliding_window": 150}),
    (False, Numerics(), {"sliding_window": 5, "compress_ratios": [128, 128, 0, 0, 0]}),
    (True, Numerics(quantize=True), {"sliding_window": 128}),
    (True, Numerics(torch.bfloat16, quantize=True), {"sliding_window": 64}),
    (True, Numerics(torch.bfloat16), {"sliding_window": 16}),
]


def build(seed: int, blocked: bool, numerics: Numerics, fixed: dict[str, Any]) -> Transformer:
    config = oracle.draw_config(seed, blocked=blocked, **{**BASE, **fixed})
    model = oracle.our_model(config, oracle.draw_weights(config, seed), numerics)
    return model if numerics.dtype == torch.float32 else model.to(torch.bfloat16)


def paged(model: Transformer, slots: int, pages: int, drafts: bool = False) -> Session:
    session = Session(model, slots)
    session.cache = PagedCache(model.config, model.numerics, slots, pages, drafts=drafts)
    return session


def run(session: Session, slot: int, ids: list[int], prompt: int) -> Tensor:
    """From where the slot stands: the prompt in tiles, then token by token -> streams of what was computed."""
    out = []
    while (at := session.length[slot]) < len(ids):
        end = min(at - at % PAGE + PAGE, prompt) if at < prompt else at + 1
        out.append(session.streams({slot: ids[at:end]})[slot])
    return torch.cat(out)


def drawn(model: Transformer, seed: int, count: int = LENGTH) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=g).tolist()


@pytest.mark.parametrize(("blocked", "numerics", "fixed"), SETTINGS)
def test_pages_in_any_order_give_the_rows_of_the_contiguous_cache(
    blocked: bool, numerics: Numerics, fixed: dict[str, Any]
) -> None:
    model = build(3, blocked, numerics, fixed)
    ids = drawn(model, 1)
    want = run(Session(model), 0, ids, PROMPT)
    for pages in ([3, 4, 5, 6, 7], [4, 5, 9, 2, 0]):
        session = paged(model, 3, 12)
        session.cache.bind(2, pages)
        assert torch.equal(run(session, 2, ids, PROMPT), want), pages


@pytest.mark.parametrize(("blocked", "numerics", "fixed"), SETTINGS)
def test_from_stored_blocks_and_a_state_everything_goes_on_as_it_was(
    blocked: bool, numerics: Numerics, fixed: dict[str, Any]
) -> None:
    """Also taken late, when the sequence is already up to 128 tokens further, and into a slot that others used."""
    model, rng = build(4, blocked, numerics, fixed), random.Random(5)
    ids = drawn(model, 2)
    session = paged(model, 2, 40)
    cold, warm = list(range(5)), rng.sample(range(5, 40), 5)
    session.cache.bind(0, cold)
    want, states = [], {}
    for end in [*range(PAGE, PROMPT, PAGE), PROMPT]:
        want.append(run(session, 0, ids[:end], PROMPT))
        at = end - end % PAGE - (PAGE if end in (384, PROMPT) else 0)
        assert session.cache.holds(0, at)
        states[at] = session.cache.state(0, at)
        assert len(states[at]) == session.cache.state_bytes(at)
    streams = torch.cat([*want, run(session, 0, ids, PROMPT)])
    for at, state in states.items():
        n = at // PAGE
        session.cache.bind(1, warm)
        session.length[1] = 0
        run(session, 1, drawn(model, at, 300), 300)
        blocks = session.cache.blocks(cold[:n])
        session.cache.load_blocks(warm[:n], blocks)
        session.cache.load_state(1, at, state)
        assert session.cache.blocks(warm[:n]) == blocks and session.cache.state(1, at) == state
        session.length[1] = at
        assert torch.equal(run(session, 1, ids, PROMPT), streams[at:]), at


def test_the_window_of_the_prediction_block_is_part_of_a_state() -> None:
    model = build(6, True, Numerics(quantize=True), {"sliding_window": 128})
    ids = drawn(model, 3, 400)
    session = paged(model, 2, 8, drafts=True)
    session.cache.bind(0, [0, 1, 2, 3])

    def drafted(slot: int, a: int, b: int) -> Tensor:
        return oracle.draft(session, slot, session.streams({slot: ids[a:b]})[slot], ids[a + 1 : b + 1], a)

    drafted(0, 0, 128)
    drafted(0, 128, 256)
    state = session.cache.state(0, 256)
    want = drafted(0, 256, 384)
    session.cache.bind(1, [0, 1, 5])
    session.cache.load_state(1, 256, state)
    session.length[1] = 256
    assert torch.equal(drafted(1, 256, 384), want)


def test_a_state_that_was_asked_for_too_late_is_not_there() -> None:
    model = build(3, False, Numerics(), {"sliding_window": 128})
    session = paged(model, 1, 20)
    session.cache.bind(0, list(range(20)))
    run(session, 0, drawn(model, 1, 20 * PAGE), 20 * PAGE)
    assert session.cache.holds(0, 20 * PAGE) and not session.cache.holds(0, PAGE)


def test_tokens_beyond_a_slots_pages_are_refused_before_anything_is_written() -> None:
    model = build(3, False, Numerics(), {})
    session = paged(model, 1, 4)
    session.cache.bind(0, [2])
    ids = drawn(model, 1, 200)
    want = session.streams({0: ids[:100]})[0]
    with pytest.raises(ContextError, match=r"slot 0 has 1 pages of 128 tokens, too few for 200"):
        session.streams({0: ids[100:200]})
    session.length[0] = 0
    assert torch.equal(session.streams({0: ids[:100]})[0], want)


def test_blocks_of_the_embedded_model_take_what_accounting_says() -> None:
    config = ModelConfig.load(WEIGHTS / "small")
    cache = PagedCache(config, Numerics(quantize=True), 1, 1)
    assert cache.block_bytes / PAGE == accounting.kv_bytes_per_token(config)
    windows = config.num_hidden_layers * config.sliding_window * accounting.row_bytes(config)
    overlap = accounting.layer_kinds(config)["csa"] * 4 * 2 * (config.head_dim + config.index_head_dim) * 4
    assert cache.state_bytes(4096) == windows + overlap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_on_the_grid_survives_packing(dtype: torch.dtype) -> None:
    """Rows as the model makes them, over all magnitudes, zeros of both signs and blocks that are all zero included."""
    numerics, g = Numerics(dtype, quantize=True), torch.Generator().manual_seed(7)
    x = torch.randn(4000, 192, generator=g) * torch.exp2(torch.randint(-40, 12, (4000, 1), generator=g).float())
    x = torch.where(torch.rand(x.shape, generator=g) < 0.1, -0.0, x).to(dtype)
    x[:20, :64] = 0.0
    x[20:40, 3] = 224.0 * 1.0001
    rows, form = numerics.row(x, 64), KeyValueRow(192, 64, dtype)
    assert form.size == 128 + 2 * 64 + 8
    assert torch.equal(_bits(form.unpack(form.pack(rows))), _bits(rows))
    keys = numerics.index(x[:, :128])
    form_of_keys = IndexKey(128, dtype)
    assert form_of_keys.size == 68
    assert torch.equal(_bits(form_of_keys.unpack(form_of_keys.pack(keys))), _bits(keys))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)
