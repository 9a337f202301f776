"""Packed weights against float64 and against themselves in other company."""

import copy

import pytest
import torch
from torch import Tensor

from fathom.kernels import quant
from fathom.kernels.packed import Packed, pack, pack_all

pytestmark = pytest.mark.skipif(pack(torch.ones(1, 1)) is None, reason="torch has no FBGEMM on this machine")

SHAPES = ((256, 256), (24, 1024), (8, 256), (7, 40), (50, 96), (1280, 2048))


def weights(shape: tuple[int, int], kind: str) -> Tensor:
    """Values that a checkpoint can store."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    if kind == "fp8":
        return quant.dequantize_fp8(*quant.quantize_fp8(w))
    if kind == "fp4":
        return quant.dequantize_fp4(*quant.quantize_fp4(torch.nn.functional.pad(w, (0, -w.shape[1] % 32))))
    return w.bfloat16().float()


def packed(w: Tensor) -> Packed:
    found = pack(w)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_a_float32_product_of_the_exact_weights(shape: tuple[int, int], kind: str) -> None:
    w = weights(shape, kind)
    x = torch.randn(70, w.shape[1], generator=torch.Generator().manual_seed(4))
    exact = x.double() @ w.double().T
    bound = (x.abs().double() @ w.abs().double().T) * w.shape[1] * 2.0**-24
    assert ((packed(w)(x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_its_neighbours(shape: tuple[int, int], threads: int) -> None:
    product = packed(weights(shape, "bf16"))
    x = torch.randn(300, shape[1], generator=torch.Generator().manual_seed(4))
    try:
        torch.set_num_threads(threads)
        whole = product(x)
        for rows in (*range(1, 18), 31, 64, 65, 100, 129, 256):
            assert torch.equal(product(x[40 : 40 + rows]), whole[40 : 40 + rows]), rows
    finally:
        torch.set_num_threads(1)


def test_small_numbers_beside_large_ones_are_kept_by_a_shift() -> None:
    w = torch.tensor([[1.0, 2.0**-25, 1.5 * 2.0**-20]])
    assert torch.equal(packed(w)(torch.eye(3)), w.T)


def test_what_does_not_fit_exactly_is_not_packed() -> None:
    assert pack(torch.tensor([[1.0, 1.0 + 2.0**-20]])) is None
    assert pack(torch.tensor([[1.0, 2.0**-60]])) is None
    assert pack_all(torch.tensor([[[1.0]], [[1.0 + 2.0**-20]]])) is None


def test_a_copy_computes_the_same() -> None:
    product = packed(weights((50, 96), "bf16"))
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    assert torch.equal(copy.deepcopy(product)(x), product(x))
