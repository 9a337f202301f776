"""Rotary frequencies against the check values of reference 2.5, for the model and for the naive composition alike."""

import pytest
import torch

from fathom.config import preset
from fathom.model.rope import frequencies, rotate, turns
from tests import naive

YARN = {
    0: 1.0, 1: 0.687656, 14: 5.286857e-3, 15: 3.635539e-3, 16: 2.265625e-3, 20: 2.969778e-4, 24: 1.953125e-5,
    25: 5.372312e-6, 31: 5.680529e-7,
}  # fmt: skip


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_published_frequencies(name: str) -> None:
    config = preset(name)
    scaled = frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.rope_scaling)
    for ratio in (4, 128):
        for got in (scaled, naive.rope_frequencies(config.to_dict(), ratio)):
            assert {i: float(got[i]) for i in YARN} == pytest.approx(YARN, rel=1e-6)
    for got in (frequencies(64, 10000.0, None), naive.rope_frequencies(config.to_dict(), 0)):
        assert [float(f) for f in got] == pytest.approx([10000 ** (-2 * i / 64) for i in range(32)], rel=1e-6)


def test_pairs_are_neighbours_at_the_end_of_the_vector() -> None:
    """Dims 2i and 2i + 1 of the last ones turn together; the others stay; the conjugate turns back."""
    x = torch.randn(3, 2, 96, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 1000])
    config = preset("flash")
    turn = turns(positions, frequencies(64, config.compress_rope_theta, config.rope_scaling)).unsqueeze(1)
    got = rotate(x, turn)
    theirs = naive.rope_frequencies(config.to_dict(), 4)
    want = [naive.rotate(v, int(t), theirs) for v, t in zip(x, positions, strict=True)]
    assert torch.allclose(got, torch.stack(want), atol=1e-4) and torch.equal(got[..., :32], x[..., :32])
    assert torch.allclose(rotate(got, turn.conj().resolve_conj()), x, atol=1e-5)
