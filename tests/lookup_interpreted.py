"""The Triton kernels of codebooks in Triton's interpreter. Run by test_interpreted_kernels.py."""

import interpreted
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.formats.bitpack import pack, packed_width
from compress.kernels import lookup, lookup_triton, permuted_kernels, prepared

pytestmark = pytest.mark.filterwarnings(*interpreted.WARNINGS)

SHAPES = [(1, 1), (3, 31), (17, 64), (33, 257), (64, 96), (5, 300)]


def codes_of(shape: tuple[int, int], bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


def planes_of(codes: Tensor, bits: int) -> Tensor:
    return torch.stack([pack((codes >> b) & 1, 1) for b in range(bits - 1, -1, -1)])


def weight_of(shape: tuple[int, int], bits: int, rows: int, planes: bool) -> tuple[lookup.Lookup, Tensor]:
    """A weight for the kernels, and what `decode` makes of it."""
    codes = codes_of(shape, bits)
    indices = planes_of(codes, bits) if planes else pack(codes, bits)
    tables = torch.randn(-(-shape[0] // rows), 1 << bits, generator=torch.Generator().manual_seed(1))
    want = lookup.decode(indices, tables[:, None], shape, rows, shape[1])
    assert torch.equal(want[0, 0], tables[0, int(codes[0, 0])])
    return lookup.pack(indices, tables, shape, rows, shape[1], torch.float32).weight, want


def check(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    x, weight, bias = x.double(), weight.double(), bias.double()
    # Sums of a few hundred float32 products, each rounded to 2**-24 of it.
    size = x.abs() @ weight.abs().T + bias.abs()
    assert ((found - (x @ weight.T + bias)).abs() <= 2**-20 * size).all()


@pytest.mark.parametrize("planes", [False, True], ids=["packed", "planes"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_decodes_what_the_cpu_decodes(bits: int, planes: bool) -> None:
    for shape, rows in zip(SHAPES, (1, 1, 16, 4, 64, 1), strict=True):
        weight, want = weight_of(shape, bits, rows, planes)
        assert torch.equal(lookup_triton.decode(weight), want)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("bits", "planes"), [*((bits, False) for bits in range(2, 9)), (4, True), (3, True)])
def test_it_multiplies_with_what_it_would_decode(bits: int, planes: bool, tokens: int) -> None:
    for shape in (*SHAPES[2:5], (1, 301)):
        weight, want = weight_of(shape, bits, 4, planes)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(2))
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(3))
        check(lookup_triton.linear(x, weight, bias), x, want, bias)


@pytest.mark.parametrize(("bits", "width"), [(3, 43), (5, 39), (6, 38), (7, 37)])
def test_every_column_comes_out_alone(bits: int, width: int) -> None:
    """Of the first width the last code lies in two words, and the second of them has nothing else."""
    assert (width - 1) * bits // 32 + 2 == packed_width(width, bits)
    for shape in ((2, width), (1, 22), (40, 1)):
        weight, want = weight_of(shape, bits, 1, planes=False)
        eye = torch.eye(shape[1])
        assert torch.equal(lookup_triton.linear(eye, weight), want.T)
        assert torch.equal(lookup_triton.linear(eye[-1:], weight), want[:, -1:].T)


def test_three_bits_by_hand() -> None:
    """Codes 0 to 7 over and over; of the first word the last two bits are the low ones of code 10, which is 2."""
    words = [0b10001000111110101100011010001000, 0b11000110100010001111101011000110, 0b11111010110001101000100011111010]
    indices = torch.tensor([[word - 2**32 for word in words]]).int()
    tables = torch.arange(8.0)[None]
    weight = lookup.pack(indices, tables, (1, 32), 1, 32, torch.float32).weight
    assert lookup_triton.decode(weight).tolist() == [[float(i % 8) for i in range(32)]]
    assert lookup_triton.linear(torch.ones(1, 32), weight).item() == 4 * sum(range(8))


@pytest.mark.parametrize(
    ("bits", "block", "tables"), [(3, 32, 4), (4, 64, 4), (4, 128, 1), (2, 96, 1), (5, 32, 1), (6, 96, 4), (7, 128, 1)]
)
def test_blocks_have_their_scales_and_tables(bits: int, block: int, tables: int) -> None:
    for shape in ((17, 257), (1, 96)):
        codes, blocks = codes_of(shape, bits), -(-shape[1] // block)
        generator = torch.Generator().manual_seed(4)
        levels = torch.randn(tables, 1 << bits, generator=generator)
        scales = torch.rand(shape[0], blocks, generator=generator) + 0.1
        selector = torch.randint(0, tables, (shape[0], blocks), generator=generator, dtype=torch.uint8)
        spread = scales[..., None] * levels[selector.int()]
        want = lookup.decode(pack(codes, bits), spread, shape, 1, block)
        blocks = {"scales": scales, "selector": selector}
        weight = lookup.pack(pack(codes, bits), levels, shape, 1, block, torch.float32, **blocks).weight
        assert torch.equal(lookup_triton.decode(weight), want)
        for tokens in (1, 17):
            x = torch.randn(tokens, shape[1], generator=generator)
            check(lookup_triton.linear(x, weight), x, want, torch.zeros(shape[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_16_bits_are_permuted_into_place(bits: int, dtype: torch.dtype) -> None:
    cases = (((3, 31), 1), ((33, 257), 17), ((17, 64), 64))
    for shape, tokens in cases[: 3 if dtype == torch.bfloat16 else 1]:  # the same bytes are moved, whatever they mean
        weight, want = permuted(shape, bits, 4, dtype)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
        partial = lookup_triton._permuted(x, weight)
        check(partial.sum(0), x, want, torch.zeros(shape[0]))
        bias = torch.randn(shape[0]).to(dtype)
        assert torch.equal(lookup_triton.linear(x, weight, bias), (partial.sum(0) + bias).to(dtype))


def permuted(shape: tuple[int, int], bits: int, rows: int, dtype: torch.dtype) -> tuple[lookup.Lookup, Tensor]:
    codes = codes_of(shape, bits)
    tables = torch.randn(-(-shape[0] // rows), 1 << bits, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = lookup.pack(pack(codes, bits), tables, shape, rows, shape[1], dtype).weight
    return weight, lookup.decode(pack(codes, bits), tables[:, None], shape, rows, shape[1])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_permuted_column_comes_out_alone(bits: int) -> None:
    weight, want = permuted((9, 43), bits, 1, torch.bfloat16)
    assert lookup_triton._permutes(torch.bfloat16, weight)
    assert torch.equal(lookup_triton.linear(torch.eye(43).bfloat16(), weight), want.T)


def test_what_cannot_be_permuted_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = permuted((9, 43), 4, 1, torch.bfloat16)
    assert not lookup_triton._permutes(torch.float16, weight)
    assert not lookup_triton._permutes(torch.bfloat16, permuted((9, 43), 5, 1, torch.bfloat16)[0])
    assert not lookup_triton._permutes(torch.float32, weight_of((9, 43), 4, 1, planes=False)[0])
    assert not lookup_triton._permutes(torch.bfloat16, weight_of((9, 43), 4, 1, planes=True)[0])
    monkeypatch.setattr(prepared, "ROCM", True)
    assert not lookup_triton._permutes(torch.bfloat16, weight)


@triton.jit
def _permute_words(a, b, selector, out):
    i = tl.arange(0, 1024)
    found = permuted_kernels.permute(tl.load(a + i), tl.load(b + i), tl.load(selector + i), False)
    tl.store(out + i, found)


def test_without_the_instruction_bytes_are_picked_as_ptx_says_of_prmt() -> None:
    """Bytes 0 to 3 are those of the first operand, 4 to 7 of the second; a selector's upper half does not matter."""
    generator = torch.Generator().manual_seed(1)
    a, b, selector = torch.randint(0, 2**32, (3, 1024), generator=generator)
    selector &= 0xFFFF7777
    out = torch.empty(1024, dtype=torch.int32)
    words = [part.to(torch.uint32) for part in (a, b, selector)]
    _permute_words[(1,)](*words, out.view(torch.uint32))
    for first, second, which, found in zip(a.tolist(), b.tolist(), selector.tolist(), out.tolist(), strict=True):
        octets = first.to_bytes(4, "little") + second.to_bytes(4, "little")
        wanted = bytes(octets[which >> 4 * i & 7] for i in range(4))
        assert found & 0xFFFFFFFF == int.from_bytes(wanted, "little")
