"""int8 with quantized activations: exact cases by hand, and the weights beside those of int4's coder."""

from typing import Any

import pytest
import torch

import compress
from compress.int4 import Int4
from compress.int8 import Int8
from compress.registry import make
from compress.stats import Stats


def calibrated(absmax: torch.Tensor) -> Stats:
    return Stats(1, absmax.square(), absmax, absmax)


def test_a_row_by_hand() -> None:
    weight = torch.tensor([[-127.5, 1.0, 64.0], [0.0, 0.0, 0.0]])
    tensors = Int8(clip="absmax", activations="dynamic").encode(weight)
    assert tensors["weight"].tolist() == [[-128, 1, 64], [0, 0, 0]] and tensors["weight"].dtype == torch.int8
    assert tensors["weight_scale"].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("width", [1, 3, 64, 131])
def test_the_weights_are_those_of_one_group_for_each_row(width: int) -> None:
    weight = torch.randn(9, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    for clip in ("mse", "absmax"):
        grouped = Int4(bits=8, group_size=width, clip=clip)  # type: ignore[arg-type]
        scheme = Int8(clip=clip, activations="dynamic")  # type: ignore[arg-type]
        tensors = scheme.encode(weight)
        assert torch.equal(scheme.decode(tensors), grouped.decode(grouped.encode(weight)))
        product = tensors["weight"].double() * tensors["weight_scale"].double()
        assert torch.equal(scheme.decode(tensors), product.bfloat16())


def test_a_linear_multiplies_integers_with_integers() -> None:
    # |x| up to 127.5 and |w| up to 127.5: scales are 1, and every product is that of two integers
    weight = torch.tensor([[-127.5, 2.0, 3.0]])
    x = torch.tensor([[127.5, 2.5, -1.4], [12.75, 0.0, 0.1]])
    scheme = Int8(clip="absmax", activations="dynamic")
    got = scheme.linear(x, scheme.encode(weight), torch.tensor([0.5]))
    assert got[0].item() == 127 * -128 + 2 * 2 + -1 * 3 + 0.5
    assert got[1].item() == pytest.approx(0.1 * (127 * -128 + 0 + 1 * 3) + 0.5, rel=1e-6)


def test_a_static_scale_is_stored_and_used() -> None:
    scheme = Int8(clip="absmax", activations="static")
    tensors = scheme.encode(torch.tensor([[-127.5, 1.0]]), calibrated(torch.tensor([254.0, 1.0])))
    assert tensors["input_scale"].tolist() == [2.0]
    got = scheme.linear(torch.tensor([[1000.0, 2.9]]), tensors)
    assert got.item() == 254.0 * -128 + 2.0


def test_bits_per_weight() -> None:
    assert Int8(activations="dynamic").bytes((256, 512), torch.bfloat16) == 256 * 512 + 2 * 256
    assert Int8(activations="static").bytes((256, 512), torch.bfloat16) == 256 * 512 + 2 * 256 + 2


def test_without_smoothing_only_static_activations_need_calibration() -> None:
    def needs(**options: Any) -> dict[str, bool]:
        kinds = ("none", "dynamic", "static")
        return {how: make("int8", {"activations": how, **options}).needs_calibration for how in kinds}

    assert needs(smooth=False) == {"none": False, "dynamic": False, "static": True}
    assert needs() == {"none": False, "dynamic": True, "static": True}


@pytest.mark.parametrize("option", [{"bits": 4}, {"group_size": 64}, {"symmetric": False}])
def test_options_of_grouped_weights_do_not_go_with_quantized_activations(option: dict[str, object]) -> None:
    make("int8", option)
    with pytest.raises(ValueError, match="leave out bits, group_size and symmetric"):
        make("int8", {**option, "activations": "dynamic"})


def test_scales_without_a_second_dimension_are_those_of_rows() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = compress.encode(weight, "int8", activations="dynamic")
    others = {**tensors, "weight_scale": tensors["weight_scale"].flatten()}
    found, wanted = (compress.decode(some, "int8", activations="dynamic") for some in (others, tensors))
    assert torch.equal(found, wanted)
