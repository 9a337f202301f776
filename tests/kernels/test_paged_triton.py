"""Decode steps over paged memory, kernels against the model's own tiles: the embedded model's sizes, random weights.

Both begin with the same rows; a step of the kernels must leave the rows that a tile of one token leaves, and give what
it gives, to the rounding of BF16.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fathom.checkpoint.synthetic import synthetic_model
from fathom.config import WEIGHTS, ModelConfig
from fathom.engine.cache import PagedCache
from fathom.kernels.testing import INTERPRETED, device, error
from fathom.model.batch import Batch, Span
from fathom.model.layers import Numerics

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
SMALL = ModelConfig.load(WEIGHTS / "small")
CONFIG = replace(
    SMALL,
    num_hidden_layers=3,
    num_hash_layers=3,  # by score, a last bit can choose other experts
    compress_ratios=(0, 4, 128, 0)[: 3 + SMALL.num_nextn_predict_layers],
    index_topk=16,
)
TOLERANCE = 0.15
"""A last bit more or less is now and then another e4m3 value, in every layer."""
NUMERICS = Numerics(torch.bfloat16, quantize=True)
PROMPTS = (130, 3, 255) if INTERPRETED else (130, 3, 255, 383, 1023, 516)
STEPS = 3 if INTERPRETED else 9


def started(prompts: tuple[int, ...], order: list[int]) -> tuple[PagedCache, list[Tensor]]:
    """A cache in which every slot has read its prompt, by tiles; pages handed out in `order`."""
    cache = PagedCache(CONFIG, NUMERICS, len(prompts) + 1, 64, DEVICE)
    ids = [torch.randint(3, 1000, (n + STEPS,), generator=torch.Generator().manual_seed(n)) for n in prompts]
    for slot, n in enumerate(prompts):
        pages = [order.pop() for _ in range((n + STEPS) // 128 + 1)]
        cache.bind(slot, pages)
        cache.steps.bind(slot, pages)
        MODEL(ids[slot][:n].to(DEVICE), Batch.step([Span(0, n, slot)], device=DEVICE), cache)
    return cache, ids


MODEL = synthetic_model(CONFIG, NUMERICS, DEVICE, seed=3)


def by_token(cache: PagedCache, ids: list[Tensor], prompts: tuple[int, ...], slots: list[int]) -> Tensor:
    """STEPS steps of the slots' sequences through the kernels: streams [STEPS, B, n, D]."""
    out = []
    for i in range(STEPS):
        at = [prompts[s] + i for s in slots]
        cache.steps.room(slots, at)
        where = torch.tensor([at, slots], dtype=torch.int32, device=DEVICE)
        tokens = torch.stack([ids[s][p] for s, p in zip(slots, at, strict=True)]).to(DEVICE)
        out.append(MODEL(tokens, Batch.tokens(where[0], where[1]), cache))
    return torch.stack(out)


@torch.inference_mode()
def test_steps_agree_with_tiles() -> None:
    cache, ids = started(PROMPTS, list(range(64)))
    slots = list(range(len(PROMPTS)))
    got = by_token(cache, ids, PROMPTS, slots)
    other, _ = started(PROMPTS, list(range(64)))
    for slot, n in enumerate(PROMPTS):
        for i in range(STEPS):
            batch = Batch.step([Span(n + i, 1, slot)], device=DEVICE)
            want = MODEL(ids[slot][n + i : n + i + 1].to(DEVICE), batch, other)
            assert error(got[i, slot], want[0]) < TOLERANCE, (n, i)
    for layer, ratio in ((1, 4), (2, 128)):
        for name in cache._layers[layer].stores:
            for slot, n in enumerate(PROMPTS):
                rows, theirs = (
                    c._layers[layer].stores[name].read(c._tables[slot], (n + STEPS) // ratio) for c in (cache, other)
                )
                assert not rows.shape[0] or error(rows, theirs) < TOLERANCE, (name, n)


@torch.inference_mode()
def test_the_same_bits_alone_in_company_and_on_other_pages() -> None:
    slots = list(range(len(PROMPTS)))
    together = by_token(*started(PROMPTS, list(range(64))), PROMPTS, slots)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    backwards = by_token(*started(PROMPTS, shuffled), PROMPTS, slots[::-1])
    assert torch.equal(together, backwards.flip(1))
    cache, ids = started(PROMPTS, list(range(64)))
    assert torch.equal(by_token(cache, ids, PROMPTS, [1])[:, 0], together[:, 1])
