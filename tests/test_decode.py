"""The compiled decoders and their plain-torch defaults give the same bits, those of the formula."""

from typing import Any

import numpy as np
import pytest
import torch

from compress.formats import bitpack
from compress.kernels import decode
from compress.kernels.cpu_levels import take

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_groups_equal_torch(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    for rows, groups, group_size in ((3, 2, 32), (1, 1, 43), (5, 3, 7), (2, 1, 1), (2, 3, 16), (2, 2, 128)):
        q = torch.randint(0, 1 << bits, (rows, groups * group_size), dtype=torch.uint8)
        scales = torch.randn(rows, groups).mul(0.02).to(dtype)
        zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8)
        packed = bitpack.pack(q, bits)
        for given in (zeros, None):
            offset = torch.full((rows, groups), float(1 << (bits - 1))) if given is None else zeros.float()
            values = q.view(rows, groups, group_size).float() - offset[:, :, None]
            want = (values * scales.float()[:, :, None]).flatten(1).to(dtype)
            for function in (decode.groups, decode.groups_torch):
                got = function(packed, scales, given, bits, group_size)
                assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, 300), (200, 300), (128, 128), (64, 7)], ids=str)
def test_e4m3_equals_torch(block: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randint(0, 256, (200, 300), dtype=torch.uint8)
    weight[(weight & 127) == 127] = 0  # NaN does not occur in what we write, and is not equal to itself
    rows, columns = -(-200 // block[0]), -(-300 // block[1])
    scales = torch.rand(rows, columns).add(0.01).to(dtype)
    spread = scales.float().repeat_interleave(block[0], 0)[:200].repeat_interleave(block[1], 1)[:, :300]
    want = (weight.view(torch.float8_e4m3fn).float() * spread).to(dtype)
    for function in (decode.e4m3, decode.e4m3_torch):
        assert torch.equal(function(weight.view(torch.float8_e4m3fn), scales, block), want)


def test_every_e4m3_code_of_a_row_with_one_scale_is_decoded_and_of_many() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1).view(torch.float8_e4m3fn)
    for scales, block in ((torch.tensor([[3.0], [1e-3]]), (1, 256)), (torch.rand(2, 8) + 0.5, (1, 32))):
        for dtype in DTYPES:
            found, wanted = (f(codes, scales, block, dtype).float() for f in (decode.e4m3, decode.e4m3_torch))
            assert torch.equal(found.isnan(), wanted.isnan()) and int(found.isnan().sum()) == 4
            assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("count", [1, 2, 16, 17, 64, 65, 128, 129, 256])
def test_words_are_looked_up_in_tables_of_every_size(count: int) -> None:
    generator = np.random.default_rng(count)
    table = generator.integers(0, 1 << 16, count).astype(np.uint16)
    for length in (0, 1, 31, 64, 200):
        codes, out = generator.integers(0, count, length).astype(np.uint8), np.zeros(length, np.uint16)
        take(table, codes, out)
        assert (out == table[codes]).all()


def test_threads_do_not_change_a_bit(on_threads: Any) -> None:
    torch.manual_seed(0)
    q = torch.randint(0, 16, (100, 1024), dtype=torch.uint8)
    packed, scales = bitpack.pack(q, 4), torch.randn(100, 8).bfloat16()
    first, *others = on_threads(lambda: decode.groups(packed, scales, None, 4, 128))
    assert all(torch.equal(first, other) for other in others)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    packed, scales = torch.zeros(4, 4, dtype=torch.int32), torch.ones(4, 1)
    for wrong in (packed[:1], torch.zeros(4, 1000, dtype=torch.int32)):
        with pytest.raises(ValueError, match="packed: the shape is"):
            decode.groups(wrong, scales, None, 4, 32)
    with pytest.raises(ValueError, match="zeros: the shape is"):
        decode.groups(packed, scales, torch.zeros(1, 1, dtype=torch.uint8), 4, 32)
    with pytest.raises(ValueError, match="scales: the shape is"):
        decode.e4m3(torch.zeros(4, 8, dtype=torch.float8_e4m3fn), torch.ones(1, 1), (1, 8))


def test_empty_weights_decode_to_empty() -> None:
    assert decode.groups(torch.empty(0, 4, dtype=torch.int32), torch.empty(0, 1), None, 4, 32).shape == (0, 32)
    assert decode.e4m3(torch.empty(0, 8, dtype=torch.float8_e4m3fn), torch.ones(0, 1), (1, 8)).shape == (0, 8)
