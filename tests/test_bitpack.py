import pytest
import torch
from torch import Tensor

from compress.formats.bitpack import pack, packed_width, unpack

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (1, 7), (3, 32), (2, 33), (5, 172), (4, 128), (1, 1000)]


def random_values(rows: int, count: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + count)
    return torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=generator)


def bitstream(row: list[int], bits: int) -> list[int]:
    """The row as one Python integer, cut into signed 32-bit words."""
    stream = sum(value << (bits * i) for i, value in enumerate(row))
    words = [(stream >> (32 * i)) & (2**32 - 1) for i in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def test_eight_values_of_4_bits_make_one_word_low_bits_first() -> None:
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert pack(values, 4).tolist() == [[0x07654321]]


def test_a_3_bit_value_straddles_two_words() -> None:
    values = torch.zeros(1, 11, dtype=torch.uint8)
    values[0, 10] = 0b101  # bits 30, 31 and 32
    assert pack(values, 3).tolist() == [[1 << 30, 1]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_is_the_python_bitstream_and_unpack_its_inverse(bits: int, shape: tuple[int, int]) -> None:
    values = random_values(*shape, bits)
    packed = pack(values, bits)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert packed.tolist() == [bitstream(row, bits) for row in values.tolist()]
    assert torch.equal(unpack(packed, bits, shape[1]), values)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_that_of_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = random_values(*shape, bits)
    signed = (values.int() - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack(values, bits), theirs)
    unpacked = helpers.unpack_from_int32(pack(values, bits), bits, torch.Size(shape))
    assert torch.equal(unpacked.int(), signed.int())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_tensors_stay_empty(bits: int, shape: tuple[int, int]) -> None:
    values = torch.zeros(shape, dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.shape == (shape[0], packed_width(shape[1], bits))
    assert torch.equal(unpack(packed, bits, shape[1]), values)


@pytest.mark.parametrize("bits", WIDTHS)
def test_views_with_strides_and_odd_offsets_are_packed_by_value(bits: int) -> None:
    values = random_values(9, 41, bits)
    part = values.T[3:36, 1:8]
    assert torch.equal(pack(part, bits), pack(part.contiguous().clone(), bits))
    assert torch.equal(unpack(pack(part, bits), bits, 7), part)
    packed = pack(values, bits)
    assert torch.equal(unpack(packed[2:], bits, 41), values[2:])


def test_wrong_widths_types_and_sizes_are_refused() -> None:
    values = torch.zeros(2, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits: 9 is not in 1..8"):
        pack(values, 9)
    with pytest.raises(ValueError, match="values: a 2-D torch.uint8"):
        pack(values.int(), 4)
    with pytest.raises(ValueError, match="take 2 words a row, not 1"):
        unpack(pack(values, 4), 4, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_gpu_packs_the_same_words(bits: int) -> None:
    values = random_values(4, 172, bits)
    packed = pack(values.cuda(), bits)
    assert torch.equal(packed.cpu(), pack(values, bits))
    assert torch.equal(unpack(packed, bits, 172).cpu(), values)
