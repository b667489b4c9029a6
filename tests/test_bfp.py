"""bfp: blocks by hand, invariants, a slow reference, the search against an exhaustive one, whole models."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress.against import compare
from compress.bfp import Bfp
from compress.exporting import export
from compress.formats import bfp
from compress.formats.bfp import Format
from compress.scheme import Spec
from compress.stats import Stats

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLAIN = Bfp(full_range=False, search=False)


def spread(seed: int, rows: int, columns: int) -> Tensor:
    """Gaussian with heavy tails, and columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) ** -0.3
    return weight * torch.logspace(-3, 1, columns)


def mantissas(tensors: dict[str, Tensor], scheme: Bfp) -> list[list[int]]:
    """Read from the stored bytes, one bit after the other."""
    bits, columns = scheme.mantissa_bits, tensors["like"].shape[2]
    rows = []
    for row in tensors["mantissa"].tolist():
        stream = sum(byte << (8 * i) for i, byte in enumerate(row))
        rows.append([(stream >> (bits * i)) % 2**bits - 2 ** (bits - 1) for i in range(columns)])
    return rows


def rounded(value: float, exponent: int, scheme: Bfp) -> Fraction:
    """The definition, in exact arithmetic: Python rounds fractions half to even."""
    step = Fraction(2) ** (exponent - 127 - (scheme.mantissa_bits - 2))
    most = 2 ** (scheme.mantissa_bits - 1)
    return max(-most if scheme.full_range else 1 - most, min(most - 1, round(Fraction(value) / step))) * step


def test_a_block_by_hand() -> None:
    block = [1.5, -0.25, 0.375, 1.9375, -1.9375, 0.124, 0.126, 0.0] * 2
    tensors = replace(PLAIN, block_size=16).encode(torch.tensor([block, [8 * v for v in block]]))
    # floor(log2(1.9375)) = 0, a step of 2**(0 - 2); 1.9375 is 7.75 of them, and clipped to 7 either way
    assert tensors["exponent"].tolist() == [[127], [130]]
    assert mantissas(tensors, PLAIN) == [[6, -1, 2, 7, -7, 0, 1, 0] * 2] * 2  # 0.375 is 1.5 steps: half to even
    assert tensors["mantissa"][0, :4].tolist() == [0x7E, 0xFA, 0x81, 0x89]
    assert tensors["mantissa"].shape == (2, 8) and tensors["like"].shape == (0, 2, 16)


def test_the_full_range_has_one_more_below_zero() -> None:
    block = [1.0, -1.9375, -1.875, -1.8, 0.0, 0.0, 0.0, 0.0] * 2
    tensors = replace(PLAIN, full_range=True, block_size=16).encode(torch.tensor([block]))
    assert mantissas(tensors, PLAIN)[0][:4] == [4, -8, -8, -7]
    # -2 fits below zero with the exponent of 1, and 2 above does not
    pair = torch.tensor([[-2.0] + [0.0] * 15 + [2.0] + [0.0] * 15])
    tensors = replace(PLAIN, full_range=True, block_size=16).encode(pair)
    assert tensors["exponent"].tolist() == [[127, 128]]
    assert [mantissas(tensors, PLAIN)[0][i] for i in (0, 16)] == [-8, 4]


@pytest.mark.parametrize("bits", range(2, 9))
def test_sizes_are_exact(bits: int) -> None:
    for size in (16, 32, 64, 128):
        scheme = Bfp(bits, size)
        assert Fraction(8 * scheme.bytes((24, 384), torch.bfloat16), 24 * 384) == bits + Fraction(8, size)
    assert Bfp(bits, 32).bytes((3, 43), torch.bfloat16) == 3 * (math.ceil(43 * bits / 8) + 2)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_value_is_what_exact_arithmetic_makes_of_it(bits: int, full_range: bool) -> None:
    scheme = Bfp(bits, 32, full_range, search=False)
    weight = spread(bits, 6, 83)
    weight[0, :32] = 0
    weight[1, 5] = -(2.0**10)
    tensors = scheme.encode(weight)
    decoded = scheme.decode(tensors)
    for row in range(6):
        for block in range(3):
            part = weight[row, 32 * block : 32 * block + 32].tolist()
            exponent = int(tensors["exponent"][row, block])
            low, high = -min(part), max(part)
            wanted = math.frexp(max(map(abs, part)))[1] - 1 if any(part) else bits - 1 - 127
            if full_range and low > high and math.frexp(low)[0] == 0.5:
                wanted -= 1
            assert exponent == wanted + 127
            exact = [rounded(value, exponent, scheme) for value in part]
            assert decoded[row, 32 * block : 32 * block + 32].tolist() == [float(value) for value in exact]
            step = Fraction(2) ** (exponent - 127 - (bits - 2))
            for e, v in zip(exact, part, strict=True):  # half a step, but for what is clipped
                assert abs(e - Fraction(v)) <= (step if abs(v) > (2 ** (bits - 1) - 1) * step else step / 2)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_what_was_decoded_is_encoded_to_itself(bits: int, full_range: bool, search: bool) -> None:
    for size in (16, 128):
        scheme = Bfp(bits, size, full_range, search)
        once = scheme.decode(scheme.encode(spread(0, 32, 300)))
        assert torch.equal(scheme.decode(scheme.encode(once)), once)


@pytest.mark.parametrize("scheme", [PLAIN, Bfp(), Bfp(5, 128), Bfp(2, 16, False)], ids=str)
def test_a_power_of_two_only_moves_the_exponents(scheme: Bfp) -> None:
    weight = spread(1, 16, 200)
    first = scheme.encode(weight)
    for power in (-20, 7):
        scaled = scheme.encode(weight * 2.0**power)
        assert torch.equal(scaled["mantissa"], first["mantissa"])
        assert torch.equal(scaled["exponent"].int(), first["exponent"].int() + power)
        assert torch.equal(scheme.decode(scaled), scheme.decode(first) * 2.0**power)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_search_finds_what_an_exhaustive_one_finds(bits: int, full_range: bool, weighted: bool) -> None:
    scheme = Bfp(bits, 16, full_range)
    weight = spread(2, 10, 91)
    importance = torch.rand(91, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else torch.ones(91)
    counts = importance + importance.median()
    tensors = scheme.encode(weight, Stats(1, importance, torch.ones(91), importance) if weighted else None)
    rule = replace(scheme, search=False).encode(weight)["exponent"].tolist()
    moved = 0
    for row in range(10):
        for block in range(6):
            part, given = (t[16 * block : 16 * block + 16].tolist() for t in (weight[row], counts))
            errors = {}
            for exponent in (rule[row][block] + step for step in (0, 1, -1)):
                off = [float(rounded(value, exponent, scheme)) - value for value in part]
                errors[exponent] = sum(o * o * g for o, g in zip(off, given, strict=True))
            found = int(tensors["exponent"][row, block])
            assert errors[found] <= min(errors.values()) * (1 + 1e-5)
            moved += found != rule[row][block]
    assert moved > 1


# |w - w'|**2 / |w|**2 of independent Gaussian weights, by mantissa bits and block
ERRORS = {
    4: {16: 0.0137, 32: 0.0176, 64: 0.0203, 128: 0.0213},
    5: {16: 0.0034, 32: 0.0044, 64: 0.0051, 128: 0.0053},
    6: {16: 0.00085, 32: 0.00109, 64: 0.00127, 128: 0.00133},
    8: {16: 5.3e-5, 128: 8.3e-5},
}


@pytest.mark.parametrize("bits", ERRORS)
def test_gaussian_errors_are_those_known(bits: int) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    for size, known in ERRORS[bits].items():

        def error(scheme: Bfp) -> float:
            difference = scheme.decode(scheme.encode(weight)) - weight  # noqa: B023
            return float(difference.double().square().mean() / weight.double().square().mean())

        plain = error(Bfp(bits, size, full_range=False, search=False))
        assert plain == pytest.approx(known, rel=0.02)
        assert error(Bfp(bits, size, full_range=False)) < plain
        assert error(Bfp(bits, size)) < error(Bfp(bits, size, full_range=False))


def test_gptq_brings_outputs_nearer_on_the_same_exponents() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 91, generator=generator) @ torch.randn(91, 91, generator=generator)
    weight = torch.randn(24, 91, generator=generator)
    stats = Stats(400, x.square().mean(0), x.abs().mean(0), x.abs().amax(0), x.T @ x / 400)
    for scheme in (Bfp(), Bfp(3, 16, False), Bfp(full_range=True, search=False)):
        tuned, scheme = replace(scheme, method="gptq"), replace(scheme, method="rtn")
        stored = [s.encode(weight, stats) for s in (scheme, tuned)]
        assert torch.equal(stored[0]["exponent"], stored[1]["exponent"])
        errors = [(x @ (weight - scheme.decode(tensors)).T).norm().item() for tensors in stored]
        assert errors[1] < 0.9 * errors[0]
    independent = replace(stats, second_moment=torch.ones(91), hessian=torch.eye(91))
    found, nearest = Bfp().encode(weight, independent), Bfp().encode(weight)
    assert all(torch.equal(found[key], nearest[key]) for key in found)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_plain_torch_writes_and_reads_the_same_bytes(bits: int, full_range: bool) -> None:
    for dtype in DTYPES:
        form = Format(bits, 32, full_range, dtype)
        values = spread(3, 20, 172).to(dtype)
        values[2, 3:6] = torch.tensor([math.nan, math.inf, 1.0])
        values[3, 40], values[4, 100:140] = -math.inf, -0.0
        values[5] = torch.finfo(dtype).max * torch.tensor([-1.0, 1.0]).repeat(86).to(dtype)
        values[6] = torch.finfo(dtype).smallest_normal
        exponents = bfp.shared_exponents(values, form)
        assert torch.equal(exponents, bfp.shared_exponents_torch(values, form))
        packed = bfp.pack(values, exponents, form)
        codes = bfp.codes_torch(values, exponents, form)
        shifts = torch.arange(8)
        stream = ((packed[..., None] >> shifts) & 1).flatten(1)[:, : 172 * bits].view(20, 172, bits)
        assert torch.equal((stream.int() << torch.arange(bits)).sum(2), codes.int())
        fast, slow = compress.bfp.decode.bfp(packed, exponents, form, 172), bfp.unpack(packed, exponents, form, 172)
        assert torch.equal(fast.isnan(), slow.isnan()) and torch.equal(fast.nan_to_num(), slow.nan_to_num())
        broken = fast.view(20, 172).isnan()
        assert broken[2, :32].all() and broken[3, 32:64].all() and int(broken.sum()) == 64


@pytest.mark.parametrize("scheme", [PLAIN, Bfp(), Bfp(2, 16), Bfp(8, 128), Bfp(8, 128, False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_and_smallest_numbers_of_a_dtype_stay_finite_and_near(scheme: Bfp, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (info.max, -info.max, info.max / 2, info.smallest_normal * 2**20, info.smallest_normal):
        weight = torch.full((2, 64), value, dtype=dtype)
        weight[1, 3] = 0
        decoded = scheme.decode(scheme.encode(weight))
        assert decoded.dtype == dtype and decoded.isfinite().all() and not decoded[1, 3]
        assert ((decoded[0].double() / value) - 1).abs().max() <= 0.5 ** (scheme.mantissa_bits - 1)


def test_a_block_of_zeros_beside_an_outlier_stays_zero() -> None:
    weight = torch.zeros(1, 96)
    weight[0, 40] = -3e38
    for scheme in (PLAIN, Bfp(), Bfp(2)):
        tensors = scheme.encode(weight)
        assert tensors["exponent"][0, [0, 2]].tolist() == [scheme.mantissa_bits - 1] * 2
        assert scheme.decode(tensors).nonzero().tolist() == [[0, 40]]


def test_options_out_of_range_and_damaged_tensors_are_refused() -> None:
    for options, said in (({"mantissa_bits": 9}, "2 to 8"), ({"block_size": 48}, "16, 32, 64, 128")):
        with pytest.raises(ValueError, match=said):
            compress.encode(torch.ones(2, 32), "bfp", **options)
    tensors = compress.encode(torch.ones(2, 40), "bfp")
    for name, wrong in (
        ("mantissa", torch.zeros(2, 19, dtype=torch.uint8)),
        ("exponent", torch.zeros(2, 1, dtype=torch.uint8)),
        ("like", torch.zeros(0, 40)),
        ("like", torch.zeros(0, 2, 40, dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*they were encoded with"):
            compress.decode({**tensors, name: wrong}, "bfp")
    with pytest.raises(ValueError, match="no exponent is stored"):
        compress.decode({key: value for key, value in tensors.items() if key != "exponent"}, "bfp")


def test_the_plan_names_rows_that_end_in_a_short_block(tiny_model: Callable[[str], Path]) -> None:
    forecast = compress.plan(tiny_model("llama-ragged"), "bfp", block_size=64)
    assert any("172: the last block of a row has 44 values instead of 64" in note for note in forecast.notes)
    assert not any(" 64: " in note for note in forecast.notes)


@pytest.mark.parametrize("model", ["llama-ragged", "mixtral", "gpt2"])
def test_a_model_is_written_loads_and_comes_back(
    model: str, tiny_compressed: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    out = tiny_compressed(model, "bfp", mantissa_bits=5)
    coded = [line for line in compare(out, tiny_model(model)) if line.action == "coded"]
    assert len(coded) > 7 and not any(line.problem for line in coded)
    assert max(line.relative_error for line in coded) < 0.07
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        found, exact = (compress.load(path)(ids).logits.double() for path in (out, tiny_model(model)))
    assert 0 < (found - exact).norm() / exact.norm() < 0.2


def test_a_float32_model_comes_back_in_float32(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    export(tiny_model("llama"), tmp_path / "source", "fp32")
    compress.quantize(tmp_path / "source", tmp_path / "out", "bfp", scoring=None, method="rtn", reorder=False)
    lines = list(compare(tmp_path / "out", tmp_path / "source"))
    assert not [line.problem for line in lines if line.problem]
    assert compress.load(tmp_path / "out").dtype == torch.float32
    export(tmp_path / "out", tmp_path / "plain", "fp32")
    assert compress.load(tmp_path / "plain").dtype == torch.float32


def test_threads_do_not_change_a_byte(on_threads: Any) -> None:
    weight = spread(6, 100, 2048).bfloat16()
    first, *others = on_threads(lambda: Bfp().encode(weight))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_the_shape_is_known_from_headers_alone() -> None:
    stored = {name: Spec.of(name, tensor) for name, tensor in Bfp(3).encode(torch.ones(5, 7)).items()}
    assert Bfp(3).original(stored) == Spec(torch.float32, (5, 7))
