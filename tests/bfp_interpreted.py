"""The Triton kernel of bfp in Triton's interpreter, on the CPU. Run by test_interpreted_kernels.py."""

import interpreted
import pytest
import torch

from compress.bfp import Bfp
from compress.formats import bitpack
from compress.formats.bfp import unpack
from compress.kernels import bfp_triton

pytestmark = pytest.mark.filterwarnings(*interpreted.WARNINGS)


def check(scheme: Bfp, shape: tuple[int, int], tokens: int, dtype: torch.dtype, bias: bool = False) -> None:
    """The product with the decoded weight, up to float32's rounding of sums, and then to that of y."""
    torch.manual_seed(tokens)
    weight = torch.randn(shape) * torch.logspace(-3, 1, shape[1])
    weight[-1, 0] = -(2.0**100)
    weight[0] = 0
    x, added = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if bias else None
    x[:, 0] *= 2.0**-13  # stays a number with the outlier, in float16 too
    tensors = scheme.encode(weight)
    form = scheme._format(torch.float32)
    y = bfp_triton.linear(x, tensors["mantissa"], tensors["exponent"], form, added)
    assert torch.equal(
        bfp_triton.decode(tensors["mantissa"], tensors["exponent"], form, shape[1]), scheme.decode(tensors)
    )
    decoded = scheme.decode(tensors).double()
    exact = x.double() @ decoded.T + (0 if added is None else added.double())
    size = x.double().abs() @ decoded.abs().T + (0 if added is None else added.double().abs())
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0}[dtype]
    assert y.dtype == dtype and y.shape == exact.shape
    there = exact.to(dtype).isfinite()
    assert torch.equal(y.isfinite(), there)
    off = (y.double() - exact).abs()
    assert (off <= 16 * 2**-24 * size + rounding * exact.abs() + torch.finfo(dtype).smallest_normal)[there].all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_linear_is_the_product_with_the_decoded_weight(bits: int) -> None:
    check(Bfp(bits, 32, full_range=bits % 2 == 0), (33, 75), 2, torch.float32)


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 172), (5, 640)], ids=str)
def test_awkward_shapes(shape: tuple[int, int], bits: int) -> None:
    for tokens in (1, 17):
        check(Bfp(bits), shape, tokens, torch.float32)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_blocks_of_every_size(size: int) -> None:
    for bits in (4, 5):
        check(Bfp(bits, size), (20, 172), 3, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_mantissas_are_exact_in_narrow_dtypes(bits: int, dtype: torch.dtype) -> None:
    check(Bfp(bits), (40, 96), 5, dtype, bias=True)


@pytest.mark.parametrize(("bits", "size"), [(3, 32), (4, 16), (4, 128), (5, 64), (8, 32)])
def test_whole_words_are_integers_with_scales_in_bfloat16(bits: int, size: int) -> None:
    for shape, tokens in (((70, 768), 1), ((3, 128), 17), ((1, 256), 130), ((2, 160), 3)):
        check(Bfp(bits, size), shape, tokens, torch.bfloat16, bias=True)


def test_every_exponent_is_a_scale_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program reads behind the last column is no infinity either."""
    monkeypatch.delattr(bfp_triton.kernels, "matmul")
    for bits in (2, 4, 8):
        scheme = Bfp(bits, 16)
        form = scheme._format(torch.bfloat16)
        exponents = torch.tensor([[form.lowest, form.lowest + 1, 127, 128, 253, 254]], dtype=torch.uint8)
        codes = torch.arange(96).remainder(1 << bits)[None].clamp(min=1).to(torch.uint8)
        mantissas = bitpack.pack(codes, bits).view(torch.uint8)
        x = torch.eye(96).bfloat16()
        y = bfp_triton.linear(x, mantissas, exponents, form)
        assert torch.equal(y.T, unpack(mantissas, exponents, form, 96))


def test_a_long_row_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    matmul = bfp_triton.kernels.matmul

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return matmul[grid]

    monkeypatch.setattr(bfp_triton.kernels, "matmul", Spy())
    check(Bfp(4, 128), (3, 2304), 2, torch.float32, bias=True)
    check(Bfp(3, 128), (3, 2000), 2, torch.float32)
    assert grids == [(1, 1, 4), (1, 1, 3)]


def test_a_block_by_hand() -> None:
    """-8 to 7 in a block with a step of 1/4, and one of the exponent below."""
    weight = torch.cat([torch.arange(-8, 8) / 4, torch.arange(-8, 8) / 8])[None]
    scheme = Bfp(4, 16)
    tensors = scheme.encode(weight)
    assert tensors["exponent"].tolist() == [[127, 126]]
    x = torch.stack([torch.ones(32), torch.eye(32)[0], torch.eye(32)[31]])
    y = bfp_triton.linear(x, tensors["mantissa"], tensors["exponent"], scheme._format(torch.float32))
    assert y.tolist() == [[-3.0], [-2.0], [0.875]]


def test_no_tokens_more_dimensions_and_what_does_not_fit() -> None:
    scheme = Bfp()
    tensors, form = scheme.encode(torch.ones(4, 40)), scheme._format(torch.float32)
    stored = tensors["mantissa"], tensors["exponent"], form
    assert bfp_triton.linear(torch.ones(0, 40), *stored).shape == (0, 4)
    assert bfp_triton.linear(torch.ones(2, 3, 40), *stored).tolist() == [[[40.0] * 4] * 3] * 2
    with pytest.raises(ValueError, match=r"x: has 39 features, for which \(4, 20\) and \(4, 2\)|x: has 41 features"):
        bfp_triton.linear(torch.ones(1, 41), *stored)
    with pytest.raises(ValueError, match="convert it to bfloat16"):
        bfp_triton.linear(torch.ones(1, 40).double(), *stored)
    with pytest.raises(ValueError, match="^bias: is on meta; move it to cpu"):
        bfp_triton.linear(torch.ones(1, 40), *stored, torch.ones(4, device="meta"))


def test_the_scheme_runs_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.kernels import prepared

    monkeypatch.setattr(prepared, "runs_triton", lambda device: True)
    weight, x, bias = torch.randn(10, 128), torch.randn(3, 128), torch.randn(10)
    scheme = Bfp(6)
    tensors = scheme.encode(weight)
    held = scheme.prepare(tensors)
    assert held is not tensors and torch.equal(scheme.decode(held), scheme.decode(tensors))
    index = torch.tensor([[9, 0], [7, 7]])
    assert torch.equal(scheme.rows(held, index), scheme.rows(tensors, index))
    wanted = x @ scheme.decode(tensors).T + bias
    assert torch.allclose(scheme.linear(x, held, bias), wanted, atol=1e-5)
    scheme.linear(x.requires_grad_(), held, bias).sum().backward()  # which the kernel cannot
    assert x.grad is not None
