"""The same model code on a GPU: without quantisers it agrees with the CPU to rounding, with them in what it answers."""

from __future__ import annotations

import pytest
import torch

from fathom.checkpoint.load import load_model
from fathom.config import WEIGHTS
from fathom.model.batch import Batch, Span
from fathom.model.cache import ContiguousCache
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

PROMPT, STEPS = 300, 12


def logits(model: Transformer, device: str, tokens: torch.Tensor) -> torch.Tensor:
    """Prefill of PROMPT tokens of one sequence beside another, then STEPS single steps, all in one tensor."""
    cache = ContiguousCache(model.config, model.numerics, slots=2, max_context=1024, device=device)
    tokens = tokens.to(device)
    spans = [Span(0, PROMPT, 0), Span(0, 77, 1)]
    batch = Batch.step(spans, "all", device)
    rows = [model(torch.cat((tokens[:PROMPT], tokens[:77])), batch, cache)]
    for at in range(PROMPT, PROMPT + STEPS):
        rows.append(model(tokens[at : at + 1], Batch.step([Span(at, 1, 0)], device=device), cache))
    return model.logits(torch.cat(rows)).cpu()


@torch.inference_mode()
def test_float32_agrees_with_the_cpu() -> None:
    tokens = torch.randint(3, 1200, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(0))
    numerics = Numerics(torch.float32, quantize=False)
    here = logits(load_model(WEIGHTS / "small", numerics=numerics), "cpu", tokens)
    there = logits(load_model(WEIGHTS / "small", numerics=numerics, device="cuda"), "cuda", tokens)
    error = float((here - there).abs().max() / here.abs().max())
    print(f"\nGPU against CPU, float32, quantisers off: {error:.1e}")
    assert error <= 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "as stored"])
def test_quantised_answers_agree_with_the_cpu(dense: bool) -> None:
    """Rounding flips move single logits; the greedy token is the same wherever the model is sure of it."""
    tokens = torch.randint(3, 1200, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(1))
    here = logits(load_model(WEIGHTS / "small"), "cpu", tokens)
    there = logits(load_model(WEIGHTS / "small", device="cuda", dense=dense), "cuda", tokens)
    top = here.topk(2, -1).values
    sure = top[:, 0] - top[:, 1] > 1.0
    print(f"\nGPU against CPU, quantised, {int(sure.sum())} sure positions of {len(sure)}")
    assert sure.sum() > 20
    assert torch.equal(here.argmax(-1)[sure], there.argmax(-1)[sure])
