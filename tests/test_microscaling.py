"""What mxfp4, mxfp8 and nvfp4 share: rounding to few bits, and GPTQ on their scales."""

import pytest
import torch

from compress.formats.float4 import E2M1
from compress.microscaling import E2M1 as TWO_BITS
from compress.microscaling import E4M3, rounded
from compress.registry import make
from compress.stats import Stats


def test_numbers_are_rounded_to_the_nearest_of_their_type_half_to_even() -> None:
    levels = E2M1[:8].double()
    values = torch.linspace(-8, 8, 4001)
    found = rounded(values, TWO_BITS)
    distances = (values.double().abs()[:, None] - levels).abs()
    assert torch.equal((found.abs().double() - values.abs()).abs(), distances.amin(1))
    assert torch.equal(found.signbit(), values.signbit())
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, 0.0])
    assert rounded(halves, TWO_BITS).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0]


def test_eight_bits_are_rounded_as_torch_does_it() -> None:
    values = torch.cat([torch.linspace(-448, 448, 3001), torch.logspace(-12, 2.6, 3000)])
    assert torch.equal(rounded(values, E4M3), values.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gptq_brings_outputs_nearer_on_the_same_scales(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight = torch.randn(24, 96, generator=generator).to(dtype)
    stats = Stats(400, x.square().mean(0), x.abs().mean(0), x.abs().amax(0), x.T @ x / 400)
    made = {method: make(name, {"method": method}).for_dtype(dtype) for method in ("rtn", "gptq")}
    stored = {method: scheme.encode(weight, stats) for method, scheme in made.items()}
    assert torch.equal(*(tensors["weight_scale"].view(torch.uint8) for tensors in stored.values()))
    errors = {m: (x @ (weight.float() - made[m].decode(stored[m]).float()).T).norm().item() for m in made}
    assert errors["gptq"] < 0.9 * errors["rtn"]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_what_gptq_chooses_is_stored_as_it_was_chosen(name: str) -> None:
    """Inputs that are independent leave every value to be rounded for itself."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[0] = 0
    weight[1, 5] = 40
    stats = Stats(1, torch.ones(64), torch.ones(64), torch.ones(64), torch.eye(64))
    found, nearest = make(name, {"method": "gptq"}).encode(weight, stats), make(name).encode(weight, stats)
    assert found.keys() == nearest.keys()
    assert all(torch.equal(found[key].view(torch.uint8), nearest[key].view(torch.uint8)) for key in found)
