"""Products with packed weights on the CPU, against decode() in float64."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import compress
from compress.formats import threads
from compress.formats.compiled import jit
from compress.kernels import cpu, cpu_codes, cpu_few, cpu_sign_products, measured, simd
from compress.kernels.cpu import Prepared
from compress.kernels.rows import Rows
from compress.registry import make
from compress.scheme import Scheme, Tensors

# Activations are rounded to 16 bits of the largest of a few columns, and to 14 beside tables, which are to 15: 2e-5 and
# 8e-5 of Gaussian ones, or more where longer vectors take more columns.
BOUND = 1e-4 if simd.lanes() == 16 else 2e-4
# name and options; all of these have a product
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("int4", {"bits": bits, "group_size": 32, "method": "rtn"}) for bits in (2, 5, 7, 8)),
    ("int4", {"group_size": 128, "method": "rtn"}),
    ("int4", {"group_size": 64, "symmetric": False, "method": "rtn"}),
    ("int4", {"bits": 3, "group_size": 128, "symmetric": False, "method": "rtn"}),
    ("int8", {"group_size": 4096}),
    *(("bfp", {"mantissa_bits": bits, "method": "rtn"}) for bits in (3, 4)),
    *(("kmeans", {"method": "rtn", "granularity": g}) for g in ("channel", "tensor", "group")),
    ("kmeans", {"method": "rtn", "bits": 3}),
    ("kmeans", {"method": "rtn", "scale": True, "entries": "int8"}),
    ("kmeans", {"method": "rtn", "codebook": "nf", "block_size": 32}),
    ("bitstack", {"blocks": 5, "scaling": "none"}),
    ("nf4", {"block_size": 32}),
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("mxfp4", {"method": "rtn"}),
    ("mxfp8", {"method": "rtn"}),
    *(("fp8", {"granularity": granularity}) for granularity in ("channel", "tensor", "block")),
    ("nvfp4", {"method": "rtn"}),
]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CPU_PATH", "fused")


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def stored(
    name: str, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[Scheme, Tensors]:
    scheme = make(name, options).fit(shape).for_dtype(dtype)
    return scheme, scheme.encode(gaussian(*shape, dtype=dtype) * 0.02)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_product_is_that_of_the_decoded_weight(case: tuple[str, dict[str, Any]]) -> None:
    for shape, tokens in itertools.product([(1, 128), (35, 416)], [1, 6]):
        scheme, tensors = stored(case[0], shape, torch.float32, **case[1])
        x, bias = gaussian(tokens, shape[1], dtype=torch.float32), gaussian(shape[0], dtype=torch.float32)
        prepared = scheme.prepare(tensors)
        assert prepared.product is not None
        wanted = F.linear(x.double(), scheme.decode(tensors).double(), bias.double())
        assert error(scheme.linear(x, prepared, bias), wanted) < BOUND


DECODED = [*CASES, ("int8", {"activations": "dynamic"}), ("kmeans", {"method": "rtn", "nested": True})]
DECODED += [("kmeans", {"method": "rtn", "codebook": "bitmod4", "block_size": 32})]


@pytest.mark.parametrize("case", DECODED, ids=str)
def test_a_decoded_weight_is_multiplied_in_parts(
    case: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part has fewer rows."""
    monkeypatch.setenv("COMPRESS_CPU_PATH", "dense")
    monkeypatch.setattr(cpu, "LEAST", 1)
    monkeypatch.setattr(cpu, "_AT_ONCE", 1)
    scheme, tensors = stored(case[0], (83, 416), torch.float32, **case[1])
    x, bias = gaussian(3, 416, dtype=torch.float32), gaussian(83, dtype=torch.float32)
    for held in (tensors, scheme.prepare(tensors)):
        wanted = F.linear(x.double(), scheme.decode(held).double(), bias.double())
        bound = 1e-6 if case[1].get("activations", "none") == "none" else 0.02
        assert error(scheme.linear(x, held, bias), wanted) < bound


def test_nf4_is_multiplied_as_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CPU_PATH", "dense")
    monkeypatch.setattr(cpu, "LEAST", 1)
    monkeypatch.setattr(cpu, "_AT_ONCE", 1)
    asked: list[Any] = []
    monkeypatch.setattr(measured, "is_wider_faster", lambda *how: asked.append(how) or True)
    monkeypatch.setattr(Rows, "takes", lambda *_: False)
    scheme, tensors = stored("nf4", (83, 128))
    x, prepared = gaussian(40, 128), scheme.prepare(tensors)
    wanted = F.linear(x.float(), scheme.decode(tensors).float()).to(x.dtype)
    assert torch.equal(scheme.linear(x, prepared), wanted) and asked == [(x.dtype, 40)]


@pytest.mark.parametrize("columns", [64, 131, 136, 250])
def test_planes_of_any_width_are_summed_up_once(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last vector of columns overlaps with the one before it."""
    monkeypatch.setattr(cpu_sign_products, "takes", lambda *_: False)  # tests/test_signs.py has what is looked up
    for rows, blocks in ((1, 1), (7, 2), (9, 5)):
        options = {"blocks": blocks, "rank": "3", "scaling": "none"}
        scheme, tensors = stored("bitstack", (rows, columns), torch.float32, **options)
        for tokens in (1, 3):
            x = gaussian(tokens, columns, dtype=torch.float32)
            wanted = F.linear(x.double(), scheme.decode(tensors).double())
            prepared = scheme.prepare(tensors)
            assert prepared.product is not None and error(scheme.linear(x, prepared), wanted) < 1e-5


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 7, 8])  # each loop takes seconds to compile; 4 is tested above, 6 is as 5
def test_levels_of_every_width_are_those_of_their_columns(bits: int) -> None:
    """Rows and columns that fill no vector, and codes that end in the middle of a byte."""
    for granularity, shape in itertools.product(("channel", "tensor", "group"), [(1, 1), (2, 37), (19, 131), (70, 64)]):
        options = {"method": "rtn", "bits": bits, "granularity": granularity}
        scheme, tensors = stored("kmeans", shape, torch.float32, **options)
        words = tensors["indices"].shape
        tensors["indices"] = torch.randint(-(1 << 31), (1 << 31) - 1, words, dtype=torch.int32)  # every code
        prepared, decoded = scheme.prepare(tensors), scheme.decode(tensors).double()
        assert prepared.product is not None
        for first in range(0, shape[1], 3):
            x = torch.zeros(min(3, shape[1] - first), shape[1])
            x[range(len(x)), range(first, first + len(x))] = 1.0
            found = scheme.linear(x, prepared).double()
            assert float((found - decoded[:, first : first + 3].T).abs().max()) <= BOUND * float(decoded.abs().max())


def test_levels_and_inputs_of_every_dtype_and_inputs_that_are_not_finite() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        scheme, tensors = stored("kmeans", (19, 131), dtype, method="rtn", bits=3)
        prepared, x = scheme.prepare(tensors), gaussian(3, 131, dtype=dtype)
        wanted = F.linear(x.double(), scheme.decode(tensors).double())
        bound = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, BOUND)
        assert error(scheme.linear(x, prepared), wanted) < bound
        x[1, 5] = torch.nan
        assert prepared.product.run(x, x.dtype) is None
        assert scheme.linear(x, prepared).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(9, 512), (35, 416), (7, 1003)])
def test_fixed_codes_lose_nothing_but_the_order_of_the_sums(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape) * 0.02
    weight[2, 5], weight[-1, -1] = 1e4, 3e-9  # escapes
    scheme = make("df11", {"coding": "fixed"})
    prepared = scheme.prepare(scheme.encode(weight))
    for tokens, dtype in itertools.product((1, 6), (torch.float32, torch.bfloat16)):
        x = gaussian(tokens, shape[1], dtype=dtype)
        assert prepared.product is not None and (y := prepared.product.run(x, torch.float32)) is not None
        assert error(y, F.linear(x.double(), weight.double())) < 1e-6


@pytest.mark.parametrize("power", [0, 70])
def test_rows_of_whole_blocks_may_hold_anything(power: int) -> None:
    """Escapes, more than a few of a block or most of a row, zeros, and what is no number."""
    weight = gaussian(8, 768) * 0.02 * 2.0**power
    weight[1], weight[2, :200], weight[3, 256:290], weight[4, 700:] = 0, 0, 1e-9, -1e-5
    weight[5, 3], weight[6, 300], weight[7, 767] = math.inf, math.nan, -(2.0 ** (power + 9))
    scheme = make("df11", {"coding": "fixed"})
    prepared = scheme.prepare(scheme.encode(weight))
    for tokens, dtype in itertools.product((1, 3, 4, 9), (torch.float32, torch.bfloat16)):
        x = gaussian(tokens, 768, dtype=dtype).abs()
        assert prepared.product is not None and (y := prepared.product.run(x, torch.float32)) is not None
        wanted = F.linear(x.double(), weight.double())
        assert not y[:, 1].any() and torch.equal(y[:, 5], torch.full((tokens,), math.inf)) and y[:, 6].isnan().all()
        for row in (0, 2, 3, 4, 7):
            assert error(y[:, row], wanted[:, row]) < 1e-6, row


def test_infinite_inputs_and_damaged_codes_are_left_to_decoding() -> None:
    weight, scheme = gaussian(4, 512), make("df11", {"coding": "fixed"})
    weight[:, 3] = 1e-6
    tensors = scheme.encode(weight)
    x = gaussian(2, 512, dtype=torch.float32)
    x[1, 3] = math.inf
    prepared = scheme.prepare(tensors)
    assert torch.equal(scheme.linear(x, prepared)[1], torch.full((4,), math.inf))
    tensors["base"] = torch.full_like(tensors["base"], 255)
    assert not isinstance(scheme.prepare(tensors), Prepared)


def test_many_tokens_get_the_bits_that_the_original_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_CPU_PATH")
    weight, x = gaussian(256, 512), gaussian(20, 512)
    for coding in ("huffman", "fixed"):
        scheme = make("df11", {"coding": coding})
        assert torch.equal(scheme.linear(x, scheme.prepare(scheme.encode(weight))), F.linear(x, weight))


@pytest.mark.parametrize(
    "name, options, cut",
    [
        ("int4", {"method": "rtn"}, "weight_packed"),
        ("int4", {"method": "rtn"}, "weight_scale"),
        *(("kmeans", {"method": "rtn", "bits": bits}, "indices") for bits in (3, 4, 8)),
        *(("kmeans", {"method": "rtn", "bits": bits}, "codebook") for bits in (3, 8)),
        ("fp8", {"granularity": "block"}, "weight_scale"),
        ("mxfp4", {"method": "rtn"}, "weight_scale"),
        ("df11", {"coding": "fixed"}, "escape_counts"),
    ],
)
def test_tensors_that_are_cut_off_are_refused_and_never_read_past_their_end(
    name: str, options: dict[str, Any], cut: str
) -> None:
    scheme, tensors = stored(name, (40, 256), **options)
    tensors[cut] = tensors[cut][:, :-1] if tensors[cut].dim() == 2 else tensors[cut][:-1]
    with pytest.raises((ValueError, RuntimeError)):
        scheme.linear(gaussian(2, 256), scheme.prepare(tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_and_weights_of_every_dtype_and_any_shape_of_inputs(dtype: torch.dtype) -> None:
    scheme, tensors = stored("int4", (40, 128), dtype, method="rtn")
    for shape in ((128,), (3, 5, 128), (0, 128)):
        x = gaussian(*shape, dtype=dtype)
        found = scheme.linear(x, scheme.prepare(tensors))
        assert found.dtype == dtype and found.shape == (*shape[:-1], 40)
        if x.numel():
            wanted = F.linear(x.double(), scheme.decode(tensors).double())
            assert error(found, wanted) < {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, BOUND)


def test_outliers_among_the_inputs_cost_their_neighbours_no_more_than_their_own_rounding() -> None:
    scheme, tensors = stored("int4", (64, 256), torch.float32, method="rtn")
    x = gaussian(2, 256, dtype=torch.float32)
    x[0, 7], x[1, 200] = 1e4, -3e4
    wanted = F.linear(x.double(), scheme.decode(tensors).double())
    # Steps of 1 / 32767 of the outlier for 128 columns: sqrt(128 / 12) / 32767 = 1e-4 of what it alone gives.
    assert error(scheme.linear(x, scheme.prepare(tensors)), wanted) < 2 * BOUND


@pytest.mark.parametrize("name, options", [("int4", {"symmetric": False}), ("kmeans", {"bits": 3})])
def test_a_single_call_for_a_few_tokens_gives_the_same_bits(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the steps one by one, which platforms without OpenMP take: inputs in any order in memory, with and without a
    bias, rounded to the nearest with ties to even."""
    scheme, tensors = stored(name, (70, 256), torch.bfloat16, method="rtn", **options)
    prepared, bias = scheme.prepare(tensors), gaussian(70)
    for tokens, dtype in itertools.product((1, 2, 3), (torch.bfloat16, torch.float32)):
        x = gaussian(256, tokens, dtype=dtype).T
        found = [scheme.linear(x, prepared), scheme.linear(x, prepared, bias), prepared.product.run(x, torch.bfloat16)]
        with monkeypatch.context() as patch:
            patch.setattr(cpu_few, "MOST", 0)
            wanted = [scheme.linear(x, prepared), scheme.linear(x, prepared, bias)]
            wanted.append(prepared.product.run(x, torch.bfloat16).bfloat16())
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@jit
def _failing(start, stop, packed, steps, others, share, other_share, x, scales, sums, out):  # type: ignore[no-untyped-def]
    raise ValueError


@pytest.mark.parametrize("count", [1, 2])
def test_a_single_call_hears_of_a_loop_that_fails(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not threads.has_openmp():
        pytest.skip("torch has no OpenMP of GNU's kind here")
    monkeypatch.setattr(threads, "team", lambda rows, size: (threads._openmp(), count, count))
    weights = (np.zeros((8, 8), np.uint8), np.zeros((8, 1), np.float32), np.zeros((1, 1), np.uint8), 1, 1)
    multiply = cpu_few.Few(_failing, weights, 8, (np.arange(16), 16, cpu_codes.LIMIT, 0), 16)
    x = gaussian(1, 16)
    assert multiply.takes(x, torch.bfloat16)
    with pytest.raises(RuntimeError, match="is there enough memory"):
        multiply(x, torch.bfloat16)


def test_tensors_that_only_pretend_are_refused_and_not_read() -> None:
    scheme, tensors = stored("int4", (40, 256), method="rtn")
    prepared = scheme.prepare(tensors)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="numpy"):
        scheme.linear(torch.ones(1, 256), prepared)


def test_sums_beyond_the_largest_number_are_infinite_when_they_are_rounded() -> None:
    """bfloat16 ends at 3.39e38, float32 at 3.40e38: between them rounding carries into the exponent."""
    codes, scales = torch.full((2, 64), 0x99, dtype=torch.uint8), torch.tensor([[1.0], [-1.0]])  # 128 codes less 8: 1
    run = cpu_codes.integers(codes, scales, None, 4, 128, 128)
    x = torch.zeros(1, 128)
    x[0, 5] = 3.399e38
    assert run(x, torch.float32).isfinite().all()
    assert run(x, torch.bfloat16).tolist() == [[math.inf, -math.inf]]


@pytest.mark.parametrize(
    "name, options",
    [("int4", {"method": "rtn"}), ("kmeans", {"method": "rtn"}), ("df11", {"coding": "fixed"}), ("fp8", {})],
)
def test_other_defaults_of_torch_change_nothing(name: str, options: dict[str, Any]) -> None:
    scheme, tensors = stored(name, (40, 256), **options)
    prepared = scheme.prepare(tensors)
    for tokens in (1, 5):
        x = gaussian(tokens, 256)
        wanted = scheme.linear(x, prepared)
        with torch.device("meta"):
            assert torch.equal(scheme.linear(x, prepared), wanted)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            torch.set_default_dtype(dtype)
            try:
                assert torch.equal(scheme.linear(x, prepared), wanted)
            finally:
                torch.set_default_dtype(torch.float32)


def test_inputs_that_are_views_with_a_sign_are_no_plain_memory() -> None:
    scheme, tensors = stored("int4", (40, 256), torch.float32, method="rtn")
    prepared, x = scheme.prepare(tensors), gaussian(1, 256, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="negative bit"):
        scheme.linear(torch._neg_view(x), prepared)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_comes_out_as_from_the_decoded_weight(bad: float) -> None:
    scheme, tensors = stored("int4", (32, 128), torch.float32, method="rtn")
    x = gaussian(3, 128, dtype=torch.float32)
    x[1, 5] = bad
    found, wanted = scheme.linear(x, scheme.prepare(tensors)), F.linear(x, scheme.decode(tensors))
    assert torch.equal(found, wanted) or torch.equal(found.isfinite(), wanted.isfinite())
    assert not found[1].isfinite().any()


def test_next_to_nothing_and_nothing_as_inputs() -> None:
    scheme, tensors = stored("int4", (32, 128), torch.float32, method="rtn")
    x = gaussian(2, 128, dtype=torch.float32) * torch.tensor([[1e-36], [0.0]])
    wanted = F.linear(x.double(), scheme.decode(tensors).double())
    assert error(scheme.linear(x, scheme.prepare(tensors)), wanted) < BOUND


def test_threads_do_not_change_a_bit(on_threads: Any) -> None:
    """Nor do products with other layouts before and between."""
    weights = [
        stored("int4", (1040, 256), method="rtn"),
        stored("kmeans", (70, 256), method="rtn", bits=3),
        stored("kmeans", (70, 256), method="rtn"),
        stored("df11", (70, 256), coding="fixed"),
        stored("fp8", (70, 256)),
    ]
    x = gaussian(5, 256)
    first, *others = on_threads(lambda: [scheme.linear(x, scheme.prepare(tensors)) for scheme, tensors in weights])
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))
    for y, (scheme, tensors) in zip(first, weights, strict=True):
        assert error(y, F.linear(x.double(), scheme.decode(tensors).double())) < 2**-8


def test_a_copy_of_a_layer_multiplies_with_its_own_tensors() -> None:
    layer = compress.linear(gaussian(64, 128), "int4", method="rtn")
    x = gaussian(2, 128)
    before = layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.tensors()["weight_scale"].zero_()
    assert not other(x).any() and torch.equal(layer(x), before)


def test_autocast_decides_the_dtype_of_large_and_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for least in (1, 1 << 30):
        monkeypatch.setattr(cpu, "LEAST", least)
        layer = compress.linear(gaussian(64, 128), "int4", method="rtn")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(gaussian(2, 128, dtype=torch.float32)).dtype == torch.bfloat16


def test_a_gradient_of_the_inputs_goes_through_the_decoded_weight() -> None:
    layer = compress.linear(gaussian(64, 128, dtype=torch.float32), "int4", method="rtn")
    x = gaussian(2, 128, dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(0).expand(2, -1), atol=1e-5)


def test_what_is_faster_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMPRESS_CPU_PATH")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    measured._known.cache_clear()
    scheme, tensors = stored("int4", (512, 256), method="rtn")
    prepared, x = scheme.prepare(tensors), gaussian(20, 256)
    first = scheme.linear(x, prepared)
    kept = json.loads((tmp_path / "speed.json").read_text())
    (known,) = kept.values()
    (limit,) = (found for name, found in known.items() if name.startswith(prepared.product.layout))
    assert limit == measured.MANY or 0 <= limit < measured.SIZES[-1]

    def fail(*_: Any) -> None:
        raise AssertionError("it is measured again")

    measured._known.cache_clear()  # as in another process
    monkeypatch.setattr(measured, "_seconds", fail)
    assert torch.equal(scheme.linear(x, prepared), first)
    monkeypatch.setattr(measured, "_machine", lambda: "another")
    with pytest.raises(AssertionError, match="measured again"):
        scheme.linear(x, prepared)
    measured._known.cache_clear()


@pytest.mark.parametrize(
    ("times", "others", "limit"),
    [
        ((1, 4, 16, 64), (3, 3, 6, 18), 3),  # 4 tokens take 4 and 3, 3 take 3 and 3
        ((1, 4, 16, 64), (2, 5, 17, 65), measured.MANY),
        ((2, 2, 2, 2), (1, 9, 9, 9), 0),
        ((1, 4, 16, 64), (9, 9, 10, 34), 9),  # from 4 on a token more takes 1, and a twelfth: 9 take 9 and 9.4
        ((1, 4, 16, 80), (9, 10, 18, 66), 22),  # from 16 on 4/3 and 1: the same for 22, 24
    ],
)
def test_the_sizes_between_those_that_are_timed_are_interpolated(
    times: tuple[int, ...], others: tuple[int, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "_remembered", lambda name, measure: measure())
    monkeypatch.setattr(measured, "_seconds", lambda *functions: [*times, *others])
    monkeypatch.setattr(measured, "WORTH", 0.0)
    assert measured.most_tokens("", (1, 8), torch.sum, torch.sum) == limit
    assert measured._between((16, 64, 256), [-1, -6, -20], 1) == -1  # fewer are not guessed


@pytest.mark.parametrize(("part", "limit"), [(0.96, measured.MANY), (0.94, 0)])
def test_a_little_that_decoding_saves_is_not_worth_it(part: float, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_remembered", lambda name, measure: measure())
    monkeypatch.setattr(measured, "_seconds", lambda *functions: [1, 4, 16, 64, part, 4 * part, 16 * part, 64 * part])
    assert measured.most_tokens("", (1, 8), torch.sum, torch.sum) == limit


def test_small_weights_are_decoded_and_a_choice_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, tensors = stored("int4", (64, 128), method="rtn")
    asked: list[str | None] = []
    for forced in ("fused", "dense", None):
        monkeypatch.setenv("COMPRESS_CPU_PATH", forced) if forced else monkeypatch.delenv("COMPRESS_CPU_PATH")
        prepared = scheme.prepare(tensors)
        run = prepared.product.run
        object.__setattr__(
            prepared.product, "run", lambda x, dtype, f=forced, run=run: asked.append(f) or run(x, dtype)
        )
        scheme.linear(gaussian(2, 128), prepared)
    assert asked == ["fused"] and 64 * 128 < cpu.LEAST


def test_groups_that_no_vector_takes_and_bit_planes_are_decoded() -> None:
    for name, options in (
        ("int4", {}),  # groups of 86
        ("kmeans", {"codebook": "nf", "bits": 3, "block_size": 32}),
        ("kmeans", {"nested": True}),
    ):
        scheme, tensors = stored(name, (16, 172), method="rtn", **options)
        assert not isinstance(scheme.prepare(tensors), Prepared)


def test_a_processor_without_long_vectors_gives_the_same() -> None:
    """The loop is compiled for a processor that has nothing but what every one of its kind has."""
    script = (
        "import torch; from compress.formats.bitpack import pack; from compress.kernels import cpu_codes, simd\n"
        "assert 'avx2' not in simd.features()\n"
        "codes = torch.randint(0, 16, (19, 96), dtype=torch.uint8); scales, x = torch.rand(19, 3), torch.randn(1, 96)\n"
        "found = cpu_codes.integers(pack(codes, 4).view(torch.uint8), scales, None, 4, 32, x.shape[1])(x, x.dtype)\n"
        "wanted = x.double() @ ((codes.double() - 8) * scales.double().repeat_interleave(32, 1)).T\n"
        f"assert (found - wanted).norm() < {BOUND} * wanted.norm()"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("text", ["[]", "null", '{"x": 1}', "{", '{"MACHINE": {"layout": null, "other": [1]}}'])
def test_a_damaged_file_of_speeds_is_measured_anew(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    measured._known.cache_clear()
    (tmp_path / "speed.json").write_text(text.replace("MACHINE", measured._machine()))
    assert measured._remembered("layout", lambda: 7) == 7
    measured._known.cache_clear()
    assert measured._remembered("layout", lambda: 8) == 7
    measured._known.cache_clear()


def test_what_decides_what_is_stored_does_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_CPU_PATH")
    scheme, tensors = stored("int4", (512, 256), method="rtn")
    prepared, x = scheme.prepare(tensors), gaussian(2, 256)
    plain = F.linear(x, scheme.decode(tensors))
    with cpu.decoded():
        assert torch.equal(scheme.linear(x, prepared), plain)
    assert not torch.equal(scheme.linear(x, prepared), plain)
