"""The operators of torch that compressed layers run on: torch.compile takes them whole, with the same result."""

from functools import partial
from typing import Any

import pytest
import torch

from compress.formats.bfp import Format
from compress.kernels import bfp, cpu_signs, groups, lookup
from compress.kernels.linear import CompressedLinear
from compress.kernels.op import Layout, Packed
from compress.registry import SCHEMES, make
from compress.scheme import Scheme

VARIANTS = {
    **{name: make(name) for name in SCHEMES},
    "int4 with zeros": make("int4", {"symmetric": False}),
    "int8 beside int8": make("int8", {"activations": "dynamic", "smooth": False}),
    "fp8 beside fp8": make("fp8", {"activations": "dynamic"}),
    "fp8 in blocks": make("fp8", {"granularity": "block"}),
    "nf4, scales in 8 bits": make("nf4", {"double_quant": True}),
    "df11 fixed": make("df11", {"coding": "fixed"}),
    "kmeans in blocks": make("kmeans", {"codebook": "nf"}),
}


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Each test compiles anew."""
    torch.compiler.reset()


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def linear(scheme: Scheme, rows: int, columns: int, biased: bool = False) -> CompressedLinear:
    fitted = scheme.fit((rows, columns))
    bias = torch.nn.Parameter(torch.randn(rows).bfloat16()) if biased else None
    return CompressedLinear(fitted, (rows, columns), fitted.encode(gaussian(rows, columns)), bias)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_compiles_as_one_graph_and_gives_the_same(name: str) -> None:
    layer = linear(VARIANTS[name], 48, 128, biased=True)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        want = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)
        assert torch.equal(compiled(x[:1]), layer(x[:1]))  # another shape


@pytest.mark.parametrize("name", ["int4", "kmeans", "bitstack", "df11 fixed"])
def test_a_compiled_layer_multiplies_on_the_cpu_with_what_is_stored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CPU_PATH", "fused")
    layers = [linear(VARIANTS[name], 48, rows, biased=True) for rows in (256, 256, 512)]
    decoded: list[Any] = []
    for layer in layers:
        x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad():
            want = layer(x)
            with monkeypatch.context() as patch:
                patch.setattr(type(layer.scheme), "decode", lambda *_: decoded.append(1))
                assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    assert not decoded


def test_what_was_made_of_a_weight_is_found_by_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signs, which take longer than a product, and whatever lies at the same place later."""
    monkeypatch.setenv("COMPRESS_CPU_PATH", "fused")
    scheme, x = make("bitstack", {"blocks": 2, "scaling": "none"}), gaussian(1, 512)
    made: list[Any] = []
    monkeypatch.setattr(cpu_signs, "prepared", lambda *given, real=cpu_signs.prepared: made.append(1) or real(*given))
    with torch.no_grad():
        layer = linear(scheme, 64, 512)
        want, compiled = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(compiled(x), want) for _ in range(3)) and len(made) == 1
        layer.plane_0.bitwise_not_()  # as stored, all signs are turned; what was made of them sees them where they lie
        assert torch.equal(compiled(x), layer(x)) and torch.equal(layer(x), -want)


def test_compiled_layers_find_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another lies at the same place in memory, or many tokens are decoded for."""
    monkeypatch.setenv("COMPRESS_CPU_PATH", "fused")
    whole = linear(make("int4", {"method": "rtn"}), 64, 512)
    part = CompressedLinear(whole.scheme, (32, 512), {name: t[:32] for name, t in whole.tensors().items()})
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        for layer in (whole, part):
            want = layer(x)
            for other in (whole, part):
                other(x)
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
        monkeypatch.setenv("COMPRESS_CPU_PATH", "dense")
        many, layer = gaussian(40, 512), linear(make("int4", {"method": "rtn"}), 256, 512)
        want = layer(many)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(many), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own compiler
def test_inductor_takes_it() -> None:
    layer = linear(make("mxfp4"), 16, 64)
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        want = layer(x).relu()
        assert torch.equal(torch.compile(lambda x: layer(x).relu(), fullgraph=True)(x), want)


@pytest.mark.parametrize("name", ["int4", "fp8", "df11", "bitstack"])
def test_gradients_go_through_a_compiled_layer(name: str) -> None:
    layer = linear(VARIANTS[name], 48, 128, biased=True)
    x, y = (torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_() for _ in "xy")
    layer(x).square().sum().backward()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(y).square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_what_was_never_prepared_is_when_compiled_code_comes_to_it(mode: Any) -> None:
    x = torch.ones(1, 64).bfloat16()
    for scheme in (make("fp8"), make("int4", {"method": "rtn"}), make("df11")):
        layer = linear(scheme, 8, 64)
        with mode():
            assert torch.equal(torch.compile(layer, backend="aot_eager")(x), layer(x))
        torch.compiler.reset()


def test_a_single_graph_of_what_was_never_prepared_says_so() -> None:
    layer = linear(make("fp8"), 8, 64)
    with pytest.raises(Exception, match="is not prepared; run it once, then give it to torch.compile"):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(1, 64).bfloat16())


@pytest.mark.parametrize("name", ["int4", "kmeans", "df11"])
def test_a_layer_that_has_run_can_be_exported(name: str) -> None:
    layer, x = linear(VARIANTS[name], 48, 128, biased=True), gaussian(2, 128)
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(torch.export.export(layer, (x,), strict=True).module()(x), want)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_cannot_be_traced_or_multiplied_says_so() -> None:
    layer, x = linear(make("int4", {"method": "rtn"}), 8, 64), torch.ones(1, 64).bfloat16()
    layer(x)
    for trace in (partial(torch.export.export, strict=False), torch.jit.trace):
        with pytest.raises(ValueError, match="take no packed weights; export what `compress export` decodes"):
            trace(layer, (x,))
    with pytest.raises(ValueError, match=r"x is torch.int64; compressed layers multiply floating-point numbers"):
        layer(x.long())


def packed() -> dict[str, Packed]:
    """A weight of every layout that a kernel multiplies with, as the CPU holds it for the operators' own code."""
    weight = gaussian(24, 96)
    int4, zeros = make("int4", {"method": "rtn"}).fit((24, 96)), make("int4", {"method": "rtn", "symmetric": False})
    stored, fitted = int4.encode(weight), zeros.fit((24, 96))
    asymmetric: Any = fitted
    more, small = fitted.encode(weight), make("nvfp4").encode(weight)
    kmeans, blocks = make("kmeans").encode(weight), make("bfp", {"method": "rtn", "reorder": False}).encode(weight)
    block = (1, 96 // stored["weight_scale"].shape[1])
    nested, form = (24, 96), Format(4, 32, True, torch.bfloat16)
    scale, dtype = small["weight_global_scale"], torch.bfloat16
    return {
        "int4": groups.pack(stored["weight_packed"], stored["weight_scale"], nested, dtype, 4, block),
        "int4 with zeros": groups.pack(
            more["weight_packed"], more["weight_scale"], nested, dtype, 4, block, zeros=asymmetric._zeros(more)
        ),
        "nvfp4": groups.pack(
            small["weight_packed"], small["weight_scale"], nested, dtype, 4, (1, 16), "e2m1", divisor=scale
        ),
        "kmeans": lookup.pack(kmeans["indices"], torch.randn(24, 16).bfloat16(), nested, 1, 96, dtype),
        "bfp": bfp.pack(blocks["mantissa"], blocks["exponent"], form, 96),
        "bitstack": make("bitstack").prepare(make("bitstack").encode(weight)),
        "nf4": make("nf4").prepare(make("nf4").encode(weight)),
    }


@pytest.mark.parametrize("name", packed())
def test_operators_are_what_torch_wants(name: str) -> None:
    weight = packed()[name]
    layout: Layout = weight.layout
    x, bias = torch.randn(3, 96).bfloat16(), torch.randn(24).bfloat16()
    for added in (None, bias):
        torch.library.opcheck(layout.linear_op, (x.requires_grad_(), weight.parts, weight.rest, added))
    torch.library.opcheck(layout.decode_op, (weight.parts, weight.rest))
    want = x.double() @ weight.decode().double().T + bias.double()
    y = layout.linear_op(x, weight.parts, weight.rest, bias)
    assert ((y - want).norm() / want.norm()).item() < 2**-7


def test_plain_torch_decodes_what_the_scheme_decodes() -> None:
    weight = gaussian(24, 96)
    for name, held in packed().items():
        if name in ("int4", "int4 with zeros", "nvfp4"):
            scheme = make("nvfp4") if name == "nvfp4" else make("int4", {"method": "rtn", "symmetric": name == "int4"})
            fitted = scheme.fit((24, 96))
            assert torch.equal(held.decode(), fitted.decode(fitted.encode(weight)))
