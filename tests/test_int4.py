"""int4: exact cases by hand, and against a decoder written value by value."""

import math

import pytest
import torch

from compress.int4 import Int4
from compress.int8 import Int8
from compress.kernels import groups
from compress.registry import make


def slow_decode(tensors: dict[str, torch.Tensor], scheme: Int4) -> torch.Tensor:
    """(q - zero) * scale, one value at a time from one long integer per row."""
    rows, columns = tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"].double()
    mask = (1 << scheme.bits) - 1

    def stream(words: torch.Tensor) -> int:
        return sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))

    weight = torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        bits = stream(tensors["weight_packed"][r])
        for c in range(columns):
            group = c // scheme.group_size
            zero = 1 << (scheme.bits - 1)
            if not scheme.symmetric:
                zero = (stream(tensors["weight_zero_point"][:, group]) >> (scheme.bits * r)) & mask
            q = (bits >> (scheme.bits * c)) & mask
            weight[r, c] = (q - zero) * scales[r, group]
    return weight.to(tensors["weight_scale"].dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_decode_equals_the_slow_decoder(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    scheme = Int4(bits=bits, group_size=32, symmetric=symmetric)
    tensors = scheme.encode(torch.randn(5, 96, dtype=torch.bfloat16))
    assert torch.equal(scheme.decode(tensors), slow_decode(tensors, scheme))


def test_integers_on_the_grid_come_back_exactly() -> None:
    # -8..7 is the whole grid of 4 bits; the scale is 1 and nothing has to be rounded.
    weight = torch.arange(-8.0, 8.0).repeat(2, 2).bfloat16()
    scheme = Int4(group_size=16, symmetric=False)
    assert torch.equal(scheme.decode(scheme.encode(weight)), weight)


def test_a_packed_word_holds_eight_values_low_bits_first() -> None:
    # absmax spans 15 steps, so the scale is 7.5 / 7.5 = 1; q + 8 is 1, 2, 3, 4, 12, 13, 14, and 15 for the clipped 7.5.
    weight = torch.tensor([[-7.0, -6, -5, -4, 4, 5, 6, 7.5]]).bfloat16()
    tensors = Int4(group_size=8, clip="absmax").encode(weight)
    assert tensors["weight_scale"].tolist() == [[1.0]]
    assert tensors["weight_packed"].tolist() == [[0xFEDC4321 - (1 << 32)]]
    assert tensors["weight_shape"].tolist() == [1, 8]


@pytest.mark.parametrize(
    ("width", "group", "fitted"),
    [
        (256, 128, 128),
        (172, 128, 86),
        (352, 128, 32),
        (64, 128, 64),
        (131, 128, 131),
        (8, 128, 8),
        (64, 7, 4),
        (172, 7, 4),
    ],
)
def test_a_group_that_does_not_divide_gives_way(width: int, group: int, fitted: int) -> None:
    assert Int4(group_size=group).fit((4, width)).group_size == fitted


def test_bits_per_weight_count_scales_zeros_and_shape() -> None:
    # 4096 * 4096 weights: 4 bits, 16 per 128 for the scale, 4 per 128 for the zero, 16 bytes for the shape.
    count = 4096 * 4096
    assert 8 * Int4().bytes((4096, 4096), torch.bfloat16) == count * 4.125 + 128
    assert 8 * Int4(symmetric=False).bytes((4096, 4096), torch.bfloat16) == count * (4 + 20 / 128) + 128


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searching_the_clip_is_never_worse_than_absmax(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((64, 256)).bfloat16()
    options = {"bits": bits, "group_size": 64, "symmetric": symmetric}
    errors = []
    for clip in ("mse", "absmax"):
        scheme = make("int4", {**options, "clip": clip})
        errors.append(
            (scheme.decode(scheme.encode(weight)).double() - weight.double()).square().view(64, -1, 64).sum(-1)
        )
    assert (errors[0] <= errors[1] * (1 + 1e-9)).all()


def test_gaussian_error_is_what_theory_says() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 1024, dtype=torch.bfloat16)
    scheme = Int4()
    relative = (
        scheme.decode(scheme.encode(weight)).double() - weight.double()
    ).square().mean() / weight.double().square().mean()
    # The optimal uniform 4-bit quantizer of a Gaussian has 0.0115 (Max, 1960) without adapting to the group; groups of
    # 128 with a scale each do better.
    assert 0.005 < relative.item() < 0.0115


def test_options_out_of_range_are_named() -> None:
    for options, message in (
        ({"bits": 9}, "bits is 9"),
        ({"bits": 1}, "bits is 1"),
        ({"group_size": 0}, "group_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make("int4", options)
    assert Int8().bits == 8 and math.isclose(
        8 * Int8().bytes((128, 128), torch.bfloat16) / 128**2, 8.125 + 128 / 128**2
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_for_the_kernels_of_a_gpu_are_those_of_the_weight(symmetric: bool) -> None:
    scheme = Int4(bits=5, group_size=32, symmetric=symmetric)
    tensors = scheme.encode(torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).bfloat16())
    packed, scales, zeros = tensors["weight_packed"], tensors["weight_scale"], scheme._zeros(tensors)
    held = groups.pack(packed, scales, (7, 96), scales.dtype, 5, (1, 32), zeros=zeros)
    index = torch.tensor([[6, 0], [3, 6]])
    assert torch.equal(scheme.rows(held, index), scheme.decode(tensors)[index])
    assert torch.equal(scheme.rows(tensors, index), scheme.decode(tensors)[index])
