"""fp8: exact cases by hand for each granularity, and against float64 arithmetic."""

import pytest
import torch

from compress.fp8 import BLOCK, Fp8


def test_powers_of_two_come_back_exactly() -> None:
    weight = torch.tensor([[448.0, 1.0, -0.5, 2**-9], [224.0, -224.0, 0.0, 7.0]]).bfloat16()
    scheme = Fp8("tensor")
    tensors = scheme.encode(weight)
    assert tensors["weight_scale"].tolist() == [1.0]
    assert torch.equal(scheme.decode(tensors), weight)


def test_a_channel_has_its_own_scale() -> None:
    weight = torch.tensor([[448.0, 14.0], [0.875, 0.4375]]).bfloat16()
    tensors = Fp8("channel").encode(weight)
    assert tensors["weight_scale"].tolist() == [[1.0], [2.0**-9]]
    assert torch.equal(Fp8("channel").decode(tensors), weight)


def test_a_ragged_block_has_its_own_scale() -> None:
    weight = torch.ones(BLOCK + 2, BLOCK + 3).bfloat16()
    weight[BLOCK:, BLOCK:] = 448.0
    tensors = Fp8("block").encode(weight)
    assert tensors["weight_scale"].shape == (2, 2) and tensors["weight_scale"][1, 1] == 1.0
    assert torch.equal(Fp8("block").decode(tensors)[BLOCK:, BLOCK:], weight[BLOCK:, BLOCK:])


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_decode_is_the_product_in_float64(granularity: str) -> None:
    torch.manual_seed(0)
    scheme = Fp8(granularity)  # type: ignore[arg-type]
    tensors = scheme.encode(torch.randn(200, 300, dtype=torch.bfloat16))
    scales = tensors["weight_scale"].double()
    if granularity == "block":
        scales = scales.repeat_interleave(BLOCK, 0)[:200].repeat_interleave(BLOCK, 1)[:, :300]
    assert torch.equal(scheme.decode(tensors), (tensors["weight"].double() * scales).bfloat16())


def test_the_relative_error_of_every_normal_value_is_at_most_a_sixteenth_and_the_scales_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512, dtype=torch.float32)
    decoded = Fp8("tensor").decode(Fp8("tensor").encode(weight))
    normal = weight.abs() > weight.abs().max() * 2**-6 / 448
    assert ((decoded - weight).abs() / weight.abs())[normal].max() <= 1 / 16 + 2**-20


def test_gaussian_error_is_what_the_dossier_measured() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512, dtype=torch.bfloat16)
    decoded = Fp8("channel").decode(Fp8("channel").encode(weight))
    relative = ((decoded.double() - weight.double()).square().mean() / weight.double().square().mean()).item()
    assert 6e-4 < relative < 8e-4  # E4M3 on a Gaussian: 7.0e-4 wherever the scale lies


def test_bits_per_weight() -> None:
    assert Fp8("tensor").bytes((256, 256), torch.bfloat16) == 256 * 256 + 2
    assert Fp8("channel").bytes((256, 256), torch.bfloat16) == 256 * 256 + 512
    assert Fp8("block").bytes((256, 257), torch.bfloat16) == 256 * 257 + 2 * 6
