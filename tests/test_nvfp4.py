"""nvfp4: blocks by hand, the search against an exhaustive one, the global scale, and compressed-tensors' decoder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress.against import compare
from compress.exporting import export
from compress.formats.float4 import unpack
from compress.nvfp4 import STEPS, Nvfp4
from compress.scheme import Spec
from compress.stats import Stats

PLAIN, SEARCHED = Nvfp4(search=False), Nvfp4()
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def gaussian(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stats(second_moment: Tensor) -> Stats:
    return Stats(1, second_moment, second_moment.sqrt(), second_moment.sqrt())


def relative(weight: Tensor, scheme: Nvfp4 = SEARCHED) -> float:
    error = scheme.decode(scheme.encode(weight)).double() - weight.double()
    return float(error.square().mean() / weight.double().square().mean())


def test_blocks_by_hand() -> None:
    block = torch.tensor([6, -4, 3, 2, 1.5, 1, -0.5, 0] * 2)
    weight = torch.stack([torch.cat([block / 8, block * 0.0625 * 1.25]), torch.cat([-block, 0 * block])]).bfloat16()
    tensors = Nvfp4().encode(weight)
    assert tensors["weight_global_scale"].tolist() == [256.0]
    # 1 / 8 and 0.0625 * 1.25 by 256; 1 by 256; and of zeros 1 as it is
    assert tensors["weight_scale"].float().tolist() == [[32.0, 20.0], [256.0, 1.0]]
    assert tensors["weight_packed"][0, :4].tolist() == [0xE7, 0x45, 0x23, 0x09]
    assert torch.equal(Nvfp4().decode(tensors), weight)


def test_a_largest_value_may_become_4_instead_of_6() -> None:
    weight = torch.tensor([[4.0, 3.0, 3.0, 3.0, 2.0, 1.0, 0.5, 0.0] * 2])
    assert relative(weight) == 0.0 < 0.001 < relative(weight, PLAIN)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_finds_what_an_exhaustive_one_finds(weighted: bool) -> None:
    weight = gaussian(1, 10, 160) * torch.logspace(-2.5, 0.5, 160)
    importance = torch.rand(160, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else torch.ones(160)
    scheme = Nvfp4(dtype="float32")
    tensors = scheme.encode(weight, stats(importance) if weighted else None)
    first = PLAIN.encode(weight)["weight_scale"].view(torch.uint8).int()
    found = tensors["weight_scale"].view(torch.uint8).int()
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / 256
    decoded = scheme.decode(tensors).double()
    for row in range(10):
        for block in range(10):
            part = slice(16 * block, 16 * block + 16)
            exact, given = weight[row, part].double(), (importance + importance.median())[part].double()
            errors, rounded = {}, {}
            for step in STEPS:
                code = min(max(int(first[row, block]) + step, 0), 126)
                near = (exact.abs()[:, None] / table[code] - VALUES).abs().argmin(1)
                rounded[code] = VALUES[near] * table[code] * exact.sign()
                errors[code] = float(((rounded[code] - exact).square() * given).sum())
            best = int(found[row, block])
            assert errors[best] <= min(errors.values()) * (1 + 1e-5)
            assert torch.equal(decoded[row, part].abs(), rounded[best].abs())
    assert (found != first).sum() > 50


def test_without_search_the_scale_is_the_nearest_to_a_sixth_of_the_largest() -> None:
    weight = gaussian(2, 20, 320).bfloat16()
    maxima = weight.view(20, 20, 16).abs().amax(2).float()
    assert torch.equal(PLAIN.encode(weight)["weight_scale"], (maxima / 6 * 256).to(torch.float8_e4m3fn))


def test_gaussian_error_with_and_without_search() -> None:
    weight = gaussian(0, 256, 1024).bfloat16()
    assert relative(weight, PLAIN) == pytest.approx(0.0091, rel=0.02)
    assert relative(weight) == pytest.approx(0.0066, rel=0.02)


def test_inputs_that_matter_are_rounded_better() -> None:
    weight = gaussian(3, 64, 512).bfloat16()
    moments = torch.where(torch.arange(512) % 8 == 0, 100.0, 0.01)

    def error(given: Stats | None) -> float:
        decoded = Nvfp4().decode(Nvfp4().encode(weight, given))
        return float(((decoded.double() - weight.double()).square() * moments).sum())

    assert error(stats(moments)) < 0.8 * error(None)
    assert error(stats(torch.full((512,), 7.0))) == error(None)


def test_linears_that_run_as_one_have_one_global_scale() -> None:
    for size in (0.002, 0.02, 0.2, 1.5):
        assert Nvfp4().encode(gaussian(4, 64, 256) * size)["weight_global_scale"].item() == 256


def test_the_global_scale_follows_weights_of_unusual_size() -> None:
    usual = relative(gaussian(5, 32, 256))
    for exponent in (-100, -40, -12, 5, 40, 100):
        weight = gaussian(5, 32, 256) * 2.0**exponent
        scale = Nvfp4().encode(weight)["weight_global_scale"].item()
        assert scale == 2.0 ** round(torch.tensor(scale).log2().item()) != 256
        assert relative(weight, Nvfp4(dtype="float32")) == pytest.approx(usual, rel=1e-3)


def test_one_huge_weight_does_not_empty_the_other_blocks() -> None:
    weight = gaussian(6, 32, 256) * 0.02
    weight[3, 5] = 300.0
    tensors = Nvfp4().encode(weight)
    assert tensors["weight_global_scale"].item() == 8  # 300 / 6 * 8 is 400, and E4M3 ends at 448
    decoded = Nvfp4().decode(tensors)
    assert decoded[3, 5].item() == pytest.approx(300, rel=1 / 16)
    assert ((decoded - weight)[4:].square().mean() / weight[4:].square().mean()) < 0.012


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_and_smallest_numbers_of_a_dtype_stay_finite_and_near(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scheme = Nvfp4().for_dtype(dtype)
    for value in (info.max, -info.max, info.max / 2, info.smallest_normal * 2**20, info.smallest_normal):
        weight = torch.full((2, 64), value, dtype=dtype)
        weight[1, 3] = 0
        decoded = scheme.decode(scheme.encode(weight))
        assert decoded.dtype == dtype and decoded.isfinite().all() and not decoded[1, 3]
        assert ((decoded[0].double() / value) - 1).abs().max() <= 1 / 16


def test_zeros_have_scales_of_one() -> None:
    tensors = Nvfp4().encode(torch.zeros(2, 32))
    assert tensors["weight_scale"].float().eq(1).all() and tensors["weight_global_scale"].item() == 256
    assert not unpack(tensors["weight_packed"]).any()


@pytest.mark.parametrize("overall", [None, 1234.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compressed_tensors_decodes_the_same_bits(dtype: torch.dtype, overall: float | None) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = Nvfp4().for_dtype(dtype)
    theirs = quantization.QuantizationScheme(targets=["Linear"], **scheme.interchange)
    compressor = base.BaseCompressor.get_value_from_registry(scheme.interchange["format"])
    preset = quantization.quant_scheme.preset_name_to_scheme("NVFP4A16", ["Linear"])
    assert preset.weights.model_dump() == theirs.weights.model_dump()
    tensors = scheme.encode((gaussian(7, 40, 256) * torch.logspace(-3, 1, 256)).to(dtype))
    if overall:
        tensors["weight_global_scale"] = torch.tensor([overall])  # as others choose it
    decoded = compressor.decompress(dict(tensors), theirs)["weight"]
    if overall and dtype != torch.bfloat16:  # which does not hold every such product
        # bfloat16 keeps 8 bits; the steps of float16 end at 2**-24
        assert torch.allclose(scheme.decode(tensors).double(), decoded.double(), rtol=2**-8, atol=2**-24)
    else:
        assert torch.equal(scheme.decode(tensors), decoded.to(dtype))


def test_bits_per_weight() -> None:
    assert Nvfp4().bytes((64, 320), torch.bfloat16) * 8 == 4.5 * 64 * 320 + 32


def test_a_global_scale_of_any_shape_is_one_number() -> None:
    tensors = SEARCHED.encode(gaussian(0, 8, 64))
    for shape in ((), (1, 1)):  # as others write it
        other = {**tensors, "weight_global_scale": tensors["weight_global_scale"].reshape(shape)}
        SEARCHED.check({name: Spec.of(name, tensor) for name, tensor in other.items()})
        assert torch.equal(SEARCHED.decode(other), SEARCHED.decode(tensors))


def test_a_width_that_blocks_do_not_divide_is_not_taken(tiny_model: Callable[[str], Path]) -> None:
    assert Nvfp4().takes(Spec(torch.bfloat16, (3, 48))) and not Nvfp4().takes(Spec(torch.bfloat16, (64, 40)))
    with pytest.raises(ValueError, match="nvfp4: in_features 40 is not a multiple of 16"):
        compress.encode(torch.ones(64, 40), "nvfp4")
    forecast = compress.plan(tiny_model("llama-ragged"), "nvfp4")
    assert any("nvfp4 does not take 64x172: stays as it is" in note for note in forecast.notes)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_model_of_another_dtype_comes_back_in_it(
    dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_model("llama"), tmp_path / "source", dtype)
    compress.quantize(tmp_path / "source", tmp_path / "out", "nvfp4", scoring=None)
    lines = list(compare(tmp_path / "out", tmp_path / "source"))
    assert not [line.problem for line in lines if line.problem]
    assert sum(line.action == "coded" for line in lines) == 14


def test_experts_come_back_in_our_own_layout(
    tiny_compressed: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    for model in ("mixtral", "qwen3-moe"):
        out = tiny_compressed(model, "nvfp4")
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compress"
        coded = [line for line in compare(out, tiny_model(model)) if line.action == "coded"]
        assert len(coded) > 20 and not any(line.problem for line in coded)
        assert max(line.relative_error for line in coded) < 0.1


def test_threads_do_not_change_a_byte(on_threads: Any) -> None:
    weight = gaussian(8, 100, 2048).bfloat16()
    first, *others = on_threads(lambda: Nvfp4().encode(weight))
    assert all(
        torch.equal(first[key].view(torch.uint8), other[key].view(torch.uint8)) for other in others for key in first
    )


def test_options_survive() -> None:
    scheme = Nvfp4(search=False, hadamard=True).for_dtype(torch.float16)
    wanted = {"search": False, "method": "rtn", "reorder": False, "hadamard": True, "dtype": "float16"}
    assert dataclasses.asdict(scheme) == wanted
