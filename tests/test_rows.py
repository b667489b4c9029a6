"""Rows that a compiled loop decodes: the same as those of the whole weight, and multiplied where they are decoded."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_cpu import CASES, error, gaussian, stored

from compress.formats import bitpack
from compress.formats.compiled import jit
from compress.formats.threads import call, entry
from compress.kernels import cpu, decode, lookup, measured
from compress.kernels.cpu_unpack import TOGETHER, unpack_row
from compress.kernels.rows import Rows

LOOPS = [case for case in CASES if case[0] not in ("bitstack", "nf4")]  # whose schemes prepare objects of their own
LOOPS += [("int8", {"activations": "dynamic"}), ("kmeans", {"method": "rtn", "nested": True})]
LOOPS += [("kmeans", {"method": "rtn", "codebook": "bitmod4", "block_size": 32})]


@pytest.mark.parametrize("case", LOOPS, ids=str)
def test_rows_are_those_of_the_whole_weight_and_are_multiplied(case: tuple[str, dict[str, Any]]) -> None:
    for shape in ((83, 416), (1, 352)):
        scheme, tensors = stored(case[0], shape, **case[1])
        rows, weight = scheme.loop(tensors), scheme.decode(tensors)
        assert rows is not None and rows.shape == shape and torch.equal(rows.whole, weight)
        assert torch.equal(rows(slice(32, 80)), weight[32:80])
        for tokens in (1, 4, 7):
            x = gaussian(tokens, shape[1])
            assert error(rows.product(x), F.linear(x.double(), weight.double())) < 1e-6


@pytest.mark.parametrize("name", ["int4", "nf4", "bitstack", "fp8"])
def test_a_few_tokens_are_multiplied_in_the_cache_where_that_is_faster(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and biases, one token of no dimension, and those of several."""
    monkeypatch.setattr(cpu, "LEAST", 1)
    monkeypatch.setenv("COMPRESS_CPU_PATH", "dense")
    monkeypatch.setattr(Rows, "takes", lambda rows, x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(measured, "most_tokens", lambda *_: 6)
    calls, product = [], Rows.product
    monkeypatch.setattr(Rows, "product", lambda rows, x: calls.append(len(x)) or product(rows, x))
    options = {"blocks": 3, "scaling": "none"} if name == "bitstack" else {"method": "rtn"} if name == "int4" else {}
    scheme, tensors = stored(name, (70, 128), **options)
    prepared, bias = scheme.prepare(tensors), gaussian(70)
    weight = scheme.decode(tensors).double()
    for shape, counted in (((128,), [1]), ((2, 3, 128), [6]), ((7, 128), []), ((0, 128), [])):
        x = gaussian(*shape)
        calls.clear()
        y = scheme.linear(x, prepared, bias)
        assert y.dtype == x.dtype and calls == counted
        assert y.numel() == 0 or error(y, F.linear(x.double(), weight, bias.double())) < 0.01
    calls.clear()
    scheme.linear(gaussian(3, 128, dtype=torch.float32), prepared)
    assert calls == []


def test_a_weight_without_columns_and_inputs_that_are_not_bfloat16_are_not_taken() -> None:
    scheme, tensors = stored("int4", (64, 128), method="rtn")
    rows = scheme.loop(tensors)
    assert rows is not None and not rows.takes(torch.zeros(2, 128)) and not rows.takes(torch.zeros(2, 128).half())
    rows = decode.groups_rows(torch.empty(4, 0, dtype=torch.int32), torch.empty(4, 0).bfloat16(), None, 4, 32)
    assert not rows.takes(torch.zeros(2, 0).bfloat16()) and rows.whole.shape == (4, 0)


def test_outliers_are_added_by_no_loop() -> None:
    scheme, tensors = stored("kmeans", (16, 128), method="rtn", outliers=0.01)
    assert scheme.loop(tensors) is None
    x = gaussian(5, 128)
    assert (
        error(scheme.linear(x, scheme.prepare(tensors)), F.linear(x.double(), scheme.decode(tensors).double())) < 0.01
    )


def test_threads_do_not_change_a_bit_of_a_product(on_threads: Any) -> None:
    scheme, tensors = stored("int4", (500, 1024), method="rtn")
    rows, x = scheme.loop(tensors), gaussian(9, 1024)
    assert rows is not None
    first, *others = on_threads(lambda: rows.product(x))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_are_unpacked_from_rows_of_any_length(bits: int) -> None:
    generator = np.random.default_rng(bits)
    for length in (1, 31, 64, 129, 500):
        codes = generator.integers(0, 1 << bits, length).astype(np.uint8)
        packed = bitpack.pack(torch.from_numpy(codes)[None], bits)[0].numpy().view(np.uint8)
        found = np.full(-(-length // TOGETHER) * TOGETHER, 255, np.uint8)
        unpack_row(packed, bits, False, found)
        assert (found[:length] == codes).all()


def test_the_first_of_two_codes_may_lie_in_the_higher_half() -> None:
    packed, found = np.arange(256, dtype=np.uint8), np.empty(512, np.uint8)
    unpack_row(packed, 4, True, found)
    assert (found[::2] == packed >> 4).all() and (found[1::2] == packed & 15).all()


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("group_size", [16, 32])
def test_products_below_the_normal_numbers_are_rounded_as_any_other(bits: int, group_size: int) -> None:
    """The processor's own conversion takes them for zero."""
    torch.manual_seed(bits)
    scales = torch.ldexp(torch.randn(4, 8), torch.tensor([0, -90, -105, -120, -126, -130, -133, 100])).bfloat16()
    scales[0] = 0.0
    q = torch.randint(0, 1 << bits, (4, 8 * group_size), dtype=torch.uint8)
    packed = bitpack.pack(q, bits)
    found, wanted = (f(packed, scales, None, bits, group_size) for f in (decode.groups, decode.groups_torch))
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_small_scales_of_8_bit_floats_too() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    codes[(codes & 127) == 127] = 0
    for power in (0, -79, -81, -120, 110):
        scales = torch.ldexp(torch.rand(4, 8) + 0.5, torch.tensor(power))
        found, wanted = (
            f(codes.view(torch.float8_e4m3fn), scales, (1, 32), torch.bfloat16)
            for f in (decode.e4m3, decode.e4m3_torch)
        )
        assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_scales_may_lie_in_memory_in_any_order() -> None:
    torch.manual_seed(0)
    codes = torch.randn(64, 512).to(torch.float8_e4m3fn)
    for scales, block in ((torch.rand(16, 64).t() + 0.5, (1, 32)), (torch.rand(64, 2)[:, :1] + 0.5, (1, 512))):
        for dtype in (torch.bfloat16, torch.float32):
            found, wanted = (f(codes, scales, block, dtype) for f in (decode.e4m3, decode.e4m3_torch))
            assert torch.equal(found, wanted)
    packed = bitpack.pack(torch.randint(0, 16, (64, 512), dtype=torch.uint8), 4)
    scales = (torch.rand(16, 64).t() + 0.5).bfloat16()
    found, wanted = (f(packed, scales, None, 4, 32) for f in (decode.groups, decode.groups_torch))
    assert torch.equal(found, wanted)


def test_inputs_of_another_width_are_refused_and_many_tokens_are_multiplied_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "LEAST", 1)
    monkeypatch.setattr(cpu, "_TIMED", (16, 64, 100))
    monkeypatch.setattr(Rows, "takes", lambda *_: True)
    monkeypatch.setattr(measured, "most_tokens", lambda *_: measured.MANY)
    scheme, tensors = stored("fp8", (70, 256))
    with pytest.raises(ValueError, match="x: 128 columns, and the weight has 256"):
        scheme.linear(gaussian(4, 128), tensors)
    x, bias = gaussian(250, 256), gaussian(70)
    wanted = F.linear(x.double(), scheme.decode(tensors).double(), bias.double())
    assert error(scheme.dense(x, tensors, bias), wanted) < 0.01


@jit
def _fail(start, stop, out):  # type: ignore[no-untyped-def]
    if stop > 1:
        raise MemoryError
    out[start] += 1.0


@jit
def _call(loop, stop, out):  # type: ignore[no-untyped-def]
    call(loop, 0, stop, (out,))
    out[0] += 10.0


def test_a_loop_that_another_calls_fails_it() -> None:
    out = np.zeros(2, np.float32)
    _call(entry(_fail, (out,)), 1, out)
    assert out[0] == 11
    with pytest.raises(MemoryError):
        _call(entry(_fail, (out,)), 2, out)
    assert out[0] == 11


def test_tables_of_any_dtype_are_decoded_in_parts() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 8, (70, 200), dtype=torch.uint8)
    packed = bitpack.pack(codes, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tables = torch.randn(70, 1, 8).to(dtype)
        rows = lookup.decode_rows(packed, tables, (70, 200), 1, 200)
        wanted = tables[:, 0].gather(1, codes.long())
        assert torch.equal(rows.whole, wanted) and torch.equal(rows(slice(32, 70)), wanted[32:])
