"""FP8, BF16 and float32 products on a GPU (or under the interpreter) against float64."""

import pytest
import torch
from torch import Tensor

from fathom.kernels.linear import Part
from fathom.kernels.norm import rms_norm
from fathom.kernels.quant import dequantize_fp8, fp8_sim, quantize_fp8
from fathom.kernels.testing import INTERPRETED, device, error, poisoned

pytest.importorskip("triton")
DEVICE = device()
if DEVICE is None:
    pytest.skip("no CUDA device", allow_module_level=True)

from fathom.kernels import linear_triton as ops  # noqa: E402
from fathom.kernels import norm_triton, product_triton  # noqa: E402
from fathom.kernels.quant_triton import GRID, quantise  # noqa: E402

pytestmark = pytest.mark.external if INTERPRETED else pytest.mark.gpu
LARGE = ((128, 128), (1536, 4096), (4096, 1024), (512, 7168), (4096, 8192))
SHAPES = ((128, 128), (256, 384)) if INTERPRETED else LARGE
TOLERANCE = 6e-3 if INTERPRETED else 2e-3  # the interpreter truncates to BF16
EXACT = 1e-5
CUT = 2e-5  # sums of a tensor core are cut off, not rounded: 1.4e-5 over 3 x 4096 products


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def operand(rows: int, k: int) -> Tensor:
    return fp8_sim.__wrapped__(rand(rows, k, seed=2), 128).bfloat16()


@pytest.mark.parametrize("rows", [1, 3] if INTERPRETED else [1, 2, 5, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows_of_fp8(shape: tuple[int, int], rows: int) -> None:
    weight, scale = quantize_fp8(rand(*shape, seed=1))
    x = operand(rows, shape[1])
    want = x.double() @ dequantize_fp8(weight, scale).double().T
    with poisoned():
        assert error(ops.few(x, weight, scale), want) < TOLERANCE
        assert error(ops.few(x.float(), weight, scale, dtype=torch.float32), want) < EXACT


@pytest.mark.parametrize("rows", [2] if INTERPRETED else [2, 200])
@pytest.mark.parametrize("groups", [2, 8])
def test_groups(groups: int, rows: int) -> None:
    n, k = (groups * 128, 128) if INTERPRETED else (groups * 1024, 4096)
    weight, scale = quantize_fp8(rand(n, k, seed=1))
    x = rand(rows, groups, k, seed=2).bfloat16()
    parts = dequantize_fp8(weight, scale).double().unflatten(0, (groups, -1))
    want = torch.einsum("tgk,gnk->tgn", x.double(), parts).flatten(1)
    with poisoned():
        assert error(ops.grouped_linear(x, groups, weight, scale), want) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 40), (24, 1024), (257, 4096)])
def test_few_rows_of_floats_with_awkward_sizes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = rand(*shape, seed=1).to(dtype), rand(3, shape[1], seed=2)
    with poisoned():
        assert error(ops.linear(x, weight), x.double() @ weight.double().T) < EXACT


@pytest.mark.parametrize("rows", [17] if INTERPRETED else [65, 200, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_rows_of_fp8(shape: tuple[int, int], rows: int) -> None:
    weight, scale = quantize_fp8(rand(*shape, seed=1))
    x, full = operand(rows, shape[1]), dequantize_fp8(weight, scale).double()
    with poisoned():
        on_grid, any_x = ops.many(quantise(x, GRID)[0], weight, scale), ops.many(x, weight, scale)
    assert error(on_grid, x.double() @ full.T) < TOLERANCE
    assert error(any_x, x.double() @ full.T) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_several_linears_of_many_rows(shape: tuple[int, int]) -> None:
    weight, scale = quantize_fp8(rand(*shape, seed=1))
    plain, norm = rand(64, shape[1], seed=3).bfloat16(), rand(shape[1], seed=4).bfloat16()
    x = rand(70, shape[1], seed=2).bfloat16()
    parts = Part(weight, scale, quantised=True), Part(plain, dtype=torch.float32), Part(weight, scale)
    with poisoned():
        rounded, floats, unrounded = ops.linears(x, parts, norm, 1e-6)
    normalised = rms_norm(x, norm, 1e-6)
    full = dequantize_fp8(weight, scale).double()
    assert error(rounded, fp8_sim.__wrapped__(normalised, 128).double() @ full.T) < TOLERANCE
    assert error(floats, normalised.double() @ plain.double().T) < EXACT
    assert error(unrounded, normalised.double() @ full.T) < TOLERANCE


@pytest.mark.skipif(INTERPRETED, reason="cuBLAS")
@pytest.mark.parametrize("shape", ((16384, 1024), (4096, 4096), (1536, 4096), (512, 7168)))
def test_cublas_has_the_bits_of_the_kernel_for_any_number_of_rows(shape: tuple[int, int]) -> None:
    weight, scale = quantize_fp8(rand(*shape, seed=1))
    x, scales = quantise(rand(2048, shape[1], seed=2))
    want = product_triton.eights_here(x, scales.t().contiguous(), weight, scale, torch.bfloat16)
    for rows in (128, 256, 384, 896, 2048):
        first = 128 if rows < 2048 else 0
        got = product_triton.eights(x[first : first + rows], scales[first : first + rows], weight, scale, want.dtype)
        assert torch.equal(got, want[first : first + rows]), rows


@pytest.mark.parametrize("shape", [(40, 128)] if INTERPRETED else [(257, 4096), (2560, 4096)])
def test_tiles_of_bf16(shape: tuple[int, int]) -> None:
    weight, x = rand(*shape, seed=1).bfloat16(), rand(70, shape[1], seed=2)
    with poisoned():
        assert error(ops.linear(x, weight), x.double() @ weight.double().T) < CUT
        rounded = x.bfloat16()
        assert error(ops.linear(rounded, weight), rounded.double() @ weight.double().T) < TOLERANCE
        assert error(ops.linear(rounded, weight, dtype=torch.float32), rounded.double() @ weight.double().T) < EXACT


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_a_row_has_the_same_bits_among_any_others(shape: tuple[int, int]) -> None:
    weight, scale = quantize_fp8(rand(*shape, seed=1))
    x = operand(20 if INTERPRETED else 600, shape[1])
    first = ops.few(x[: ops.FEW], weight, scale)
    for rows in (1, 2, 3, 8, 20) if INTERPRETED else (1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 63):
        assert torch.equal(ops.few(x[:rows], weight, scale), first[:rows])
    for form in (lambda x: x, lambda x: quantise(x, GRID)[0]):
        whole = ops.many(form(x), weight, scale)
        for a, b in ((0, 1), (3, 9)) if INTERPRETED else ((100, 231), (1, 66), (5, 105), (0, 128), (128, 512)):
            assert torch.equal(ops.many(form(x[a:b]), weight, scale), whole[a:b]), (a, b)


@pytest.mark.parametrize(
    "shape", [(1, 384), (5, 512)] if INTERPRETED else [(1, 4096), (33, 1024), (7, 64, 512), (2, 7168)]
)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(shape: tuple[int, ...], weighted: bool) -> None:
    x, weight = rand(*shape, seed=1).bfloat16(), rand(shape[-1], seed=2).bfloat16()
    want = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    with poisoned():
        got = norm_triton.rms_norm(x, weight if weighted else None, 1e-6)
    assert error(got, want * weight.double() if weighted else want) < 2 * TOLERANCE
    assert torch.equal(norm_triton.rms_norm(x[:1], weight if weighted else None, 1e-6), got[:1])
