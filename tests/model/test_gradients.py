"""Gradients of every parameter against autograd through the naive composition in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.kernels.pool import overlap, pool
from fathom.model.batch import Batch
from fathom.model.transformer import Transformer
from tests import oracle
from tests.naive import Naive

TOLERANCE = 1e-4
"""Largest difference over the largest value of each parameter's gradient; float32 against float64."""

SELECTION_ONLY = ".indexer."
"""Parameters that only choose entries: the loss of the outputs has no gradient for them."""


def draw(seed: int, ratios: Sequence[int]) -> tuple[oracle.Config, oracle.Weights]:
    fixed: dict[str, Any] = {"compress_ratios": [*ratios, 0], "num_hidden_layers": len(ratios), "num_hash_layers": 1}
    fixed |= {"vocab_size": 40, "num_attention_heads": 4, "index_topk": 8, "swiglu_limit": 1.0}
    config = oracle.draw_config(seed, n_routed_experts=6, num_experts_per_tok=3, **fixed)
    return config, oracle.draw_weights(config, seed)


def our_gradients(model: Transformer, documents: Sequence[Tensor], pull: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One packed call, the prediction block on all rows but each document's last, and one backward pass."""
    lengths = [len(ids) for ids in documents]
    x = model(torch.cat(list(documents)), Batch.packed(lengths))
    logits = model.logits(x)
    rows = torch.cat([part[:-1] for part in x.split(lengths)])
    following = torch.cat([ids[1:] for ids in documents])
    drafted = model.draft_logits(model.draft(rows, following, Batch.packed([n - 1 for n in lengths])))
    loss = (logits * torch.cat([main for main, _ in pull])).sum() + (drafted * torch.cat([m for _, m in pull])).sum()
    loss.backward()


def naive_gradients(
    config: oracle.Config, weights: oracle.Weights, documents: Sequence[Tensor], pull: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor | None]:
    leaves = {k: v.double().requires_grad_() if v.is_floating_point() else v for k, v in weights.items()}
    naive = Naive(leaves, config)
    for ids, (main, extra) in zip(documents, pull, strict=True):
        out = naive.forward(ids.tolist())
        assert out.mtp is not None
        ((out.logits * main).sum() + (out.mtp * extra).sum()).backward()
    zeros = {k: torch.zeros_like(v) if v.is_floating_point() and v.grad is None else v.grad for k, v in leaves.items()}
    return oracle.stacked({k: v for k, v in zeros.items() if v is not None})


@pytest.mark.parametrize(
    ("seed", "lengths", "ratios"), [(3, (130, 20), (4, 128)), (8, (60, 9), (0, 4)), (5, (12, 5, 5, 12), (4, 4))]
)
def test_gradients_of_all_parameters(
    seed: int, lengths: tuple[int, ...], ratios: tuple[int, ...], say: Callable[[str], None]
) -> None:
    torch.set_num_threads(1)
    config, weights = draw(seed, ratios)
    g = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, config["vocab_size"], (n,), generator=g) for n in lengths]
    pull = [tuple(torch.randn(n - i, config["vocab_size"], generator=g) for i in (0, 1)) for n in lengths]
    model = oracle.our_model(config, weights).train()
    our_gradients(model, documents, pull)
    want = naive_gradients(config, weights, documents, pull)
    worst, where = 0.0, ""
    for name, parameter in model.named_parameters():
        if SELECTION_ONLY in name:
            assert not want[name].any() and (parameter.grad is None or not parameter.grad.any()), name
            continue
        assert parameter.grad is not None and want[name].any(), f"{name} has no gradient"
        error = oracle.relative_error(parameter.grad, want[name])
        assert error <= TOLERANCE, f"{name}: {error:.2e}"
        worst, where = max((worst, where), (error, name))
    count = sum(1 for name, _ in model.named_parameters() if SELECTION_ONLY not in name)
    say(f"gradients, ratios {ratios}, documents of {lengths} tokens: {count} parameters, worst {worst:.1e} ({where})")


def test_gradients_do_not_cross_documents() -> None:
    """A loss on the second document alone moves no embedding of a token that only the first one has."""
    torch.set_num_threads(1)
    config, weights = draw(3, (4, 128, 0))
    for first, second in ((20, 20), (30, 7)):
        model = oracle.our_model(config, weights).train()
        tokens = torch.cat((torch.arange(first) % 10, 10 + torch.arange(second) % 10))
        x = model(tokens, Batch.packed([first, second]))
        model.logits(x[first:]).square().sum().backward()
        moved = model.embed.weight.grad.abs().sum(1) > 0
        assert moved[10 : 10 + min(second, 10)].all() and not moved[:10].any()


def test_pooling_passes_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(12, 6, dtype=torch.float64, generator=g, requires_grad=True) for _ in range(2))

    def both(first: bool) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: pool(overlap(a, first, 0.0), overlap(b, first, -torch.inf))

    assert torch.autograd.gradcheck(both(True), (x, z))
    assert torch.autograd.gradcheck(both(False), (x, z))
