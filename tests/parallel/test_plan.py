"""The cut is right: what the ranks compute, summed where the plan says so, is what the whole model computes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fathom.checkpoint.synthetic import synthetic_model
from fathom.config import FLASH, PRO, ModelConfig, Quantization
from fathom.errors import ConfigError
from fathom.model.batch import Batch, Span
from fathom.model.cache import ContiguousCache
from fathom.model.layers import Numerics
from fathom.model.transformer import Transformer
from fathom.parallel.plan import cut_of, rank_config, rank_model, share, summed
from tests.oracle import draw_config, draw_weights, our_model, relative_error
from tests.parallel.threads import OfThreads, Together

RAW = draw_config(
    11,
    blocked=True,
    num_hidden_layers=3,
    compress_ratios=[0, 4, 128, 0],
    num_attention_heads=8,
    head_dim=128,
    o_groups=4,
    moe_intermediate_size=512,
    num_hash_layers=1,
    vocab_size=160,
)
CONFIG = ModelConfig.from_dict(RAW)
PROMPT, STEPS = 150, 3


def ranks_of(model: Transformer, tp: int) -> list[Transformer]:
    """The model cut by the plan, placed over threads by `answers`."""
    out = []
    for rank in range(tp):
        with torch.device("meta"):
            part = rank_model(model.config, model.numerics, tp)
        state = {name: share(name, tensor, rank, tp) for name, tensor in model.state_dict().items()}
        for name, tensor in state.items():
            module, _, own = name.rpartition(".")
            holder = part.get_submodule(module)
            is_parameter = own in holder._parameters
            setattr(holder, own, torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        assert not [n for n, t in part.named_parameters() if t.is_meta]
        for name, buffer in part.named_buffers():
            if buffer.is_meta:
                setattr(part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], torch.zeros(buffer.shape))
        out.append(part.eval())
    return out


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    """A prompt and a few steps after it, through a cache, and the MTP block's opinion at the end."""
    ids = torch.randint(0, 160, (PROMPT + STEPS + 1,), generator=torch.Generator().manual_seed(3))
    cache = ContiguousCache(model.config, model.numerics, max_context=256)
    streams = [model(ids[:PROMPT], Batch.step([Span(0, PROMPT)], "all"), cache)]
    streams += [model(ids[at : at + 1], Batch.step([Span(at, 1)]), cache) for at in range(PROMPT, PROMPT + STEPS)]
    rows = torch.cat(streams)
    drafts = model.draft(rows, ids[1:], Batch.step([Span(0, len(rows))], "all"), cache)
    return torch.cat((model.logits(rows), model.draft_logits(drafts)))


def answers(ranks: Sequence[Transformer]) -> Tensor:
    """All ranks side by side: their logits end to end."""
    together = Together(len(ranks))
    for rank, model in enumerate(ranks):
        summed(model, OfThreads(rank, together).sum)
    with ThreadPoolExecutor(len(ranks)) as pool:
        return torch.cat(list(pool.map(logits, ranks)), -1)


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_together_are_the_whole_model(tp: int) -> None:
    model = our_model(RAW, draw_weights(RAW, 5))
    error = relative_error(answers(ranks_of(model, tp)), logits(model))
    print(f"\n{tp} ranks against one model, float32: {error:.1e}")
    assert error < 2e-5


def test_stored_weights_are_cut_in_whole_blocks() -> None:
    """FP8 and FP4 with their scales; with quantisers on, the ranks round the same numbers.

    But a last bit of a sum may turn a value to its neighbour, and then a choice of experts: not with every seed.
    """
    config, errors = replace(CONFIG, expert_dtype="fp4", quantization_config=Quantization()), []
    for seed in range(2, 7):
        model = synthetic_model(config, Numerics(torch.float32, quantize=True), "cpu", seed=seed)
        errors.append(relative_error(answers(ranks_of(model, 2)), logits(model)))
    print("\n2 ranks against one model, quantised:", *(f"{error:.1e}" for error in errors))
    assert sorted(errors)[1] < 1e-5


def test_a_missing_sum_is_seen() -> None:
    """What the tests above compare does depend on it."""
    model = our_model(RAW, draw_weights(RAW, 5))
    lonely = torch.cat([logits(rank) for rank in ranks_of(model, 2)], -1)
    assert relative_error(lonely, logits(model)) > 0.05


def test_a_synthetic_rank_holds_what_is_cut_for_it() -> None:
    whole = synthetic_model(CONFIG, Numerics(torch.bfloat16, True), "cpu")
    rank = synthetic_model(CONFIG, Numerics(torch.bfloat16, True), "cpu", tp=2)
    shapes = {name: tensor.shape for name, tensor in rank.state_dict().items()}
    assert shapes == {name: share(name, tensor, 1, 2).shape for name, tensor in whole.state_dict().items()}


def test_what_is_whole() -> None:
    with torch.device("meta"):
        names = [name for name, _ in Transformer(CONFIG).named_parameters()]
    whole = {name.split(".", 2)[-1] for name in names if name.startswith("layers.1.") and cut_of(name) is None}
    assert {"attn.wq_a.weight", "attn.wkv.weight", "attn.indexer.wq_b.weight", "ffn.gate.weight"} <= whole
    assert not {name for name in whole if "experts" in name or "wo_" in name or name == "attn.wq_b.weight"}
    assert cut_of("embed.weight") is None and cut_of("mtp.0.attn.wo_b.scale") is not None


def test_published_models_and_what_is_refused() -> None:
    half = rank_config(FLASH, 2)
    assert (half.num_attention_heads, half.o_groups, half.moe_intermediate_size) == (32, 4, 1024)
    assert rank_config(PRO, 8).num_attention_heads == 16
    with pytest.raises(ConfigError, match=r"o_groups \(8\) cannot be cut into 16 equal parts"):
        rank_config(FLASH, 16)
    with pytest.raises(ConfigError, match=r"moe_intermediate_size \(384\).*2 equal parts of whole blocks of 128"):
        rank_config(replace(FLASH, moe_intermediate_size=384), 2)
    with pytest.raises(ConfigError, match=r"vocab_size"):
        rank_config(replace(FLASH, vocab_size=129281), 2)
