"""Random models made in place: what they hold is what a checkpoint of that size would."""

from __future__ import annotations

import torch

from fathom.accounting import Storage, Stored, inventory
from fathom.checkpoint.synthetic import synthetic_model
from fathom.config import WEIGHTS, ModelConfig
from fathom.kernels.quant import dequantize
from fathom.model.batch import Batch, Span
from fathom.model.cache import ContiguousCache
from fathom.model.layers import Linear, Numerics
from fathom.model.moe import Experts

SMALL = ModelConfig.load(WEIGHTS / "small")
NUMERICS = Numerics(torch.bfloat16, quantize=True)


def test_as_many_bytes_as_a_checkpoint() -> None:
    model = synthetic_model(SMALL, NUMERICS, "cpu")
    counted = {name for name, _ in model.named_buffers() if name.endswith(".load")}
    held = [(n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in counted]
    assert not any(t.is_meta for _, t in held)
    assert sum(t.nbytes for _, t in held) == Stored.of(inventory(SMALL, Storage.of(SMALL))).bytes


def test_weights_keep_the_size_of_what_passes() -> None:
    model = synthetic_model(SMALL, NUMERICS, "cpu", seed=1)
    for module in model.modules():
        if isinstance(module, Linear) and module.scale is not None:
            weight = dequantize(module.weight, module.scale)
            # A single block may have the lowest scale.
            assert 0.25 < float(weight.std()) * module.weight.shape[-1] ** 0.5 < 4
        if isinstance(module, Experts):
            weight = dequantize(module.w13, module.w13_scale)
            assert 0.5 < float(weight.std()) * weight.shape[-1] ** 0.5 < 3
    tables = [t for n, t in model.named_buffers() if n.endswith("tid2eid")]
    assert tables and all(len(set(row)) == SMALL.num_experts_per_tok for row in tables[0][:50].tolist())


@torch.inference_mode()
def test_it_answers_and_the_seed_decides_what() -> None:
    ids, batch = torch.arange(200) + 5, Batch.step([Span(0, 200)])
    logits = []
    for seed in (0, 0, 1):
        model = synthetic_model(SMALL, NUMERICS, "cpu", seed=seed)
        logits.append(model.logits(model(ids, batch, ContiguousCache(SMALL, NUMERICS, 1, 256))))
    assert torch.isfinite(logits[0]).all() and 0.2 < float(logits[0].std()) < 5
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
