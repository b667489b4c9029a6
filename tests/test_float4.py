"""E2M1 and E8M0: every code point, every halfway point, packing; and the decoder of both against its formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.formats import float4
from compress.formats.float4 import E2M1, E8M0, floor_exponent, pack, to_e2m1, to_e2m1_torch, unpack
from compress.kernels import decode

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ENCODERS = [to_e2m1, to_e2m1_torch]


def code_point(code: int) -> float:
    """From the definition: sign, 2 bits of exponent with bias 1, 1 bit of mantissa, no infinity, no NaN."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def nearest(x: float) -> int:
    """Round half to even by search: of two codes equally near, the even one."""
    codes = range(8, 16) if math.copysign(1, x) < 0 else range(8)
    distance = min(abs(x - code_point(code)) for code in codes)
    ties = [code for code in codes if abs(x - code_point(code)) == distance]
    return ties[0] if len(ties) == 1 else next(code for code in ties if code % 2 == 0)


def ones(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape[0], 1)


@pytest.mark.parametrize("encode", ENCODERS)
def test_a_row_by_hand(encode) -> None:  # type: ignore[no-untyped-def]
    weight = torch.tensor([[0.0, 0.5, -1.0, 1.2, 2.5, 3.5, 5.0, 5.1, -1000.0, 0.25, -0.25, 0.26]])
    assert encode(weight, ones(weight)).tolist() == [[0, 1, 10, 2, 4, 6, 6, 7, 15, 0, 8, 1]]


def test_the_tables_are_the_definitions() -> None:
    assert E2M1.tolist() == [code_point(code) for code in range(16)]
    assert E2M1.signbit().tolist() == [False] * 8 + [True] * 8
    assert E8M0[:255].double().tolist() == [2.0 ** (exponent - 127) for exponent in range(255)] and E8M0[255].isnan()


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_point_survives_at_every_power_of_two(encode, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    for exponent in range(-13, 13) if dtype == torch.float16 else range(-125, 125):
        scale = torch.full((1, 1), 2.0**exponent)
        assert encode((E2M1 * scale).to(dtype), scale).tolist() == [list(range(16))]


@pytest.mark.parametrize("encode", ENCODERS)
def test_halfway_points_and_their_neighbours_round_as_a_search_does(encode) -> None:  # type: ignore[no-untyped-def]
    points = E2M1[:8]
    middles = (points[1:] + points[:-1]) / 2
    inputs = torch.cat([middles, torch.nextafter(middles, points[1:]), torch.nextafter(middles, points[:-1])])
    inputs = torch.cat([inputs, -inputs, torch.tensor([6.0, 6.5, 7.0, 1e6, 1e-45, -1e-45])])
    assert encode(inputs[None], torch.ones(1, 1))[0].tolist() == [nearest(x) for x in inputs.tolist()]


@pytest.mark.parametrize("encode", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_16_bit_value_rounds_as_a_search_does(encode, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()][None]
    for scale in (1.0, 0.0123):
        quotients = (values.float() / torch.tensor(scale))[0]
        thresholds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        # A tie goes to the even code: up from 0.75, 1.75 and 3.5, down from the others.
        up = torch.tensor([False, True, False, True, False, True, False])
        sizes = quotients.abs()[:, None]
        want = torch.where(up, sizes >= thresholds, sizes > thresholds).sum(1) + 8 * quotients.signbit()
        assert torch.equal(encode(values, torch.full((1, 1), scale))[0].long(), want)


def test_random_bits_and_scales_give_the_bytes_of_torch() -> None:
    bits = torch.randint(-(2**31), 2**31, (256, 512), generator=torch.Generator().manual_seed(4), dtype=torch.int64)
    for weight in (bits.int().view(torch.float32), torch.randn(256, 512)):
        for groups in (1, 16, 512):
            scales = torch.rand(256, groups) + 0.1
            assert torch.equal(to_e2m1(weight, scales), to_e2m1_torch(weight, scales))


def test_a_nan_becomes_the_largest_code() -> None:
    weight = torch.tensor([[math.nan, -math.nan, math.inf, -math.inf]])
    for encode in ENCODERS:
        assert encode(weight, torch.ones(1, 1)).tolist() == [[7, 7, 7, 15]]


def test_the_even_column_is_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [8, 7, 0, 9]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x0F], [0x78, 0x90]]
    assert torch.equal(unpack(pack(codes)), codes)


def test_every_byte_is_unpacked_and_packed_again() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert unpack(every).shape == (4, 128) and torch.equal(pack(unpack(every)), every)
    assert torch.equal(pack(unpack(every[:, ::2])), every[:, ::2])


def test_compressed_tensors_reads_the_packed_codes_so() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    theirs = helpers.unpack_fp4_from_uint8(every, 4, 128, torch.float32)
    assert torch.equal(E2M1[unpack(every).long()].view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(helpers.pack_fp4_to_uint8(theirs), every)


def test_floor_exponent_is_floor_log2() -> None:
    values = [2.0**-126, 0.75, 1.0, 1.999, 2.0, 448.0, 3e38]
    assert floor_exponent(torch.tensor(values)).tolist() == [math.floor(math.log2(x)) for x in values]
    assert floor_exponent(torch.tensor([0.0, 1e-45])).tolist() == [-127, -127]


def test_empty_weights_stay_empty() -> None:
    for encode in ENCODERS:
        assert encode(torch.zeros(0, 8), torch.ones(0, 2)).shape == (0, 8)
        assert encode(torch.zeros(3, 0), torch.ones(3, 0)).shape == (3, 0)
    assert pack(torch.zeros(0, 8, dtype=torch.uint8)).shape == (0, 4)
    assert unpack(torch.zeros(3, 0, dtype=torch.uint8)).shape == (3, 0)
    scales = torch.empty(0, 1, dtype=torch.uint8)
    found = decode.e2m1(torch.empty(0, 16, dtype=torch.uint8), scales, torch.ones(256), 32, torch.bfloat16)
    assert found.shape == (0, 32)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="weight: a 2-D"):
        to_e2m1(torch.ones(4), torch.ones(1, 1))
    with pytest.raises(ValueError, match="scales: .* are no groups"):
        to_e2m1(torch.ones(4, 6), torch.ones(4, 4))
    with pytest.raises(ValueError, match="scales: all must be positive"):
        to_e2m1(torch.ones(1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="codes: 3 columns"):
        pack(torch.zeros(1, 3, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_decoders_give_the_bits_of_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, groups, group_size in ((3, 2, 32), (1, 1, 16), (5, 7, 2), (2, 3, 6), (2, 3, 64)):
        codes = torch.randint(0, 16, (rows, groups * group_size), dtype=torch.uint8)
        scales, steps = torch.randint(0, 256, (rows, groups), dtype=torch.uint8), torch.rand(256) + 0.01
        spread = steps[scales.int()].repeat_interleave(group_size, 1)
        want = (torch.tensor([code_point(code) for code in range(16)])[codes.long()] * spread).to(dtype)
        for function in (decode.e2m1, decode.e2m1_torch):
            got = function(pack(codes), scales, steps, group_size, dtype)
            assert got.dtype == dtype and torch.equal(got, want)
            assert torch.equal(got.signbit(), want.signbit())  # zeros too


def test_a_packed_weight_and_scales_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="packed: the shape is"):
        scales = torch.ones(4, 1, dtype=torch.uint8)
        decode.e2m1(torch.zeros(4, 8, dtype=torch.uint8), scales, torch.ones(256), 32, torch.bfloat16)


def test_e4m3_is_decoded_to_another_dtype_than_its_scales() -> None:
    weight = torch.arange(0, 64, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 32)
    scales = torch.tensor([[2.0**-30], [2.0**30]])
    for function in (decode.e4m3, decode.e4m3_torch):
        got = function(weight, scales, (1, 32), torch.bfloat16)
        assert torch.equal(got, (weight.double() * scales.double()).bfloat16())


def test_threads_do_not_change_a_byte(on_threads: Any) -> None:
    torch.manual_seed(0)
    weight, scales = torch.randn(100, 1024).bfloat16(), torch.rand(100, 64) + 0.1
    packed, *others = on_threads(lambda: float4.pack(to_e2m1(weight, scales)))
    assert all(torch.equal(packed, other) for other in others)
    numbers, steps = torch.randint(0, 256, (100, 64), dtype=torch.uint8), torch.rand(256)
    decoded, *others = on_threads(lambda: decode.e2m1(packed, numbers, steps, 16, torch.bfloat16))
    assert all(torch.equal(decoded, other) for other in others)
