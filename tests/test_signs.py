"""Products of a few tokens with a few bit planes on the CPU: close to those of the decoded weight."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels import bitstack, cpu_sign_products, cpu_sign_rows, cpu_signs, simd
from compress.kernels.bitstack import Planes
from compress.registry import make

BOUND = 0.006  # of the product; a large weight's are off by 0.002, a small one has larger factors beside the first

MOST_SUMS = cpu_sign_products.MOST_SUMS[cpu_sign_rows.form(1).groups]

pytestmark = pytest.mark.skipif(not simd.has_tables(), reason="this processor looks nothing up")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def stack(rows: int, columns: int, planes: int, rank: int) -> Planes:
    scheme = make("bitstack", {"blocks": planes, "rank": str(rank), "scaling": "none"}).fit((rows, columns))
    weight: Planes = scheme.prepare(scheme.encode(random(rows, columns) * 0.02)).weight  # type: ignore[attr-defined]
    return weight


def by_hand(u: Tensor, v: Tensor, levels: list[float], negative: Tensor, *codes: Tensor) -> Planes:
    """codes: the bits of the code, (rows, columns) as the signs are."""
    packed = tuple(
        torch.from_numpy(np.packbits(bits.numpy().astype(np.uint8), 1, "little")) for bits in (negative, *codes)
    )
    return Planes(packed, u.bfloat16(), v.bfloat16(), torch.tensor(levels), torch.float32)


def multiply(weight: Planes, x: Tensor) -> Tensor:
    assert weight.product is not None
    y = weight.product.run(x, torch.float32)
    assert y is not None
    return y


def error(weight: Planes, x: Tensor) -> float:
    wanted = F.linear(x.double(), bitstack.decode_torch(weight).double())
    return float((multiply(weight, x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_products_are_those_of_the_decoded_weight(planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.kernels.cpu_planes.product", None)
    for rows, columns, rank in [(1, 128, 1), (70, 1000, 5), (130, 520, 2), (3, 2051, 1), (128, 512, 4)]:
        weight = stack(rows, columns, planes, rank)
        for tokens in {1, MOST_SUMS >> (planes - 1)}:
            assert error(weight, random(tokens, columns)) < BOUND, (rows, columns, rank, tokens)


@pytest.mark.parametrize("lacking", [{"avx512vbmi"}, {"avx512vbmi", "avx512bw"}])
def test_every_form_gives_the_same_bits(lacking: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loops for processors with less than this one."""
    if simd.features().isdisjoint(lacking):
        pytest.skip("this processor has nothing of it")
    weight, x = stack(300, 1300, 3, 4), random(2, 1300)
    wanted, fewer = multiply(weight, x), simd.features() - lacking
    monkeypatch.setattr(simd, "features", lambda: fewer)
    assert torch.equal(multiply(weight, x), wanted)


def test_signs_and_levels_by_hand() -> None:
    """Four columns with every sign and every level."""
    negative = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1]])
    high, low = torch.tensor([[0, 0, 1, 1]] * 3), torch.tensor([[0, 1, 0, 1]] * 3)
    columns = [F.pad(bits, (0, 60)) for bits in (negative, high, low)]
    u, v = torch.tensor([[1.0], [2.0], [0.5]]), torch.ones(1, 64)
    weight = by_hand(u, v, [1.0, 2.0, 3.0, 5.0], *columns)
    x = F.pad(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), (0, 60))
    # 1 + 2 * 10 + 3 * 100 + 5 * 1000; its signs; and twice, and half as much
    wanted = torch.tensor([[5321.0, 2 * (-1 + 20 - 300 + 5000), 0.5 * (1 - 20 - 300 - 5000)]])
    assert (multiply(weight, x) - wanted).abs().max() < 1.0  # a unit of the largest sum is 1111 / 8127


def test_the_floor_is_added_where_the_factors_fall_below_it() -> None:
    columns = 2 * cpu_signs.EVERY
    v = torch.ones(2, columns)
    v[1], v[1, 5] = 0, -3
    negative = torch.zeros(4, columns)
    negative[2, 5] = 1
    weight = by_hand(torch.ones(4, 2), v, [2.0, 4.0], negative, torch.ones(4, columns))
    assert weight.signs is not None and weight.signs.columns.tolist() == [5] * 4
    x = torch.zeros(1, columns)
    x[0, 5] = 8
    wanted = 8 * 4 * bitstack.FLOOR  # where the sum of the factors is 1 - 3
    assert torch.allclose(multiply(weight, x), torch.tensor([[wanted, wanted, -wanted, wanted]]), atol=0.02)


def test_where_the_floor_raises_many_weights_they_are_summed_up() -> None:
    u, v = random(40, 4), random(4, 300)
    u[:, 0], v[0] = 0.1, 0.1
    weight = by_hand(u, v, [1.0], torch.zeros(40, 300))
    assert weight.signs is None
    assert error(weight, random(2, 300)) < 1e-5


@pytest.mark.parametrize("planes", [1, 2])
def test_where_rounding_would_lose_much_they_are_summed_up(planes: int) -> None:
    """Outliers take whole factors for themselves, whose tables then have no room for the other weights."""
    weight, spiky = random(256, 2048), torch.randint(0, 256 * 2048, (9,), generator=torch.Generator().manual_seed(1))
    for size, refused in ((1.0, False), (500.0, True)):
        weight.view(-1)[spiky] = size
        scheme = make("bitstack", {"blocks": planes, "rank": "8", "scaling": "none"}).fit((256, 2048))
        found: Planes = scheme.prepare(scheme.encode(weight)).weight  # type: ignore[attr-defined]
        assert (found.signs is None) == refused
        assert error(found, random(1, 2048)) < (1e-5 if refused else BOUND)


def test_only_the_largest_differences_are_kept() -> None:
    """Up to four times as many as there is room for, if what is left out is next to nothing."""
    columns, rows = 2048, 16
    v = torch.ones(2, columns)
    v[1] = 0
    v[1, :2], v[1, 2:4] = -3, -0.95  # 1/16 - 1/20 is left out
    for small, expected in ((v, 2 * rows), (torch.where(v == -0.95, -2.9, v), None)):
        signs = by_hand(torch.ones(rows, 2), small, [1.0], torch.zeros(rows, columns)).signs
        assert (signs is None) == (expected is None)
        if signs is not None:
            assert len(signs.columns) == expected and set(signs.columns.tolist()) == {0, 1}
            assert signs.starts.tolist() == list(range(0, expected + 1, 2))


def test_inputs_that_are_no_numbers_or_next_to_nothing_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = stack(9, 600, 2, 3), random(1, 600)
    for value in (math.inf, math.nan, 1e-38):
        odd = x * 1e-38 if value == 1e-38 else x.clone()
        odd[0, 77] = value
        found = multiply(weight, odd)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_sign_products, "takes", lambda *_: False)
            assert torch.equal(found, multiply(weight, odd)) or found.isnan().all() or found.isinf().all()
    assert not multiply(weight, torch.zeros(1, 600)).any()


def test_outliers_among_the_inputs_cost_little_of_what_they_give() -> None:
    weight, x = stack(100, 2000, 2, 4), random(3, 2000)
    x[0, 7], x[1, 1500] = 1e4, -3e4
    assert error(weight, x) < BOUND


def test_the_same_bits_on_any_threads_and_beside_any_token() -> None:
    weight, x, before = stack(700, 1100, 2, 3), random(3, 1100), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(multiply(weight, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0], torch.cat([multiply(weight, token[None]) for token in x]))


def test_more_tokens_and_more_planes_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sign_products, "product", None)
    for planes in (2, 3, 4, 5):
        assert error(stack(20, 300, planes, 2), random((MOST_SUMS >> (planes - 1)) + 1, 300)) < 1e-5


def test_what_is_held_beside_a_weight_is_counted() -> None:
    scheme = make("bitstack", {"blocks": 2, "scaling": "none"}).fit((256, 4096))
    encoded = scheme.encode(random(256, 4096))
    prepared: Any = scheme.prepare(encoded)
    signs, vectors, pairs = prepared.weight.signs, prepared.weight.vectors, prepared.weight.pairs
    held = sum(array.nbytes for array in (signs.starts, signs.columns, signs.differences, signs.coefficients, vectors))
    held += 0 if pairs is vectors else pairs.nbytes
    specs = {name: spec for name, spec in scheme.specs((256, 4096), torch.float32).items()}
    counted = scheme.prepared_bytes(specs, "cpu")
    assert held <= counted <= held + 4 * (256 * 4096 // cpu_signs.EVERY) + 64
