"""The Triton kernels of codebooks in Triton's interpreter. Run by test_interpreted_kernels.py."""

import interpreted
import pytest
import torch
from torch import Tensor

from compress.formats.bitpack import pack
from compress.kernels import lookup, lookup_triton

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


@pytest.mark.parametrize("planes", [False, True], ids=["packed", "planes"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_it_decodes_what_the_cpu_decodes(bits: int, planes: bool) -> None:
    for shape, rows in zip(SHAPES, (1, 1, 16, 4, 64, 1), strict=True):
        weight, want = weight_of(shape, bits, rows, planes)
        assert torch.equal(lookup_triton.decode(weight), want)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(("bits", "planes"), [(2, False), (3, False), (4, False), (8, False), (4, True), (3, True)])
def test_it_multiplies_with_what_it_would_decode(bits: int, planes: bool, tokens: int) -> None:
    for shape in SHAPES[2:]:
        weight, want = weight_of(shape, bits, 4, planes)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(2))
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(3))
        reference = x.double() @ want.double().T + bias.double()
        found = lookup_triton.linear(x, weight, bias).double()
        # Sums of a few hundred float32 products, each rounded to 2**-24 of it.
        assert (found - reference).norm() / reference.norm() < 2**-20


@pytest.mark.parametrize(("bits", "block", "tables"), [(3, 32, 4), (4, 64, 4), (4, 128, 1), (2, 96, 1)])
def test_blocks_have_their_scales_and_tables(bits: int, block: int, tables: int) -> None:
    for shape in ((5, 96), (17, 257)):
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
        x = torch.randn(2, shape[1], generator=generator)
        reference = x.double() @ want.double().T
        assert (lookup_triton.linear(x, weight) - reference).norm() / reference.norm() < 2**-20
