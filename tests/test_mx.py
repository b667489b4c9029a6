"""mxfp4 and mxfp8: blocks by hand, the specification's rule, the search against an exhaustive one, whole models."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress.against import compare
from compress.exporting import export
from compress.mx import Mxfp4, Mxfp8
from compress.scheme import Scheme, Spec
from compress.stats import Stats

SCHEMES = {"mxfp4": Mxfp4(), "mxfp8": Mxfp8()}
LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def plain(scheme: Scheme) -> Scheme:
    return dataclasses.replace(scheme, search=False)


def stats(second_moment: Tensor) -> Stats:
    return Stats(1, second_moment, second_moment.sqrt(), second_moment.sqrt())


def values(name: str) -> Tensor:
    """The magnitudes of the element type, ascending, from its definition."""
    exponents, mantissas, bias = (4, 2, 1) if name == "mxfp4" else (16, 8, 7)
    found = [
        m / mantissas * 2.0 ** (1 - bias) if e == 0 else (1 + m / mantissas) * 2.0 ** (e - bias)
        for e in range(exponents)
        for m in range(mantissas)
    ]
    return torch.tensor([v for v in found if v <= LARGEST[name]], dtype=torch.float64)


def rounded(name: str, block: Tensor, exponent: int) -> Tensor:
    """block: float64. What a search over all values makes of it at the scale 2**exponent; of a tie either will do."""
    nearest = (block.abs()[:, None] / 2.0**exponent - values(name)).abs().argmin(1)
    return values(name)[nearest] * 2.0**exponent * block.sign()


def spread(seed: int, rows: int, columns: int) -> Tensor:
    """Gaussian with heavy tails, and columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) ** -0.3
    return weight * torch.logspace(-3, 1, columns)


def test_a_block_of_mxfp4_by_hand() -> None:
    block = torch.tensor([6, -4, 3, 2, 1.5, 1, 0.5, 0] * 4) / 4
    weight = torch.stack([block, 8 * block]).bfloat16()
    tensors = Mxfp4().encode(weight)
    # floor(log2(1.5)) - floor(log2(6)) = -2: the byte 127 - 2; three more for eight times the block
    assert tensors["weight_scale"].tolist() == [[125], [128]]
    assert tensors["weight_packed"][0, :4].tolist() == [0xE7, 0x45, 0x23, 0x01]
    assert torch.equal(Mxfp4().decode(tensors), weight)


def test_a_block_of_mxfp8_by_hand() -> None:
    weight = torch.tensor([[448.0, -1.0, 2**-9, 0.0] * 8]).bfloat16() / 32
    tensors = Mxfp8().encode(weight)
    assert tensors["weight_scale"].tolist() == [[127 - 5]]
    assert tensors["weight"].float()[0, :4].tolist() == [448.0, -1.0, 2**-9, 0.0]
    assert torch.equal(Mxfp8().decode(tensors), weight)


@pytest.mark.parametrize("name", SCHEMES)
def test_without_search_the_exponent_is_that_of_the_specification(name: str) -> None:
    weight = spread(0, 40, 256)
    found = plain(SCHEMES[name]).encode(weight)["weight_scale"]
    for row in range(40):
        for block in range(8):
            largest = weight[row, 32 * block : 32 * block + 32].abs().max().item()
            want = math.floor(math.log2(largest)) - math.floor(math.log2(LARGEST[name])) + 127
            assert found[row, block] == want


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_search_finds_what_an_exhaustive_one_finds(name: str, weighted: bool) -> None:
    weight = spread(1, 12, 160)
    importance = torch.rand(160, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else torch.ones(160)
    tensors = SCHEMES[name].encode(weight, stats(importance) if weighted else None)
    rule = plain(SCHEMES[name]).encode(weight)["weight_scale"]
    moved = 0
    for row in range(12):
        for block in range(5):
            part = slice(32 * block, 32 * block + 32)
            exact, given = weight[row, part].double(), (importance + importance.median())[part].double()
            first = int(rule[row, block])
            errors = {
                e: ((rounded(name, exact, e - 127) - exact).square() * given).sum().item()
                for e in (first, first + 1, first - 1)
            }
            found = int(tensors["weight_scale"][row, block])
            assert errors[found] <= min(errors.values()) * (1 + 1e-5)
            moved += found != first
    assert moved > 5
    if not weighted:
        scheme = dataclasses.replace(SCHEMES[name], dtype="float32")
        exponents = tensors["weight_scale"].int() - 127
        for row in range(12):
            want = [rounded(name, weight[row, 32 * b : 32 * b + 32].double(), int(exponents[row, b])) for b in range(5)]
            assert torch.equal(scheme.decode(tensors)[row].double().abs(), torch.cat(want).abs())


@pytest.mark.parametrize("name, rule, searched", [("mxfp4", 0.0130, 0.0124), ("mxfp8", 8.6e-4, 7.1e-4)])
def test_gaussian_error_with_and_without_search(name: str, rule: float, searched: float) -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    for scheme, want in ((plain(SCHEMES[name]), rule), (SCHEMES[name], searched)):
        error = (scheme.decode(scheme.encode(weight)).double() - weight.double()).square().mean()
        assert error / weight.double().square().mean() == pytest.approx(want, rel=0.02)


def test_inputs_that_matter_are_rounded_better() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)).bfloat16()
    moments = torch.where(torch.arange(512) % 8 == 0, 100.0, 0.01)

    def error(given: Stats | None) -> float:
        decoded = Mxfp4().decode(Mxfp4().encode(weight, given))
        return float(((decoded.double() - weight.double()).square() * moments).sum())

    assert error(stats(moments)) < 0.97 * error(None)
    assert error(stats(torch.full((512,), 7.0))) == error(None)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_and_smallest_numbers_of_a_dtype_stay_finite_and_near(name: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scheme = SCHEMES[name].for_dtype(dtype)
    for value in (info.max, -info.max, info.max / 2, info.smallest_normal * 2**20, info.smallest_normal):
        weight = torch.full((2, 64), value, dtype=dtype)
        weight[1, 3] = 0
        decoded = scheme.decode(scheme.encode(weight))
        assert decoded.dtype == dtype and decoded.isfinite().all() and not decoded[1, 3]
        assert ((decoded[0].double() / value) - 1).abs().max() <= 0.26  # 6 * 2**13 of fp16's 65504 is 25 % less


@pytest.mark.parametrize("name", SCHEMES)
def test_a_block_of_zeros_has_the_scale_one(name: str) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = 1e-20
    tensors = SCHEMES[name].encode(weight)
    assert tensors["weight_scale"][0].tolist() == [127, 127] and tensors["weight_scale"][1, 1] < 64
    assert not SCHEMES[name].decode(tensors)[0].any()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_tensors_decodes_the_same_bits(name: str, dtype: torch.dtype) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = SCHEMES[name].for_dtype(dtype)
    form = scheme.interchange
    assert form is not None
    theirs = quantization.QuantizationScheme(targets=["Linear"], **form)
    compressor = base.BaseCompressor.get_value_from_registry(form["format"])
    preset = quantization.quant_scheme.preset_name_to_scheme(f"{name.upper()}A16", ["Linear"])
    assert preset.weights.model_dump() == theirs.weights.model_dump()
    assert compressor.can_compress(torch.nn.Linear, theirs)
    tensors = scheme.encode(spread(5, 40, 256).to(dtype))
    decoded = compressor.decompress(dict(tensors), theirs)["weight"]
    assert decoded.dtype == torch.bfloat16  # which holds every number of these formats
    assert torch.equal(scheme.decode(tensors), decoded.to(dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_bits_per_weight(name: str) -> None:
    bits = {"mxfp4": 4.25, "mxfp8": 8.25}[name]
    assert SCHEMES[name].bytes((64, 320), torch.bfloat16) * 8 == bits * 64 * 320


@pytest.mark.parametrize("name", SCHEMES)
def test_a_width_that_blocks_do_not_divide_is_not_taken(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    assert SCHEMES[name].takes(Spec(torch.bfloat16, (3, 64)))
    assert not SCHEMES[name].takes(Spec(torch.bfloat16, (64, 48)))
    with pytest.raises(ValueError, match=f"{name}: in_features 48 is not a multiple of 32"):
        compress.encode(torch.ones(64, 48), name)
    forecast = compress.plan(tiny_model("llama-ragged"), name)
    assert any(f"{name} does not take 64x172: stays as it is" in note for note in forecast.notes)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_model_of_another_dtype_comes_back_in_it(
    name: str, dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_model("llama"), tmp_path / "source", dtype)
    compress.quantize(tmp_path / "source", tmp_path / "out", name, scoring=None)
    lines = list(compare(tmp_path / "out", tmp_path / "source"))
    assert not [line.problem for line in lines if line.problem]
    assert sum(line.action == "coded" for line in lines) == 14
    assert compress.load(tmp_path / "out").dtype == {"fp16": torch.float16, "fp32": torch.float32}[dtype]


@pytest.mark.parametrize("name", SCHEMES)
def test_experts_come_back(name: str, tiny_compressed: Callable[..., Path], tiny_model: Callable[[str], Path]) -> None:
    for model in ("mixtral", "qwen3-moe"):
        out = tiny_compressed(model, name)
        method = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
        assert method == ("compressed-tensors" if name == "mxfp4" else "compress")
        coded = [line for line in compare(out, tiny_model(model)) if line.action == "coded"]
        assert len(coded) > 20 and not any(line.problem for line in coded)
        assert max(line.relative_error for line in coded) < {"mxfp4": 0.13, "mxfp8": 0.03}[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_threads_do_not_change_a_byte(name: str, on_threads: Any) -> None:
    weight = spread(6, 100, 2048).bfloat16()
    first, *others = on_threads(lambda: SCHEMES[name].encode(weight))
    assert all(
        torch.equal(first[key].view(torch.uint8), other[key].view(torch.uint8)) for other in others for key in first
    )
