import math

import pytest
import torch
from torch import Tensor

from compress.formats.float8 import E4M3_MAX, absmax, to_e4m3

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def all_code_points() -> Tensor:
    """The 254 finite values of E4M3 from their definition, sorted, -0 left out."""
    values = {0.0}
    for exponent in range(16):
        for mantissa in range(8):
            if exponent == 15 and mantissa == 7:
                continue  # the NaN
            value = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            values |= {value, -value}
    return torch.tensor(sorted(values))


def nearest(x: float, points: list[float]) -> float:
    """Round half to even by search: of two points equally near, the one with an even mantissa bit."""
    distance = min(abs(x - p) for p in points)
    ties = [p for p in points if abs(x - p) == distance]
    if len(ties) == 1:
        return ties[0]
    return next(p for p in ties if int(torch.tensor(p).to(torch.float8_e4m3fn).view(torch.uint8)) % 2 == 0)


def test_a_row_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 1.0625, 1.1875, 1000.0, -1000.0, 2.0**-10, 0.0]])
    got = to_e4m3(weight, torch.ones(1, 1)).float()
    assert got.tolist() == [[1.0, -2.0, 1.0, 1.25, 448.0, -448.0, 0.0, 0.0]]


def test_every_code_point_survives() -> None:
    points = all_code_points()
    assert points.numel() == 253
    for scale in (1.0, 0.5, 2.0**-20, 2.0**20):
        got = to_e4m3((points * scale)[None], torch.full((1, 1), scale))
        assert torch.equal(got.float()[0], points)
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    got = to_e4m3(finite.view(torch.float8_e4m3fn).float()[None], torch.ones(1, 1))
    assert torch.equal(got.view(torch.uint8)[0], finite)


def test_halfway_points_and_their_neighbours_round_as_a_search_does() -> None:
    points = all_code_points()
    middles = (points[1:] + points[:-1]) / 2
    inputs = torch.cat([middles, torch.nextafter(middles, points[1:]), torch.nextafter(middles, points[:-1])])
    got = to_e4m3(inputs[None], torch.ones(1, 1)).float()[0]
    assert got.tolist() == [nearest(x, points.tolist()) for x in inputs.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_the_clamped_cast_of_torch(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    for scale in (1.0, 0.0123, 3e-6, 7e4):
        got = to_e4m3(values, torch.tensor(scale))
        quotients = values.float() / torch.tensor(scale)
        expected = quotients.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        assert torch.equal(got.float().nan_to_num(999.0), expected.float().nan_to_num(999.0))
        assert torch.equal(got.float().isnan(), values.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (130, 257), (128, 256), (700, 1000)])
def test_block_scales_and_maxima_match_a_loop_over_blocks(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for height, width in [(128, 128), (1, 64), (3, 1000), (shape[0], shape[1])]:
        maxima = absmax(weight, height, width)
        assert maxima.dtype == torch.float32
        assert maxima.shape == (math.ceil(shape[0] / height), math.ceil(shape[1] / width))
        codes = to_e4m3(weight, maxima / E4M3_MAX, (height, width)).float()
        for i in range(0, shape[0], height):
            for j in range(0, shape[1], width) if height > 1 else [0]:
                part = weight[i : i + height, j : j + width].float()
                assert maxima[i // height, j // width] == part.abs().max()
                expected = (part / (part.abs().max() / E4M3_MAX)).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert torch.equal(codes[i : i + height, j : j + width], expected.float())


@pytest.mark.parametrize("rows", [1, 127, 129, 200, 257])
def test_rows_that_are_no_multiple_of_the_block_make_a_smaller_last_one(rows: int) -> None:
    weight = torch.randn(rows, 40, generator=torch.Generator().manual_seed(2))
    maxima = absmax(weight, 128, 16)
    expected = [[part.abs().max() for part in line.split(16, dim=1)] for line in weight.split(128)]
    assert torch.equal(maxima, torch.tensor(expected))
    last = weight[rows // 128 * 128 :, 32:]
    codes = to_e4m3(weight, maxima, (128, 16))[rows // 128 * 128 :, 32:]
    if last.numel():
        assert torch.equal(codes.float(), (last / maxima[-1, -1]).to(torch.float8_e4m3fn).float())


def test_random_float32_bits_give_the_bytes_of_torch() -> None:
    bits = torch.randint(-(2**31), 2**31, (512, 512), generator=torch.Generator().manual_seed(4), dtype=torch.int64)
    near_one = torch.randn(512, 512, generator=torch.Generator().manual_seed(5))
    for weight in (bits.int().view(torch.float32).nan_to_num(1.0), near_one, near_one * 2.0**-8):
        for scales in (torch.tensor(1.0), torch.linspace(0.1, 1, 512)[:, None], torch.linspace(0.1, 1, 512)[None]):
            expected = (weight / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            assert torch.equal(to_e4m3(weight, scales).view(torch.uint8), expected.view(torch.uint8))


def test_a_nan_makes_its_block_maximum_nan_and_no_other() -> None:
    for dtype in DTYPES:
        weight = torch.ones(4, 8, dtype=dtype)
        weight[1, 2] = math.nan
        assert absmax(weight, 2, 4).isnan().tolist() == [[True, False], [False, False]]


def test_scales_may_be_for_the_tensor_the_rows_or_the_columns() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).bfloat16()
    for scales in (torch.tensor(0.01), torch.rand(6, 1) + 0.1, torch.rand(1, 10) + 0.1, torch.rand(6, 10) + 0.1):
        expected = (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(to_e4m3(weight, scales).float(), expected.float())


def test_large_finite_weights_saturate_and_never_become_nan() -> None:
    weight = torch.tensor([[3.0e38, -3.0e38, 1e-45, math.inf]])
    assert to_e4m3(weight, torch.tensor(2.0**-126)).float().tolist() == [[448.0, -448.0, 0.0, 448.0]]


def test_empty_weights_stay_empty() -> None:
    assert to_e4m3(torch.zeros(0, 8), torch.ones(1, 1)).shape == (0, 8)
    assert absmax(torch.zeros(0, 8), 4, 4).shape == (0, 2)
    assert absmax(torch.zeros(3, 0), 1, 4).shape == (3, 0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="scales: all must be positive"):
        to_e4m3(torch.ones(1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="scales: .* blocks of"):
        to_e4m3(torch.ones(4, 4), torch.ones(1, 1), (2, 2))
    with pytest.raises(ValueError, match="weight: a 2-D"):
        absmax(torch.ones(4), 1, 1)
    with pytest.raises(ValueError, match="block: 0 x 4"):
        absmax(torch.ones(4, 4), 0, 4)
