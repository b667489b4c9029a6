"""The contract that every registered scheme meets, whatever it does."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compress
from compress.interchange import method
from compress.planning import Plan, from_config
from compress.registry import SCHEMES, make, options, scheme_class
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats

# |W - W'| / |W| that a Gaussian weight must stay under with the scheme's defaults.
BOUNDS = {"int4": 0.11, "int8": 0.01, "fp8": 0.03, "nf4": 0.1, "df11": 1e-12}
BOUNDS |= {"mxfp4": 0.12, "mxfp8": 0.03, "nvfp4": 0.09, "bfp": 0.13, "kmeans": 0.09, "bitstack": 0.01}
SHAPES = [(16, 128), (1, 128), (33, 96), (24, 172), (7, 131), (40, 257), (3, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = (3, 8)  # each scheme tests the others itself


def gaussian(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def encode(scheme: Scheme, weight: Tensor) -> Tensors:
    """What the scheme stores; where it needs calibration, of a layer whose inputs are Gaussian."""
    if not scheme.needs_calibration:
        return scheme.encode(weight)
    x = gaussian((512, weight.shape[1]), torch.float32)
    return scheme.encode(weight, Stats(len(x), x.square().mean(0), x.abs().mean(0), x.abs().amax(0), x.T @ x / len(x)))


def variants(name: str) -> list[Scheme]:
    """The scheme with each choice of each of its options, the others at their defaults."""
    made = [make(name)]
    for option in options(name):
        values = option["choices"] or ([True, False] if option["type"] == "bool" else [])
        made += [make(name, {option["name"]: value}) for value in values]
    known = [option["name"] for option in options(name)]
    if "bits" in known:
        others: list[dict[str, bool]] = [{"symmetric": s} for s in (True, False)] if "symmetric" in known else [{}]
        made += [make(name, {"bits": bits, **other}) for bits in WIDTHS for other in others]
    if "mantissa_bits" in known:
        made += [make(name, {"mantissa_bits": bits, "full_range": f}) for bits in WIDTHS for f in (True, False)]
    return list(dict.fromkeys(made))


EVERY = [pytest.param(scheme, id=str(scheme)) for name in SCHEMES for scheme in variants(name)]


def error(weight: Tensor, decoded: Tensor) -> float:
    return ((weight.double() - decoded.double()).norm() / weight.double().norm()).item()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_gaussian_weight_comes_back_within_the_bound_of_its_scheme(name: str) -> None:
    weight = gaussian((64, 256))
    assert error(weight, compress.decode(compress.encode(weight, name), name)) < BOUNDS[name]


@pytest.mark.parametrize("scheme", EVERY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_stored_is_what_was_planned_and_comes_back_in_shape_and_dtype(
    scheme: Scheme, shape: tuple[int, int]
) -> None:
    for dtype in DTYPES:
        weight = gaussian(shape, dtype)
        if not scheme.takes(Spec(dtype, shape)):
            continue
        before, fitted = weight.clone(), scheme.fit(shape).for_dtype(dtype)
        tensors = encode(fitted, weight)
        assert torch.equal(weight, before), "the input was changed"
        stored = {name: Spec.of(name, tensor) for name, tensor in tensors.items()}
        planned, size = fitted.specs(shape, dtype), sum(tensor.nbytes for tensor in tensors.values())
        if fitted.sized_by_data:
            assert all(spec.bytes <= planned[n].bytes and spec.dtype == planned[n].dtype for n, spec in stored.items())
            assert size == fitted.measure(weight) <= fitted.bytes(shape, dtype)
        else:
            assert stored == planned
            assert size == fitted.measure(weight) == fitted.bytes(shape, dtype)
        fitted.check(stored)
        assert fitted.original(stored) == Spec(dtype, shape)
        decoded = fitted.decode(tensors)
        assert (decoded.dtype, tuple(decoded.shape)) == (dtype, shape)
        assert decoded.isfinite().all()


@pytest.mark.parametrize("scheme", EVERY)
def test_the_same_weight_is_encoded_to_the_same_bytes(scheme: Scheme) -> None:
    weight = gaussian((48, 128))
    first, second = encode(scheme, weight), encode(scheme, weight)
    assert all(
        torch.equal(a.flatten().view(torch.uint8), second[name].flatten().view(torch.uint8))
        for name, a in first.items()
    )


@pytest.mark.parametrize("scheme", EVERY)
def test_linear_multiplies_with_the_decoded_weight(scheme: Scheme) -> None:
    tensors = encode(scheme, gaussian((40, 128)))
    x, bias = torch.randn(3, 5, 128, dtype=torch.bfloat16), torch.randn(40, dtype=torch.bfloat16)
    want = F.linear(x.double(), scheme.decode(tensors).double(), bias.double())
    got = scheme.linear(x, tensors, bias)
    assert got.shape == (3, 5, 40)
    # bfloat16 keeps 8 bits: half a unit in the last place of the result is 2**-9 of it. Activations of 8 bits are off
    # by 0.027 (E4M3) or less, and so is the product.
    bound = 2**-8 if getattr(scheme, "activations", "none") == "none" else 0.04
    assert ((got.double() - want).norm() / want.norm()).item() < bound


@pytest.mark.parametrize("scheme", EVERY)
def test_rows_are_those_of_the_decoded_weight(scheme: Scheme) -> None:
    for shape in ((40, 128), (300, 257), (1, 64)):
        if not scheme.takes(Spec(torch.bfloat16, shape)):
            continue
        fitted = scheme.fit(shape)
        tensors = encode(fitted, gaussian(shape))
        several = torch.tensor([[shape[0] - 1, 0, 0], [shape[0] // 2, 0, shape[0] - 1]])
        for index in (several, several[0, 0], several[:, :0]):  # one number, and none
            assert torch.equal(fitted.rows(tensors, index), fitted.decode(tensors)[index])


@pytest.mark.parametrize("scheme", EVERY)
def test_zeros_come_back_as_zeros(scheme: Scheme) -> None:
    weight = torch.zeros(16, 128, dtype=torch.bfloat16)
    weight[3] = 1.0
    decoded = scheme.decode(encode(scheme, weight))
    assert not decoded[:3].any() and not decoded[4:].any()


@pytest.mark.parametrize("scheme", EVERY)
def test_one_outlier_stays_finite_and_near(scheme: Scheme) -> None:
    weight = gaussian((16, 128))
    weight[5, 7] = 1e4
    decoded = scheme.decode(encode(scheme, weight))
    assert decoded.isfinite().all()
    assert not scheme.lossless or torch.equal(decoded, weight)
    assert abs(decoded[5, 7].item() / 1e4 - 1) < 0.6  # at 2 bits a symmetric grid ends short of its largest value


@pytest.mark.parametrize("scheme", EVERY)
def test_tiny_and_huge_weights_stay_finite(scheme: Scheme) -> None:
    for scale, dtype in itertools.product((1e-38, 1e-30, 1e30), (torch.bfloat16, torch.float32)):
        weight = gaussian((8, 128), torch.float32).mul(scale).to(dtype)
        assert scheme.decode(encode(scheme, weight)).isfinite().all()


@pytest.mark.parametrize("scheme", EVERY)
def test_a_scheme_survives_config_json(scheme: Scheme) -> None:
    fields = scheme.to_dict()
    assert make(fields.pop("scheme"), fields) == scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_nan_and_infinity_are_refused_unless_they_come_back(name: str) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = gaussian((8, 128))
        weight[1, 2] = bad
        if scheme_class(name).lossless:
            assert torch.equal(
                compress.decode(compress.encode(weight, name), name).view(torch.int16), weight.view(torch.int16)
            )
            continue
        with pytest.raises(ValueError, match="NaN or infinity"):
            compress.encode(weight, name)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_linear_of_ours_carries_bias_and_weight(name: str) -> None:
    weight, bias = gaussian((16, 96)), torch.randn(16, dtype=torch.bfloat16)
    linear = compress.linear(weight, name, bias=bias)
    x = torch.randn(2, 96, dtype=torch.bfloat16)
    assert torch.equal(linear(x), F.linear(x, linear.weight, bias))
    assert (linear.out_features, linear.in_features) == (16, 96)


@pytest.mark.parametrize("scheme", EVERY)
def test_what_needs_calibration_says_so_without_it(scheme: Scheme) -> None:
    if getattr(scheme, "activations", "none") == "static":
        with pytest.raises(ValueError, match="--calibration"):
            scheme.encode(gaussian((8, 128)))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_what_it_is(name: str) -> None:
    cls = scheme_class(name)
    assert cls.name == name and cls.__doc__ and dataclasses.is_dataclass(cls)


@pytest.mark.parametrize("name", SCHEMES)
def test_an_interchange_form_is_read_back_as_the_scheme(name: str) -> None:
    for scheme in variants(name):
        if scheme.interchange is None:
            continue
        plan = Plan({"model.a": _packed(scheme)}, interchange=method(scheme))
        stored = dict(plan.stored_specs("model.a", Spec(torch.bfloat16, (128, 128))).values())
        read = from_config(plan.to_config(), stored)["model.a"].scheme
        assert read.interchange == scheme.interchange


def test_what_is_no_weight_or_no_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="a tensor is needed, not list"):
        compress.encode([1.0], "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a 2-D bfloat16"):
        compress.encode(torch.ones(3), "int4")
    with pytest.raises(
        ValueError, match=r"no weight_packed is stored \(given: weight, weight_scale\); name the scheme"
    ):
        compress.decode(compress.encode(gaussian((4, 32)), "fp8"), "int4")


def _packed(scheme: Scheme):  # type: ignore[no-untyped-def]
    from compress.planning import Packed

    return Packed(scheme, "model.a.weight")
