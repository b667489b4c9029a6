"""The Triton kernels of bitstack in Triton's interpreter, on the CPU. Run by
test_interpreted_kernels.py."""

import interpreted
import pytest
import torch
from torch import Tensor

from compress.bitstack import Bitstack
from compress.kernels import bitstack as kernels
from compress.kernels import bitstack_triton, prepared

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


def stack_of(shape: tuple[int, int], dtype: torch.dtype, blocks: int, rank: str) -> kernels.Planes:
    torch.manual_seed(0)
    scheme = Bitstack(blocks=blocks, rank=rank)
    stack: kernels.Planes = scheme.prepare(scheme.encode(torch.randn(shape).to(dtype))).weight
    return stack


def check_decoded(stack: kernels.Planes) -> Tensor:
    """Decodes it, to the bits that plain torch gives."""
    found, wanted = bitstack_triton.decode(stack), kernels.decode_torch(stack)
    assert found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    return found


@pytest.mark.parametrize(("blocks", "rank"), [(1, "1"), (2, "4"), (5, "5"), (8, "16"), (16, "9")])
def test_it_decodes_any_number_of_blocks_of_any_rank(blocks: int, rank: str) -> None:
    check_decoded(stack_of((19, 130), torch.float32, blocks, rank))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (8, 1024), (17, 1031)], ids=str)
def test_it_decodes_any_shape_and_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_decoded(stack_of(shape, dtype, 4, "3"))


def test_it_decodes_what_is_too_large_and_what_is_zero() -> None:
    u, v = torch.tensor([[256.0], [0.0]]).bfloat16(), torch.tensor([[256.0, -2.0, 0.5]]).bfloat16()
    signs = torch.tensor([[0b001], [0b001]], dtype=torch.uint8)
    found = check_decoded(kernels.Planes((signs,), u, v, torch.ones(1), torch.float16))
    assert found.tolist() == [[-65504, -32, 128], [0, 0, 0]]  # of -512 and a sixteenth of it the larger
    assert found.signbit().tolist() == [[True, True, False], [True, True, False]]


def test_it_decodes_a_part_of_the_rows_and_none() -> None:
    stack = stack_of((20, 96), torch.bfloat16, 4, "2")
    assert torch.equal(check_decoded(stack.rows(slice(7, 18))), kernels.decode(stack)[7:18])
    assert bitstack_triton.decode(stack.rows(slice(3, 3))).shape == (0, 96)


def test_many_tokens_are_multiplied_with_the_decoded_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "runs_triton", lambda device: True)
    monkeypatch.setattr(bitstack_triton, "FUSED_TOKENS", 2)
    stack = stack_of((37, 64), torch.float32, 3, "2")
    x, bias, decoded = torch.randn(3, 64), torch.randn(37), check_decoded(stack)
    assert torch.equal(kernels.linear(x, stack, bias), torch.nn.functional.linear(x, decoded, bias))
    assert not torch.equal(kernels.linear(x[:2], stack), x[:2] @ decoded.T)  # summed up in another order
    few = x[:1].clone().requires_grad_()
    kernels.linear(few, stack).sum().backward()
    assert few.grad is not None and torch.allclose(few.grad[0], decoded.sum(0), atol=1e-5)


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
