"""The Triton kernels of integers and small floats in Triton's interpreter. Run by
test_interpreted_kernels.py."""

from typing import Any

import interpreted
import pytest
import torch

from compress.kernels import groups_triton as triton_kernels
from compress.kernels import prepared as prepared_kernels
from compress.kernels.op import Packed
from compress.registry import make
from compress.scheme import Scheme

pytestmark = pytest.mark.filterwarnings(*interpreted.WARNINGS)

_INT = {"method": "rtn", "clip": "absmax"}
SCHEMES = {
    **{f"int{bits}": make("int4", {**_INT, "bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)},
    **{f"int{bits}, zeros": make("int4", {**_INT, "bits": bits, "symmetric": False}) for bits in (2, 4, 5, 6, 7, 8)},
    "int4, groups of 64": make("int4", {**_INT, "group_size": 64}),
    "int8 beside int8": make("int8", {"activations": "dynamic", "smooth": False}),
    **{f"fp8, {kind}": make("fp8", {"granularity": kind}) for kind in ("channel", "tensor", "block")},
    **{name: make(name, {"search": False}) for name in ("mxfp4", "mxfp8", "nvfp4")},
}
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_kernels, "runs_triton", lambda device: True)


def prepared(scheme: Scheme, weight: torch.Tensor) -> tuple[Scheme, Any, torch.Tensor]:
    """The scheme as it fits, what it prepares, and the weight that its tensors stand for."""
    fitted = scheme.fit(tuple(weight.shape)).for_dtype(weight.dtype)
    tensors = fitted.encode(weight)
    held = fitted.prepare(tensors)
    assert isinstance(held, Packed)
    return fitted, held, fitted.decode(tensors)


def gaussian(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """With rows of different sizes, of which one is zero and another has an outlier."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 1, shape[0])[:, None]
    weight[0] = 0
    weight[-1, 0] = 300
    return weight.to(dtype)


def widths(scheme: Scheme) -> tuple[int, ...]:
    """In one group, in groups of 32 and in larger ones, where the scheme has such."""
    return (64, 160, 288) if hasattr(scheme, "block") else (131, 160, 384)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_decodes_to_the_same_bits(name: str) -> None:
    for width, dtype in zip(widths(SCHEMES[name]), ROUNDING, strict=True):
        scheme, held, want = prepared(SCHEMES[name], gaussian((19, width), dtype))
        assert torch.equal(scheme.decode(held), want)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_multiplies_with_what_it_would_decode(name: str) -> None:
    cases = ((17, torch.float16), (3, torch.float32), (1, torch.bfloat16))
    for (tokens, dtype), width in zip(cases, widths(SCHEMES[name]), strict=True):
        check(SCHEMES[name], (70, width), tokens, dtype, bias=tokens > 1)


def check(scheme: Scheme, shape: tuple[int, int], tokens: int, dtype: torch.dtype, bias: bool = False) -> None:
    fitted, held, decoded = prepared(scheme, gaussian(shape, dtype))
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
    added = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(dtype) if bias else None
    y = triton_kernels.linear(x, held.weight, added)
    exact = x.double() @ decoded.double().T + (0 if added is None else added.double())
    size = x.double().abs() @ decoded.double().abs().T + (0 if added is None else added.double().abs())
    assert y.shape == exact.shape and y.dtype == dtype and y.isfinite().all()
    # The decoded weight is itself rounded to its dtype, the product is not or at another place; then y is rounded.
    allowed = ROUNDING[dtype] * size + torch.finfo(dtype).smallest_normal
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 128), (130, 257)], ids=str)
def test_awkward_shapes(shape: tuple[int, int]) -> None:
    for scheme in (make("int4", _INT), make("int4", {**_INT, "bits": 3, "symmetric": False}), make("fp8")):
        check(scheme, shape, 16, torch.float16)
        check(scheme, shape, 65, torch.bfloat16)


def test_a_long_row_is_split() -> None:
    for scheme in (make("int4", _INT), make("mxfp4", {"search": False}), make("fp8")):
        check(scheme, (5, 2560), 2, torch.bfloat16, bias=True)


def test_int4_by_hand() -> None:
    """Codes 0 to 15 twice stand for -8 to 7 quarters, and times the unit vectors each comes out alone."""
    scheme = make("int4", {**_INT, "group_size": 32})
    codes = torch.tensor([0x76543210, 0xFEDCBA98 - 2**32] * 2, dtype=torch.int32)[None]
    tensors = {"weight_packed": codes, "weight_scale": torch.tensor([[0.25]]), "weight_shape": torch.tensor([1, 32])}
    held = scheme.prepare(tensors)
    wanted = [(i % 16 - 8) / 4 for i in range(32)]
    assert triton_kernels.decode(held.weight).tolist() == [wanted]
    assert scheme.linear(torch.eye(32).bfloat16(), held).flatten().tolist() == wanted


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4), ("mxfp8", 8)])
def test_every_code_is_the_float_that_it_is(name: str, bits: int) -> None:
    codes = torch.arange(1 << bits)
    if bits == 8:
        codes[codes & 127 == 127] = 0  # NaN
    scheme = make(name)
    packed = (codes[::2] | codes[1::2] << 4) if bits == 4 else codes
    values = packed.to(torch.uint8).repeat(32 * 8 // bits // len(packed) or 1)[None]
    local = {"mxfp4": {"weight_packed": values}, "mxfp8": {"weight": values.view(torch.float8_e4m3fn)}}[name]
    columns = values.shape[1] * 8 // bits
    tensors = {**local, "weight_scale": torch.full((1, columns // 32), 127, dtype=torch.uint8)}
    held, want = scheme.prepare(tensors), scheme.decode(tensors)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        eye = torch.eye(columns, dtype=dtype)
        assert torch.equal(scheme.linear(eye, held).T.float(), want.float())


def test_no_tokens_more_dimensions_and_what_does_not_fit() -> None:
    scheme = make("int4", _INT)
    held = scheme.prepare(scheme.encode(torch.ones(4, 128)))
    assert scheme.linear(torch.ones(0, 128), held).shape == (0, 4)
    assert scheme.linear(torch.ones(2, 3, 128), held).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"x: is \(1, 127\) torch.float32; \(\.\.\., 128\)"):
        scheme.linear(torch.ones(1, 127), held)
    with pytest.raises(ValueError, match="^bias: is on meta; move it to cpu"):
        scheme.linear(torch.ones(1, 128), held, torch.ones(4, device="meta"))


def test_many_tokens_gradients_and_odd_groups_run_on_the_decoded_weight() -> None:
    scheme = make("int4", _INT)
    held = scheme.prepare(scheme.encode(torch.randn(4, 128)))
    x = torch.randn(300, 128, requires_grad=True)
    scheme.linear(x, held).sum().backward()
    assert torch.allclose(x.grad[0], scheme.decode(held).sum(0), atol=1e-5)
    odd = make("int4", {**_INT, "group_size": 43})
    tensors = odd.encode(torch.randn(5, 86))
    y = odd.linear(x[:2, :86].detach(), odd.prepare(tensors))
    assert torch.allclose(y, x[:2, :86] @ odd.decode(tensors).T, atol=1e-5)
