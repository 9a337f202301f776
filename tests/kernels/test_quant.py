"""Number formats against their definitions: every code, every scale, every tie.

The closed forms stand in tests/naive.py and here (bit patterns, popcounts); no expected value comes from the code under
test.
"""

import math

import numpy as np
import pytest
import torch

from fathom.errors import FormatError
from fathom.kernels import quant
from tests import naive

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_value(code: int) -> float:
    """Sign, four exponent bits with bias 7, three mantissa bits; all ones is NaN and there is no infinity."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code & 128 else size


E4M3 = [e4m3_value(code) for code in range(127)]


def e2m1_value(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code & 7]


def e8m0(*, first: int = 0, last: int = 254) -> torch.Tensor:
    return torch.arange(first, last + 1, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal bit for bit, signs of zero and places of NaN included."""
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    nan = torch.isnan(b)
    assert torch.equal(torch.isnan(a), nan)
    assert torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


def as_float32(values: object) -> torch.Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.asarray(values, dtype=np.float64).astype(np.float32))


# --- stored scales


def test_every_e8m0_byte_is_its_power_of_two() -> None:
    got = quant.from_scale(e8m0(last=255))
    same(got, as_float32([2.0 ** (byte - 127) for byte in range(255)] + [math.nan]))


def test_powers_of_two_become_their_exponent_byte() -> None:
    powers = as_float32([2.0**k for k in range(-126, 128)])
    assert quant.to_e8m0(powers).view(torch.uint8).tolist() == list(range(1, 255))


def test_float_scales_pass_unchanged() -> None:
    scale = torch.tensor([[0.5, 4.0]])
    assert torch.equal(quant.from_scale(scale), scale)


# --- stored FP8


def test_every_e4m3_code_times_every_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(255, 1, 256)
    got = quant.dequantize_fp8(codes, e8m0()[:, None, None].expand(255, 1, 2))
    values = np.array([e4m3_value(code) for code in range(256)])
    want = [values * 2.0 ** (byte - 127) for byte in range(255)]
    same(got[:, 0], as_float32(want))


def test_fp8_scales_belong_to_blocks_of_128_by_128() -> None:
    ones = torch.ones(2, 256, 384).to(torch.float8_e4m3fn)
    scale = torch.tensor([[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]).expand(2, 2, 3)
    got = quant.dequantize_fp8(ones, scale)
    for row, col in ((0, 0), (127, 127), (127, 128), (128, 127), (255, 256), (255, 383)):
        assert got[1, row, col] == 2.0 ** (3 * (row // 128) + col // 128)


def test_quantize_fp8_scale_and_codes_follow_the_definition() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 256, 384) * torch.logspace(-3, 2, 3)[:, None, None]
    w[0, :128, :128] = 0
    codes, scale = quant.quantize_fp8(w)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float8_e8m0fnu and scale.shape == (3, 2, 3)
    for i, r, c in np.ndindex(3, 2, 3):
        tile = w[i, r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128].double().numpy()
        want_scale = naive.power_of_two_at_least(np.maximum(np.abs(tile).max(), np.float32(1e-4)), 0.875, 9)
        assert quant.from_scale(scale)[i, r, c] == want_scale
        want = naive.nearest_code(tile / want_scale, 3, -6, 448.0)
        assert np.array_equal(codes[i, r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128].double().numpy(), want)


def test_fp8_of_fp8_changes_nothing() -> None:
    torch.manual_seed(1)
    once = quant.dequantize_fp8(*quant.quantize_fp8(torch.randn(256, 256)))
    assert torch.equal(quant.dequantize_fp8(*quant.quantize_fp8(once)), once)


# --- stored FP4


def test_element_2j_is_the_low_nibble_of_byte_j() -> None:
    packed = quant.pack_fp4(torch.tensor([[0x1, 0xA, 0xF, 0x0]], dtype=torch.uint8))
    assert packed.dtype == torch.int8 and packed.view(torch.uint8).tolist() == [[0xA1, 0x0F]]


def test_every_byte_unpacks_and_packs_back() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    codes = quant.unpack_fp4(byte.view(torch.int8).view(2, 4, 32))
    assert codes.flatten().tolist() == [nibble for b in range(256) for nibble in (b & 15, b >> 4)]
    assert torch.equal(quant.pack_fp4(codes).flatten().view(torch.uint8), byte)


def test_every_e2m1_code_times_every_scale() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    packed = quant.pack_fp4(codes).expand(255, 1, 16)
    got = quant.dequantize_fp4(packed, e8m0()[:, None, None])
    values = np.array([e2m1_value(code) for code in codes.tolist()])
    same(got[:, 0], as_float32([values * 2.0 ** (byte - 127) for byte in range(255)]))


def test_quantize_fp4_returns_every_code_at_every_scale() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).expand(250, 1, 32)
    scale = e8m0(first=1, last=250)[:, None, None]
    packed, got_scale = quant.quantize_fp4(quant.dequantize_fp4(quant.pack_fp4(codes), scale))
    assert torch.equal(got_scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(quant.unpack_fp4(packed), codes)


def test_quantize_fp4_of_random_weights_follows_the_definition() -> None:
    torch.manual_seed(2)
    w = torch.randn(2, 5, 96) * torch.logspace(-4, 3, 5)[:, None]
    w[0, 0] = 0
    got = quant.dequantize_fp4(*quant.quantize_fp4(w))
    for i, j in np.ndindex(2, 5):
        assert torch.equal(got[i, j], naive.fp4_sim(w[i, j]))


def test_quantize_fp4_refuses_rows_it_cannot_block() -> None:
    with pytest.raises(FormatError, match="48"):
        quant.quantize_fp4(torch.ones(4, 48))


# --- activation quantisers


@pytest.mark.parametrize("power", [-20, -7, 0, 3, 40])
@pytest.mark.parametrize("block", [64, 128])
def test_fp8_ties_go_to_the_even_code_and_neighbours_to_the_nearest(power: int, block: int) -> None:
    for low in range(126):
        middle = np.float32((E4M3[low] + E4M3[low + 1]) / 2)
        probes = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(1e9))]
        codes = [low, low + low % 2, low + 1]
        x = torch.zeros(block)
        x[:7] = torch.tensor([448.0, *map(float, probes), *(-float(p) for p in probes)])
        got = quant.fp8_sim(x * 2.0**power, block) * 2.0**-power
        want = [448.0, *(E4M3[c] for c in codes), *(-E4M3[c] for c in codes)]
        assert got[:7].tolist() == want, low


@pytest.mark.parametrize("power", range(-125, 125))
def test_fp4_ties_go_to_the_even_code_at_every_scale(power: int) -> None:
    x, want = [6.0], [6.0]
    for low in range(7):
        middle = np.float32((E2M1[low] + E2M1[low + 1]) / 2)
        probes = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(9))]
        x += map(float, probes)
        want += [E2M1[low], E2M1[low + low % 2], E2M1[low + 1]]
    scale = np.ldexp(1.0, power)
    both = torch.tensor([x + [0.0] * 10, [-v for v in x] + [0.0] * 10], dtype=torch.float64) * scale
    if power >= -102:  # below, a neighbour of a midpoint is no float32
        wants = torch.tensor([want + [0.0] * 10, [-v for v in want] + [0.0] * 10], dtype=torch.float64) * scale
        assert torch.equal(quant.fp4_sim(both.float()).double(), wants)
    grid = torch.tensor(E2M1 * 4, dtype=torch.float64) * scale
    assert torch.equal(quant.fp4_sim(grid.float()).double(), grid)


@pytest.mark.parametrize("power", range(-20, 21))
def test_an_exact_power_keeps_its_scale_and_the_next_float_does_not(power: int) -> None:
    """The least step of the grid tells the scale: it survives at S and is a tie, rounding to zero, at 2S."""
    for top, least, sim in ((448.0, 2.0**-9, lambda v: quant.fp8_sim(v, 64)), (6.0, 0.5, quant.fp4_sim)):
        edge = np.float32(top * 2.0**power)
        x = torch.zeros(2, 64 if top > 6 else 32)
        x[:, 0] = torch.tensor([float(edge), float(np.nextafter(edge, np.float32(np.inf)))])
        x[:, 1] = least * 2.0**power
        assert sim(x)[:, 1].tolist() == [least * 2.0**power, 0.0]
        assert sim(x)[:, 0].tolist() == [float(edge)] * 2


def test_floors_of_the_scale() -> None:
    least = 2.0**-22 * 2.0**-9  # 2^ceil(log2(1e-4 / 448)) is 2^-22, its grid's step 2^-31
    x = torch.tensor([[least, 1.5 * least, 0.5 * least, 2.4 * least] + [0.0] * 60])
    assert quant.fp8_sim(x, 64)[0, :4].tolist() == [least, 2 * least, 0.0, 2 * least]
    x = torch.tensor([[0.5, 0.25, 0.75, 1.4] + [0.0] * 28], dtype=torch.float64) * 2.0**-126
    assert quant.fp4_sim(x.float()).double()[0, :4].tolist() == [v * 2.0**-126 for v in (0.5, 0.0, 1.0, 1.5)]
    assert not quant.fp8_sim(torch.zeros(3, 128), 128).any() and not quant.fp4_sim(torch.zeros(3, 64)).any()


@pytest.mark.parametrize("width", [64, 128, 200, 384])
def test_quantisers_of_random_rows_follow_the_definition(width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(4, 3, width) * torch.logspace(-6, 4, 12).view(4, 3, 1)
    x[0, 0, : min(64, width)] = 0
    for i, j in np.ndindex(4, 3):
        assert torch.equal(quant.fp8_sim(x, 128)[i, j], naive.fp8_sim(x[i, j], 128))
        assert torch.equal(quant.fp8_sim(x, 64)[i, j], naive.fp8_sim(x[i, j], 64))
        assert torch.equal(quant.fp4_sim(x)[i, j], naive.fp4_sim(x[i, j]))


def test_quantisers_keep_the_dtype_and_let_gradients_through() -> None:
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    assert quant.fp8_sim(x, 64).dtype == quant.fp4_sim(x).dtype == torch.bfloat16
    assert torch.equal(quant.fp8_sim(x, 64).float(), quant.fp8_sim(x.float(), 64))
    leaf = torch.randn(2, 128, requires_grad=True)
    weight = torch.randn(2, 128)
    for sim in (lambda v: quant.fp8_sim(v, 128), quant.fp4_sim):
        (grad,) = torch.autograd.grad((sim(leaf) * weight).sum(), leaf)
        assert torch.equal(grad, weight)


# --- FP4 repacked as FP8


def packed_block(codes: list[int], spread: int, top: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """One 128 x 128 block: row 0 has the largest scale and all codes, row 1 a scale 2^spread smaller and `codes`."""
    grid = torch.zeros(128, 128, dtype=torch.uint8)
    grid[0, :16] = torch.arange(16, dtype=torch.uint8)
    grid[1, : len(codes)] = torch.tensor(codes, dtype=torch.uint8)
    scale = torch.full((128, 4), top, dtype=torch.uint8)
    scale[1] = top - spread
    return quant.pack_fp4(grid), scale.view(torch.float8_e8m0fnu)


@pytest.mark.parametrize("spread", range(15))
def test_fp4_to_fp8_is_exact_up_to_a_spread_of_fourteen(spread: int) -> None:
    packed, scale = packed_block(list(range(16)), spread)
    codes, blocks = quant.fp4_to_fp8(packed, scale)
    assert codes.dtype == torch.float8_e4m3fn and blocks.shape == (1, 1)
    assert quant.from_scale(blocks).item() == 2.0 ** (120 - 127 - 6)
    assert torch.equal(quant.dequantize_fp8(codes, blocks), quant.dequantize_fp4(packed, scale))


@pytest.mark.parametrize(
    ("spread", "exact", "lost"), [(15, [0, 2, 4, 5, 6, 7, 10], 1), (15, [4], 3), (16, [4, 6, 7], 2), (18, [0, 8], 7)]
)
def test_fp4_to_fp8_beyond_it_depends_on_the_codes(spread: int, exact: list[int], lost: int) -> None:
    packed, scale = packed_block(exact, spread)
    codes, blocks = quant.fp4_to_fp8(packed, scale)
    assert torch.equal(quant.dequantize_fp8(codes, blocks), quant.dequantize_fp4(packed, scale))
    packed, scale = packed_block([*exact, lost], spread)
    with pytest.raises(FormatError):
        quant.fp4_to_fp8(packed, scale)
    codes, blocks = quant.fp4_to_fp8(packed, scale, lossy=True)
    got, want = quant.dequantize_fp8(codes, blocks), quant.dequantize_fp4(packed, scale)
    step = 2.0**-9 * quant.from_scale(blocks).item()
    assert (got - want).abs().max() <= step / 2 and torch.equal(got[0], want[0])


def test_fp4_to_fp8_of_many_blocks_and_experts() -> None:
    torch.manual_seed(3)
    packed = quant.pack_fp4(torch.randint(0, 16, (3, 256, 384), dtype=torch.uint8))
    scale = torch.randint(113, 128, (3, 256, 12), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    codes, blocks = quant.fp4_to_fp8(packed, scale)
    assert blocks.shape == (3, 2, 3)
    assert torch.equal(quant.dequantize_fp8(codes, blocks), quant.dequantize_fp4(packed, scale))


@pytest.mark.parametrize("top", [0, 3, 5, 6, 7, 8, 254])
@pytest.mark.parametrize("lossy", [False, True])
def test_fp4_to_fp8_at_the_ends_of_the_scale_range(top: int, lossy: bool) -> None:
    """There is no e8m0 scale 2^6 below a largest scale under 2^-121; the least scale serves those blocks exactly."""
    packed, scale = packed_block([], 0, top)
    packed[0, 1:4] = packed[0, 5:8] = 0  # keep products finite at the upper end
    codes, blocks = quant.fp4_to_fp8(packed, scale, lossy=lossy)
    assert torch.equal(quant.dequantize_fp8(codes, blocks), quant.dequantize_fp4(packed, scale))


# --- Hadamard


@pytest.mark.parametrize("n", [1, 2, 4, 32, 128, 256])
def test_hadamard_signs_are_popcounts(n: int) -> None:
    want = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) * n**-0.5
    assert torch.allclose(quant.hadamard(torch.eye(n)), want, rtol=1e-6, atol=0)
    assert torch.equal(naive.sylvester(n), want.sign())


def test_hadamard_is_its_own_inverse_and_keeps_products() -> None:
    torch.manual_seed(4)
    x, y = torch.randn(2, 3, 128, dtype=torch.float64)
    assert torch.allclose(quant.hadamard(quant.hadamard(x)), x, atol=1e-12)
    assert torch.allclose((quant.hadamard(x) * quant.hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-12)
