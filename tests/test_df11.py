"""Lossless is compared as integers: a NaN differs from itself as a number, and -0 does not differ from 0."""

import dataclasses
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.df11 import SMALLEST, Df11
from compress.formats import words as floats
from compress.formats.huffman import CHUNK
from compress.kernels import df11 as kernels
from compress.scheme import Spec, Tensors

DECODE = kernels.decode
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
CODINGS = [Df11("huffman"), Df11("fixed")]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# bits of the exponent and of the mantissa
FIELDS = {
    torch.bfloat16: (8, 7),
    torch.float16: (5, 10),
    torch.float32: (8, 23),
    torch.float8_e4m3fn: (4, 3),
    torch.float8_e5m2: (5, 2),
}
KINDS = ["random", "zeros", "one value", "denormal", "-0", "infinity", "NaN", "high", "gaussian"]


def bits(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().view(-1).view(INTEGERS[weight.dtype.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def specs(tensors: Tensors) -> dict[str, Spec]:
    return {local: Spec(tensor.dtype, tuple(tensor.shape)) for local, tensor in tensors.items()}


def values(kind: str, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(count,) of dtype: all with exponent and mantissa of this kind."""
    generator = torch.Generator().manual_seed(seed)
    exponent_bits, mantissa_bits = FIELDS[dtype]
    if kind == "gaussian":
        return torch.randn(count, generator=generator).mul(0.02).to(dtype)
    exponents, mantissas = 1 << exponent_bits, 1 << mantissa_bits
    lowest, highest = {
        "denormal": (0, 0),
        "infinity": (exponents - 1, exponents - 1),
        "NaN": (exponents - 1, exponents - 1),
        "high": (exponents * 15 // 16, exponents - 1),  # of eight bits, 240 and above
    }.get(kind, (0, exponents - 1))
    sign = torch.randint(0, 2, (count,), generator=generator)
    exponent = torch.randint(lowest, highest + 1, (count,), generator=generator)
    mantissa = torch.randint(1 if kind in ("denormal", "NaN") else 0, mantissas, (count,), generator=generator)
    if kind == "infinity":
        mantissa.zero_()
    whole = ((sign << exponent_bits | exponent) << mantissa_bits) | mantissa
    if kind in ("zeros", "-0"):
        whole.fill_(0 if kind == "zeros" else 1 << (exponent_bits + mantissa_bits))
    if kind == "one value":
        whole.fill_(whole[0].item() if count else 0)
    return whole.to(INTEGERS[dtype.itemsize]).view(dtype)


def assert_lossless(weight: Tensor, scheme: Df11) -> Tensors:
    """All that holds of every weight. Returns what is stored."""
    before = bits(weight).clone()
    tensors = scheme.encode(weight)
    assert torch.equal(bits(weight), before), "the input was changed"
    stored = specs(tensors)
    scheme.check(stored)
    assert scheme.original(stored) == Spec(weight.dtype, tuple(weight.shape))
    assert size(tensors) <= weight.nbytes
    assert size(tensors) == scheme.measure(weight)
    planned = scheme.specs(tuple(weight.shape), weight.dtype)
    assert all(spec.dtype == planned[n].dtype and spec.bytes <= planned[n].bytes for n, spec in stored.items())
    for each in CODINGS:  # the tensors say what they are, and not the options
        assert same_bits(each.decode(tensors), weight)
    assert all(same_bits(a, tensors[local]) for local, a in scheme.encode(weight).items())
    return tensors


# Every bit comes back

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 16, 31, 64, 129, 257]), max_size=3).filter(
    lambda shape: math.prod(shape) <= 40_000
)


@given(
    SHAPES,
    st.sampled_from(DTYPES),
    st.sampled_from(CODINGS),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 20_000)), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
@settings(deadline=None, derandomize=True, database=None, max_examples=400)
def test_any_weight_comes_back_bit_for_bit(
    shape: list[int], dtype: torch.dtype, scheme: Df11, parts: list[tuple[str, int]], seed: int
) -> None:
    pieces = [values(kind, length, dtype, seed + i) for i, (kind, length) in enumerate(parts)]
    pieces.append(values("gaussian", math.prod(shape), dtype, seed))
    assert_lossless(torch.cat(pieces)[: math.prod(shape)].view(shape), scheme)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.sampled_from(DTYPES), st.sampled_from(CODINGS))
@settings(deadline=None, derandomize=True, database=None, max_examples=150)
def test_any_bits_come_back(words: list[int], dtype: torch.dtype, scheme: Df11) -> None:
    weight = torch.tensor(words, dtype=torch.int64).to(INTEGERS[dtype.itemsize]).view(dtype)
    assert_lossless(weight, scheme)
    assert_lossless(weight.repeat(50), scheme)  # of so many the codes are smaller


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_several_chunks_of_each_kind_come_back(kind: str, dtype: torch.dtype, scheme: Df11) -> None:
    weight = values(kind, 71 * 1000, dtype).view(71, 1000)  # four whole chunks and a part
    tensors = assert_lossless(weight, scheme)
    # Sixteen exponents, or eight of them and every other word an escape of 16 bits.
    does_not_pay = kind == "random" or (kind == "high" and "base" in scheme.specs((1,), dtype))
    assert ("weight" in tensors) == does_not_pay


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 5), (3, 0, 2), (1, 1, 1), (3, 129, 257)], ids=str)
def test_any_shape_comes_back(shape: tuple[int, ...], dtype: torch.dtype, scheme: Df11) -> None:
    tensors = assert_lossless(values("gaussian", math.prod(shape), dtype).view(shape), scheme)
    assert ("weight" in tensors) == (math.prod(shape) < 2)


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_contiguous_comes_back(dtype: torch.dtype, scheme: Df11) -> None:
    weight = values("gaussian", 120 * 200, dtype).view(120, 200)
    for view in (weight.T, weight[::2, 1::3], weight[3:, :7], weight[:1].expand(90, 200), weight.view(4, 30, 200)[1]):
        tensors = assert_lossless(view, scheme)
        assert "weight" in tensors or all(tensor.is_contiguous() for tensor in tensors.values())
    assert same_bits(scheme.decode(scheme.encode(torch.nn.Parameter(weight, requires_grad=False).T)), weight.T)


def test_a_weight_that_wants_a_gradient_is_encoded_without_it() -> None:
    weight = torch.nn.Parameter(values("gaussian", 4096, torch.bfloat16))
    assert not any(tensor.requires_grad for tensor in Df11().encode(weight).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_bits_are_stored_as_they_are(dtype: torch.dtype) -> None:
    weight = values("random", 50_000, dtype).view(50, 1000)
    for scheme in CODINGS:
        tensors = scheme.encode(weight)
        assert tensors.keys() == {"weight"} and same_bits(tensors["weight"], weight)
        assert scheme.measure(weight) == weight.nbytes


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.complex64, torch.int32, torch.bool], ids=str)
def test_another_dtype_is_refused_by_its_name(dtype: torch.dtype) -> None:
    weight = torch.zeros(64, 64, dtype=dtype)
    for call in (CODINGS[0].encode, CODINGS[1].encode, CODINGS[0].measure):
        with pytest.raises(ValueError, match=f"weight: .*not {dtype}"):
            call(weight)
    assert not CODINGS[0].takes(Spec(dtype, (64, 64)))


def test_tensors_too_small_to_gain_are_not_taken() -> None:
    for dtype in DTYPES:
        assert Df11().takes(Spec(dtype, (SMALLEST,)))
        assert Df11().takes(Spec(dtype, (2, SMALLEST // 4, 2)))
        assert not Df11().takes(Spec(dtype, (SMALLEST - 1,)))
        assert not Df11().takes(Spec(dtype, ()))
        assert not Df11().takes(Spec(dtype, (0, SMALLEST)))


# The layout


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
def test_sign_and_mantissa_of_a_word_by_hand(scheme: Df11) -> None:
    # 0x3F80 is 1, 0xBFC0 is -1.5, 0x4049 is 3.140625: exponents 127, 127, 128, and the other bits 0, 0x80 + 0x40, 0x49.
    weight = torch.tensor([1.0, -1.5, 3.140625] * 1000, dtype=torch.bfloat16)
    tensors = scheme.encode(weight)
    assert tensors["sign_mantissa"].tolist() == [0, 0xC0, 0x49] * 1000
    if scheme.coding == "huffman":
        assert tensors["table"].tolist() == [[127, 1], [128, 1]]
        # 127 has code 0 and 128 code 1: 001001 ..., the first bit lowest, is 0b00100100, 0b01001001, 0b10010010
        assert tensors["codes"][:6].tolist() == [0x24, 0x49, 0x92] * 2
        assert tensors["chunk_bytes"].tolist() == [375]
        assert tensors["codes"].shape == (376 + 8,)
    else:
        base = int(tensors["base"])
        assert base <= 127 and 128 <= base + 7
        assert tensors["escapes"].numel() == 0 and tensors["escape_counts"].tolist() == [0] * 12
        assert tensors["codes"].shape == (12, 96)


def test_the_parts_of_each_dtype() -> None:
    huffman, fixed = {"table", "chunk_bytes", "codes"}, {"base", "codes", "escape_counts", "escapes"}
    for dtype, more in {
        torch.bfloat16: {"sign_mantissa"},
        torch.float16: {"sign_mantissa", "like"},
        torch.float32: {"sign_mantissa", "low", "like"},
        torch.float8_e4m3fn: {"like"},
        torch.float8_e5m2: {"like"},
    }.items():
        weight = values("gaussian", 60_000, dtype).view(3, 100, 200)
        tensors = CODINGS[0].encode(weight)
        assert tensors.keys() == huffman | more
        assert "like" not in tensors or (tensors["like"].dtype, tensors["like"].shape) == (dtype, (0, 3, 100, 200))
        has_fixed = dtype in (torch.bfloat16, torch.float32)
        assert CODINGS[1].encode(weight).keys() == (fixed if has_fixed else huffman) | more


def test_float16_has_three_bits_of_its_mantissa_in_the_symbol() -> None:
    weight = torch.tensor(
        [1.0, 1.0 + 2**-10, 1.125, -1.0] * 1000, dtype=torch.float16
    )  # 0x3C00, 0x3C01, 0x3C80, 0xBC00
    tensors = Df11().encode(weight)
    assert tensors["table"].tolist() == [[0x78, 1], [0x79, 1]]
    assert tensors["sign_mantissa"].tolist() == [0, 1, 0, 0x80] * 1000


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
def test_float32_that_holds_bfloat16_is_as_small_as_that(scheme: Df11) -> None:
    weight = values("gaussian", 90_000, torch.bfloat16).view(300, 300)
    tensors = assert_lossless(weight.float(), scheme)
    assert "low" not in tensors
    assert size(tensors) == size(scheme.encode(weight))
    one = weight.float()
    bits(one)[-1] ^= 1  # a single bit further down, and all lower halves are kept
    tensors = assert_lossless(one, scheme)
    assert int(tensors["low"].count_nonzero()) == 1
    assert size(tensors) == size(scheme.encode(weight)) + 2 * weight.numel()


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
def test_lower_halves_of_float32_are_kept_whatever_they_are(scheme: Df11) -> None:
    lower = torch.arange(1 << 16, dtype=torch.int32)
    weight = (0x3F800000 | lower).view(torch.float32).view(256, 256)
    tensors = assert_lossless(weight, scheme)
    assert torch.equal(tensors["low"].view(-1).to(torch.int32) & 0xFFFF, lower)
    assert_lossless(-weight, scheme)


def test_the_halves_of_a_float32_by_hand() -> None:
    whole = torch.tensor([0x3F800001, 0x7FC0FFFF, -1, -0x80000000], dtype=torch.int32).view(2, 1, 2)
    weight = whole.view(torch.float32)
    words, low = floats.split(weight)
    assert words.tolist() == [0x3F80, 0x7FC0, 0xFFFF, 0x8000]
    assert low is not None and low.tolist() == [[[1, -1]], [[-1, 0]]]
    upper = torch.from_numpy(words.view(np.int16)).view(2, 1, 2)
    assert same_bits(floats.join(upper, low, torch.float32), weight)
    assert bits(floats.join(upper, None, torch.float32)).tolist() == [0x3F800000, 0x7FC00000, -0x10000, -0x80000000]
    for meta in (upper.to("meta"), upper.to("meta")[0, 0, 0]):  # on the device of the words
        joined = floats.join(meta, meta, torch.float32)
        assert (joined.device.type, joined.dtype, joined.shape) == ("meta", torch.float32, meta.shape)


def test_halves_are_copies_and_not_views_of_the_weight() -> None:
    for shape in ((), (1,), (2, 3)):
        weight = torch.full(shape, 0x3F800001, dtype=torch.int32).view(torch.float32)
        words, low = floats.split(weight)
        assert low is not None
        bits(weight).zero_()
        assert set(words.tolist()) == {0x3F80} and set(low.view(-1).tolist()) == {1}
        assert low.shape == shape and low.is_contiguous()


def test_a_bit_in_the_lower_half_is_found_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floats, "_PART", 4)
    for count in (1, 4, 9):
        assert floats.split(torch.ones(count))[1] is None
        for i in range(count):
            weight = torch.ones(count)
            bits(weight)[i] ^= -0x8000 ^ -0x10000  # bit 15
            low = floats.split(weight)[1]
            assert low is not None and low.tolist() == [-0x8000 if j == i else 0 for j in range(count)]


class Made(TorchDispatchMode):
    """most: bytes of the largest tensor that an operation made and that is no view."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given_ = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given_:
                self.most = max(self.most, tensor.nbytes)
        return out


@pytest.mark.parametrize("lowest", [0, 1])
def test_float32_is_split_and_joined_without_more_memory_than_the_result(lowest: int) -> None:
    weight = torch.full((1 << 21,), 0x3F800000 | lowest, dtype=torch.int32).view(torch.float32)
    words, low = floats.split(weight)
    upper = torch.from_numpy(words.view(np.int16))
    for call, most in (
        (lambda: floats.split(weight), 4 * weight.numel() if lowest else 2 * weight.numel()),
        (lambda: floats.join(upper, low, torch.float32), weight.nbytes),
    ):
        with Made() as made:
            call()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most <= peak <= most + 100_000, "the results are NumPy's memory"
        assert made.most <= 100_000


# Size


def bits_per_weight(tensors: Tensors, weight: Tensor) -> float:
    return 8 * size(tensors) / weight.numel()


def entropy(weight: Tensor) -> float:
    """Bits per weight of the exponents of a bfloat16 at order 0."""
    counts = torch.bincount((weight.view(-1).view(torch.int16).int() >> 7) & 0xFF).double()
    share = counts[counts > 0] / counts.sum()
    return -float((share * share.log2()).sum())


def test_gaussian_bfloat16_is_near_its_entropy() -> None:
    weight = values("gaussian", 1 << 20, torch.bfloat16).view(1024, 1024)
    huffman, fixed = (assert_lossless(weight, scheme) for scheme in CODINGS)
    assert bits_per_weight(huffman, weight) < 1.005 * (entropy(weight) + 8)
    assert bits_per_weight(huffman, weight) <= 10.6  # 10.75 at most, and the paper's 10.80
    assert bits_per_weight(fixed, weight) <= 11.3


@pytest.mark.parametrize("dtype, most", [(torch.float16, 13.6), (torch.float8_e4m3fn, 6.6), (torch.float8_e5m2, 5.6)])
def test_gaussians_of_other_dtypes_get_smaller(dtype: torch.dtype, most: float) -> None:
    scale = 1 if dtype == torch.float16 else 5000  # a float8 is stored with a scale that uses its range
    weight = values("gaussian", 1 << 18, torch.float32).mul(scale).to(dtype)
    assert bits_per_weight(assert_lossless(weight, Df11()), weight) <= most


ASSETS = os.environ.get("COMPRESS_ASSETS")


@pytest.mark.skipif(not ASSETS, reason="COMPRESS_ASSETS is not set")
def test_trained_weights_are_near_their_entropy() -> None:
    folder = Path(ASSETS or "") / "weights" / "gpt2-small-attention"
    weights = load_file(folder / "layers_0_3_7_11.bf16.safetensors")
    assert weights
    for name, weight in weights.items():
        if weight.numel() < 1 << 16:  # biases
            continue
        huffman, fixed = (assert_lossless(weight, scheme) for scheme in CODINGS)
        assert bits_per_weight(huffman, weight) < 1.005 * (entropy(weight) + 8), name
        assert bits_per_weight(fixed, weight) < 1 + (entropy(weight) + 8), name  # their tails are long


# Rows


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "random"])
@pytest.mark.parametrize("shape", [(700, 129), (3, 20_000), (90_000, 1), (5, CHUNK), (1, 2000)], ids=str)
def test_rows_are_those_of_the_whole(shape: tuple[int, int], kind: str, dtype: torch.dtype, scheme: Df11) -> None:
    weight = values(kind, math.prod(shape), dtype).view(shape)
    tensors = scheme.encode(weight)
    assert ("weight" in tensors) == (kind == "random")
    whole = scheme.decode(tensors)
    last = shape[0] - 1
    for index in (
        torch.randint(0, shape[0], (17,), generator=torch.Generator().manual_seed(1)),
        torch.tensor([last, 0, last, last, 0]),
        torch.tensor([[0], [last]], dtype=torch.int32),
        torch.tensor(last),
        torch.arange(min(shape[0], 1000)),
    ):
        assert same_bits(scheme.rows(tensors, index), whole[index])
    for wrong in ([-1], [shape[0]], [0, -shape[0]], [[0, 2**40]]):
        with pytest.raises(IndexError, match=f"rows .* of a weight with {shape[0]}"):
            scheme.rows(tensors, torch.tensor(wrong))


@pytest.mark.parametrize("shape", [(64, 1024), (6, 3 * CHUNK // 2), (65_536, 1), (9, 7000)], ids=str)
@pytest.mark.parametrize("scheme", CODINGS, ids=str)
def test_rows_decode_the_chunks_that_hold_them_and_no_other(
    scheme: Df11, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = values("gaussian", math.prod(shape), torch.bfloat16).view(shape)
    tensors = scheme.encode(weight)
    decoded: list[list[int]] = []

    def decode(tensors: Tensors, count: int, chunks: Any = None) -> Tensor:
        decoded.append(chunks.tolist())
        return DECODE(tensors, count, chunks)

    monkeypatch.setattr(kernels, "decode", decode)
    last = shape[0] - 1
    for rows in ([0], [last], [0, last], [1, 4], [last, 2, 2, 5], list(range(shape[0]))):
        words = kernels.decode_rows(tensors, shape, torch.tensor(rows))
        assert torch.equal(words, weight.view(torch.int16)[rows])
        places = (torch.tensor(rows)[:, None] * shape[1] + torch.arange(shape[1])) // CHUNK
        assert decoded.pop() == places.unique().tolist()


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_are_none(dtype: torch.dtype, scheme: Df11) -> None:
    tensors = scheme.encode(values("gaussian", 4000, dtype).view(40, 100))
    for shape in ((0,), (2, 0)):
        got = scheme.rows(tensors, torch.empty(shape, dtype=torch.int64))
        assert (got.dtype, tuple(got.shape)) == (dtype, (*shape, 100))


# Headers that do not belong together

STORED = {
    f"{scheme.coding}, {dtype}": scheme.encode(values("gaussian", 60_000, dtype).view(200, 300))
    for scheme in CODINGS
    for dtype in DTYPES
}


@pytest.mark.parametrize("name", STORED)
def test_a_part_that_is_missing_is_named(name: str) -> None:
    tensors = STORED[name]
    for local in tensors.keys() - {"low", "like"}:  # without these it is a weight as well, of another dtype
        others = specs({n: tensor for n, tensor in tensors.items() if n != local})
        with pytest.raises(ValueError, match=f"no {local} is stored, so the checkpoint is incomplete"):
            Df11().check(others)
    with pytest.raises(ValueError, match="no sign_mantissa is stored"):
        Df11().check({})


@pytest.mark.parametrize("name", STORED)
def test_a_part_of_another_shape_or_dtype_is_named(name: str) -> None:
    stored = specs(STORED[name])
    for local, spec in stored.items():
        wrong = [dataclasses.replace(spec, dtype=torch.int64)]
        if local != ("sign_mantissa" if "bfloat16" in name else "like"):  # which says what shape the weight has
            wrong.append(Spec(spec.dtype, (*spec.shape, 1)))
        if local in ("base", "chunk_bytes", "escape_counts"):
            wrong += [Spec(spec.dtype, (spec.shape[0] + 1,)), Spec(spec.dtype, (0,)), Spec(spec.dtype, ())]
        if local == "low" or (local == "sign_mantissa" and "bfloat16" not in name):
            wrong += [Spec(spec.dtype, (300, 200)), Spec(spec.dtype, (60_000,)), Spec(spec.dtype, (200, 299))]
        if local == "table" or (local == "codes" and len(spec.shape) == 2):
            wrong += [Spec(spec.dtype, (spec.shape[0], spec.shape[1] + 1)), Spec(spec.dtype, (math.prod(spec.shape),))]
        for other in wrong:
            with pytest.raises(ValueError, match=rf"^{local} is Spec.*download it again"):
                Df11().check(stored | {local: other})
    shape = "sign_mantissa" if "bfloat16" in name else "like"
    other = Spec(stored[shape].dtype, (*stored[shape].shape[:-1], 30_000))  # of so many weights the parts are more
    with pytest.raises(ValueError, match=r"^(sign_mantissa|chunk_bytes|codes|escape_counts) is Spec"):
        Df11().check(stored | {shape: other})


@pytest.mark.parametrize("name", STORED)
def test_a_part_that_does_not_belong_there_is_named(name: str) -> None:
    stored = specs(STORED[name])
    spec = Spec(torch.uint8, (1,))
    strange = {"scales", *("low", "base", "table", "sign_mantissa")} - stored.keys()
    if "torch.float32" in name:
        strange -= {"low"}
    for local in strange:
        with pytest.raises(ValueError, match=r"is Spec|is stored"):
            Df11().check(stored | {local: spec})
    with pytest.raises(ValueError, match="^scales is Spec"):
        Df11().check(stored | {"scales": spec})


def test_an_unknown_dtype_in_the_header_is_named() -> None:
    stored = specs(STORED["huffman, torch.float16"])
    for dtype in (torch.float64, torch.int8, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"^like is Spec\(dtype={dtype}"):
            Df11().check(stored | {"like": Spec(dtype, (0, 200, 300))})


# Damage that the headers do not show


@pytest.mark.parametrize("name", STORED)
def test_damaged_values_are_refused_or_give_a_weight_of_the_same_shape(name: str) -> None:
    tensors = STORED[name]
    original = Df11().original(specs(tensors))
    refused = 0
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        for local, tensor in tensors.items():
            for other in damaged(local, tensor, generator):
                stored = tensors | {local: other}
                try:
                    Df11().check(specs(stored))
                    shape = Df11().original(specs(stored)).shape  # that of a bfloat16 is only in sign_mantissa
                    assert Df11().rows(stored, torch.tensor([shape[0] - 1, 0])).shape == (2, *shape[1:])
                    got = Df11().decode(stored)
                except ValueError:
                    refused += 1
                    continue
                assert (got.dtype, tuple(got.shape)) == (original.dtype, shape)
                assert shape == original.shape or local == "sign_mantissa"
    assert refused > 100


def damaged(local: str, tensor: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The tensor with a bit flipped, with noise, cut off, and longer."""
    raw: Any = tensor.reshape(-1).view(torch.uint8)
    if not raw.numel():
        return []
    flipped = raw.clone()
    flipped[torch.randint(raw.numel(), (1,), generator=generator)] ^= 1 << int(
        torch.randint(8, (1,), generator=generator)
    )
    noise = torch.randint(0, 256, raw.shape, generator=generator).to(torch.uint8)
    cut = int(torch.randint(len(tensor), (1,), generator=generator))
    whole = [other.view(tensor.dtype).view(tensor.shape) for other in (flipped, noise)]
    return [*whole, tensor[:cut], torch.cat([tensor, tensor[: 1 + cut]])]


@pytest.mark.parametrize("scheme", CODINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_are_those_of_the_original_though_weights_are_decoded_into_the_same_memory(
    dtype: torch.dtype, scheme: Df11, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger and smaller ones in turns, one that is too large to be kept, and what a gradient needs."""
    monkeypatch.setattr(kernels, "MOST_KEPT", 2 * 200 * 300)
    monkeypatch.setattr(kernels, "_room", kernels._Room())
    torch.manual_seed(0)
    weights = [torch.randn(rows, 300).mul(0.02).to(dtype) for rows in (100, 200, 50, 300, 100)]
    stored = [scheme.encode(weight) for weight in weights]
    x, bias = torch.randn(6, 300).to(dtype), torch.randn(300).to(dtype)
    for _ in range(2):
        for weight, tensors in zip(weights, stored, strict=True):
            for some in (None, bias[: len(weight)]):
                assert same_bits(scheme.dense(x, tensors, some), F.linear(x, weight, some))
    assert kernels._room.held is not None and kernels._room.held.numel() == kernels.MOST_KEPT
    inputs = x.clone().requires_grad_()
    y = scheme.linear(inputs, stored[0])
    scheme.dense(x, stored[1])  # would overwrite what the backward pass needs
    y.sum().backward()
    assert inputs.grad is not None and same_bits(inputs.grad, torch.ones_like(y) @ weights[0])
