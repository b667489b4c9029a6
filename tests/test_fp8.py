"""fp8: exact cases by hand for each granularity, and against float64 arithmetic."""

import pytest
import torch

import compress
from compress.fp8 import BLOCK, Fp8
from compress.registry import make
from compress.stats import Stats


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


def test_a_linear_rounds_each_token_to_e4m3() -> None:
    # scales of 1 and 2: 17 lies halfway between 16 and 18, 34 between 32 and 36, and both go to the even mantissa
    x = torch.tensor([[448.0, 17.0], [896.0, 34.0]])
    for granularity in ("tensor", "channel"):
        scheme = Fp8(granularity, "dynamic")  # type: ignore[arg-type]
        got = scheme.linear(x, scheme.encode(torch.tensor([[448.0, 1.0]])))
        assert got.tolist() == [[448.0 * 448 + 16], [896.0 * 448 + 32]]
        assert Fp8(granularity).linear(x, scheme.encode(torch.tensor([[448.0, 1.0]]))).tolist() == [  # type: ignore[arg-type]
            [448.0 * 448 + 17],
            [896.0 * 448 + 34],
        ]


def test_blocks_scale_128_values_of_a_token() -> None:
    scheme = Fp8("block", "dynamic")
    tensors = scheme.encode(torch.eye(2 * BLOCK))
    x = torch.ones(1, 2 * BLOCK)
    x[0, 0], x[0, BLOCK], x[0, 1] = 1e6, 448.0, 3.0
    got = scheme.linear(x, tensors)[0]
    assert got[0] == pytest.approx(1e6, rel=1e-6)
    # 1e6 / 448 is the step's reach: 3 and 1 vanish beside it, and 1 stays in the other group
    assert not got[1:BLOCK].gt(5).any() and torch.equal(got[BLOCK + 1 :], x[0, BLOCK + 1 :])


def test_a_static_scale_comes_from_the_largest_input() -> None:
    scheme = Fp8("tensor", "static")
    absmax = torch.tensor([3.0, 896.0])
    tensors = scheme.encode(torch.tensor([[448.0, 1.0]]), Stats(1, absmax**2, absmax, absmax))
    assert tensors["input_scale"].tolist() == [2.0]
    # 34 / 2 lies halfway between 16 and 18, and what lies beyond 2 * 448 is taken to it
    assert scheme.linear(torch.tensor([[34.0, 5000.0]]), tensors).tolist() == [[32.0 * 448 + 896.0]]


def test_a_width_that_groups_do_not_divide_is_scaled_by_token_and_channel() -> None:
    scheme = Fp8("block", "dynamic")
    assert scheme.fit((64, 2 * BLOCK)) == scheme
    assert scheme.fit((64, 100)) == Fp8("channel", "dynamic")
    assert Fp8("block").fit((64, 100)) == Fp8("block")
    weight = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    options = {"granularity": "block", "activations": "dynamic"}
    decoded = compress.decode(compress.encode(weight, "fp8", **options), "fp8", **options)
    assert torch.equal(decoded, Fp8("channel").decode(Fp8("channel").encode(weight)))


def test_blocks_do_not_go_with_static_activations() -> None:
    with pytest.raises(ValueError, match="granularity=block has no form with activations=static"):
        make("fp8", {"granularity": "block", "activations": "static"})


def test_only_static_activations_need_calibration() -> None:
    needs = {how: make("fp8", {"activations": how}).needs_calibration for how in ("none", "dynamic", "static")}
    assert needs == {"none": False, "dynamic": False, "static": True}
