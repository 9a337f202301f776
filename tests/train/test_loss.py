"""The losses of a packed batch against one naive forward a document; routing biases against their rule."""

import math

import pytest
import torch

from fathom.model.init import init_weights
from fathom.model.transformer import Transformer
from fathom.train.data import Document, lay, pack
from fathom.train.loss import balance, gates, losses
from tests import oracle
from tests.naive import Naive
from tests.train.support import tiny_config


@pytest.mark.parametrize("waste", [0.0, 0.6])
def test_both_losses_against_documents_one_by_one(waste: float) -> None:
    fixed = {"compress_ratios": [0, 4, 0], "num_hidden_layers": 2, "num_hash_layers": 1, "vocab_size": 40}
    config = oracle.draw_config(4, n_routed_experts=4, num_experts_per_tok=2, num_attention_heads=4, **fixed)
    weights = oracle.draw_weights(config, 4)
    model = oracle.our_model(config, weights).train()
    g = torch.Generator().manual_seed(1)
    documents = []
    for n in (11, 9, 7, 7):
        tokens = torch.randint(0, 40, (n,), generator=g).tolist()
        documents.append(Document(tokens, torch.rand(n, generator=g).round(decimals=1).tolist(), "none"))
    ours = losses(model, pack(lay(documents, waste)), mtp=True)
    sums = [[0.0, 0.0], [0.0, 0.0]]
    naive = Naive({k: v.double() if v.is_floating_point() else v for k, v in weights.items()}, config)
    for d in documents:
        out = naive.forward(d.tokens)
        for ahead, logits in ((1, out.logits), (2, out.mtp)):
            for t in range(len(d.tokens) - ahead):
                p = logits[t].softmax(-1)[d.tokens[t + ahead]]
                sums[ahead - 1][0] -= d.weights[t + ahead] * math.log(p)
                sums[ahead - 1][1] += d.weights[t + ahead]
    assert ours.main.item() == pytest.approx(sums[0][0] / sums[0][1], rel=1e-4)
    assert ours.mtp is not None
    assert ours.mtp.item() == pytest.approx(sums[1][0] / sums[1][1], rel=1e-4)


def test_bias_moves_against_the_load_and_hash_routers_have_none() -> None:
    model = Transformer(tiny_config().model)
    init_weights(model, 0)
    for gate in gates(model):
        gate.load.copy_(torch.tensor([9.0, 3.0, 0.0, 4.0]))
    assert balance(model, 0.001) == pytest.approx(9 / 4)
    for gate in gates(model):
        assert gate.load.sum() == 0
        if gate.by_hash:
            assert not hasattr(gate, "bias") or gate.bias.abs().max() == 0
        else:
            assert gate.bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.0])


def test_routing_bias_evens_out_a_lopsided_router() -> None:
    """An expert that every token prefers loses its lead; the weights of the router are not touched."""
    model = Transformer(tiny_config().model).train()
    init_weights(model, 0)
    gate = gates(model)[-1]
    with torch.no_grad():
        gate.weight.mul_(5.0)
        gate.weight[0] += 2.0
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(0)) + 0.3
    ids = torch.zeros(400, dtype=torch.long)

    def lead() -> float:
        gate(x @ gate.weight.detach().T, ids)
        return balance(model, 0.02)

    before = lead()
    after = [lead() for _ in range(300)][-1]
    assert before > 1.5
    assert after < 1.2
