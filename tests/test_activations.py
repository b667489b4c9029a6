"""Activations in 8 bits: exact cases by hand, a loop over values, and the functions of compressed-tensors itself."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.activations import form, input_scale
from compress.kernels.activations import e4m3, int8
from compress.stats import Stats

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(2, 5, 256), (1, 1, 128), (3, 2, 384)]


def calibrated(absmax: Tensor) -> Stats:
    return Stats(1, absmax.square(), absmax, absmax)


def slow(x: Tensor, largest: float, nearest: Callable[[float], float], low: float, high: float) -> list[float]:
    """One token, value by value in float32."""
    values = list(x.numpy())
    scale = max(abs(value) for value in values) / np.float32(largest)
    return [float(np.float32(nearest(min(max(float(value / scale), low), high))) * scale) for value in values]


def nearest_e4m3(x: float) -> float:
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), -6) - 3) if x else 1.0
    return round(x / step) * step  # half to even, as the hardware


def test_a_token_by_hand() -> None:
    x = torch.tensor([[448.0, -20.0, 17.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.5, 1.0, -0.7, 2.0**-8]])
    # 17 lies halfway between 16 and 18, and goes to the even mantissa; the last token's scale is 2**-7
    want = [[448.0, -20.0, 16.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.5, 1.0, -0.6875, 2.0**-8]]
    assert e4m3(x).tolist() == want
    x = torch.tensor([[127.5, -127.5, 2.5, 3.5, 0.4], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert int8(x).tolist() == [[127.0, -128.0, 2.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]


def test_a_static_scale_is_for_all_tokens_and_what_lies_beyond_it_saturates() -> None:
    x = torch.tensor([[1000.0, 448.0, 1.0], [-1e30, 225.0, 0.5]])
    assert e4m3(x, torch.tensor([0.5])).tolist() == [[224.0, 224.0, 1.0], [-224.0, 224.0, 0.5]]
    assert int8(x, torch.tensor([0.5])).tolist() == [[63.5, 63.5, 1.0], [-64.0, 63.5, 0.5]]


def test_values_are_those_of_a_loop() -> None:
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    x[2, 5] = 1e4
    for i, token in enumerate(x):
        assert e4m3(x)[i].tolist() == slow(token, 448, nearest_e4m3, -448, 448)
        assert int8(x)[i].tolist() == slow(token, 127.5, round, -128, 127)


def test_a_group_is_scaled_as_a_token_of_its_own() -> None:
    x = torch.randn(2, 3, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[..., 128:256] *= 1000
    parts = [e4m3(part) for part in x.split(128, -1)]
    assert torch.equal(e4m3(x, group_size=128), torch.cat(parts, -1))
    assert not torch.equal(e4m3(x, group_size=128), e4m3(x))


def test_a_token_does_not_depend_on_the_others_nor_on_how_they_are_batched() -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for function in (e4m3, int8):
        assert torch.equal(function(x), function(x.flatten(0, 1)).view(2, 3, 64))
        assert torch.equal(function(x)[1, 2], function(x[1, 2]))


@pytest.mark.parametrize("function", [e4m3, int8])
def test_shape_and_dtype_stay_and_the_input_is_left_alone(function: Callable[..., Tensor]) -> None:
    for dtype in DTYPES:
        for shape in ((4, 6), (0, 6), (2, 0, 6), (1, 1)):
            x = torch.randn(shape).to(dtype)
            before = x.clone()
            got = function(x)
            assert (got.dtype, got.shape) == (dtype, x.shape) and torch.equal(x, before)
    assert e4m3(torch.zeros(0, 256), group_size=128).shape == (0, 256)


def test_huge_and_tiny_tokens_stay_finite_and_nan_stays_nan() -> None:
    for dtype in DTYPES:
        # half of the largest, because the scale is rounded and -128 steps of 1 / 127.5 are more than 1
        for size in (torch.finfo(dtype).max / 2, torch.finfo(dtype).tiny, 1e-30):
            x = torch.tensor([[size, -size, 0.0]]).to(dtype)
            assert e4m3(x).isfinite().all() and int8(x).isfinite().all()
        assert e4m3(torch.tensor([[float("nan"), 1.0]], dtype=dtype)).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_that_of_compressed_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    generator = torch.Generator().manual_seed(0)
    for size in (1e-30, 1e-5, 1.0, 300.0, 1e30):
        x = (torch.randn(shape, generator=generator) * size).clamp(*_ends(dtype)).to(dtype)
        x[0, 0] = 0
        for kind, function in (("float", e4m3), ("int", int8)):
            for group in (None, 128) if kind == "float" else (None,):
                args = package.QuantizationArgs(**form(kind, "dynamic", group))
                scale, zero = utils.compute_dynamic_scales_and_zp(x, args, None)
                got = function(x, group_size=group) if group else function(x)
                assert torch.equal(got, lifecycle.fake_quantize(x, scale, zero, args)), (kind, group, size)
            args = package.QuantizationArgs(**form(kind, "static"))
            scale = torch.tensor([size / 100]).clamp(*_ends(dtype)).to(dtype)
            if scale > 0:
                assert torch.equal(function(x, scale), lifecycle.fake_quantize(x, scale, None, args)), (kind, size)


def test_a_static_scale_takes_the_largest_input_of_calibration_to_the_largest_code() -> None:
    weight = torch.zeros(2, 3, dtype=torch.bfloat16)
    scale = input_scale("fp8", weight, calibrated(torch.tensor([1.0, 896.0, 3.0])), 448)
    assert scale.dtype == torch.bfloat16 and scale.tolist() == [2.0]
    assert input_scale("int8", weight, calibrated(torch.zeros(3)), 127).tolist() == [1.0]


def test_what_was_not_calibrated_or_not_of_this_layer_is_refused() -> None:
    weight = torch.zeros(2, 3, dtype=torch.float16)
    for stats, message in (
        (None, "fp8: activations=static needs calibration data; give --calibration"),
        (calibrated(torch.ones(4)), "4 channels were calibrated, and in_features is 3"),
        (calibrated(torch.tensor([1.0, float("nan"), 2.0])), "the largest input in calibration is nan"),
        (calibrated(torch.tensor([1.0, 1e30, 2.0])), "the largest input in calibration is 1"),  # beyond float16
    ):
        with pytest.raises(ValueError, match=message):
            input_scale("fp8", weight, stats, 448)


def _ends(dtype: torch.dtype) -> tuple[float, float]:
    return torch.finfo(dtype).min, torch.finfo(dtype).max
