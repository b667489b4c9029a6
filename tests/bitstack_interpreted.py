"""The Triton kernel of bitstack in Triton's interpreter, on the CPU. Run by
test_interpreted_kernels.py."""

import interpreted
import pytest
import torch

from compress.bitstack import Bitstack
from compress.kernels import bitstack as kernels
from compress.kernels import bitstack_triton

pytestmark = pytest.mark.filterwarnings(*interpreted.WARNINGS)


def check(shape: tuple[int, int], tokens: int, dtype: torch.dtype, blocks: int, rank: str) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(torch.float32)
    scheme = Bitstack(blocks=blocks, rank=rank)
    stack = scheme.prepare(scheme.encode(weight)).weight
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    wanted = x.double() @ kernels.decode(stack).double().T + bias.double()
    found = bitstack_triton.linear(x, stack, bias)
    assert found.dtype == dtype and found.shape == (tokens, shape[0])
    # A bfloat16 keeps 8 bits, and so does each weight that is multiplied with one.
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
    assert float((found.double() - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("blocks", [1, 2, 5, 8, 11])
def test_any_number_of_blocks(blocks: int) -> None:
    check((40, 256), 3, torch.float32, blocks, "2")


@pytest.mark.parametrize("rank", ["1", "16", "17", "40"])
def test_any_rank(rank: str) -> None:
    check((48, 130), 2, torch.float32, 3, rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "tokens"), [((33, 131), 1), ((1, 8), 17), ((70, 640), 20), ((3, 1), 1)], ids=str)
def test_any_shape_and_dtype(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    check(shape, tokens, dtype, 4, "auto")


def test_a_part_of_the_rows_whose_planes_lie_inside_others() -> None:
    scheme = Bitstack(blocks=4)
    stack = scheme.prepare(scheme.encode(torch.randn(50, 96))).weight.rows(slice(7, 29))
    x = torch.randn(2, 96)
    assert torch.allclose(bitstack_triton.linear(x, stack), x @ kernels.decode(stack).T, atol=1e-4)


def test_no_tokens_and_what_does_not_fit() -> None:
    scheme = Bitstack(blocks=2)
    stack = scheme.prepare(scheme.encode(torch.randn(4, 16))).weight
    assert bitstack_triton.linear(torch.ones(0, 16), stack).shape == (0, 4)
    with pytest.raises(ValueError, match=r"^x: is \(2, 15\)"):
        bitstack_triton.linear(torch.ones(2, 15), stack)
    with pytest.raises(ValueError, match="^x: is .*float64"):
        bitstack_triton.linear(torch.ones(2, 16).double(), stack)
    with pytest.raises(ValueError, match="^x: is on meta"):
        bitstack_triton.linear(torch.ones(2, 16, device="meta"), stack)
