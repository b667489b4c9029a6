"""The Triton kernels of bitstack in Triton's interpreter, on the CPU. Run by
test_interpreted_kernels.py."""

import interpreted
import pytest
import torch
from torch import Tensor

from compress.bitstack import Bitstack
from compress.formats.bitpack import pack
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


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_few_blocks_are_multiplied_by_flipping_signs(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bitstack_triton.bitstack_kernels, "matmul")
    for shape, tokens, rank in (((70, 672), 1, "16"), ((3, 96), 17, "1"), ((65, 128), 40, "17"), ((1, 32), 2, "33")):
        check(shape, tokens, torch.bfloat16, blocks, rank)


def test_every_level_has_its_place_and_every_sign() -> None:
    """Codes 0 to 3 with either sign, on scales that are powers of two: nothing is rounded."""
    bits = torch.arange(64) % 8
    planes = tuple(pack(((bits >> p) & 1)[None].to(torch.uint8), 1).view(torch.uint8) for p in (2, 1, 0))
    u, v, levels = torch.ones(1, 1).bfloat16(), torch.ones(1, 64).bfloat16(), torch.tensor([0.25, 1, -2, 3])
    v[0, 32:] = 2
    stack = kernels.Planes(planes, u, v, levels, torch.float32)
    wanted = [float(level) * sign for sign in (1, -1) for level in levels] * 8
    wanted[32:] = [2 * w for w in wanted[32:]]
    assert bitstack_triton._flips(stack)
    assert bitstack_triton.linear(torch.eye(64).bfloat16(), stack)[:, 0].tolist() == wanted


def test_the_floor_holds_where_factors_cancel() -> None:
    planes = (torch.zeros(1, 4, dtype=torch.uint8),)
    u, v = torch.tensor([[1.0, 1.0]]).bfloat16(), torch.stack([torch.full((32,), 2.0), torch.linspace(-4, 0, 32)])
    stack = kernels.Planes(planes, u, v.bfloat16(), torch.ones(1), torch.float32)
    y = bitstack_triton.linear(torch.eye(32).bfloat16(), stack)[:, 0]
    assert torch.equal(y, torch.maximum(2 + v.bfloat16()[1].float(), torch.tensor(2 / 16)).bfloat16())


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
