from typing import Any

import pytest
import torch
from torch import Tensor

from compress.formats.bitpack import unpack
from compress.rtn import Grid, quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def decode(grid: Grid, bits: int, columns: int) -> Tensor:
    """(q - zero) * scale in float32, rounded to the scale's type."""
    rows, groups = grid.scales.shape
    codes = unpack(grid.packed, bits, columns).float().view(rows, groups, -1)
    zeros = torch.full((rows, groups), 2.0 ** (bits - 1)) if grid.zeros is None else grid.zeros.float()
    values = (codes - zeros[..., None]) * grid.scales.float()[..., None]
    return values.to(grid.scales.dtype).view(rows, columns)


def group_errors(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    difference = weight.double() - decode(grid, bits, weight.shape[1]).double()
    return difference.view(*grid.scales.shape, -1).square().sum(-1)


def samples(kind: str, rows: int = 16, columns: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    if kind == "outliers":
        weight[:, ::97] *= 20
    if kind == "heavy":
        weight = weight / torch.rand(rows, columns, generator=generator).clamp(min=0.01)
    if kind == "shifted":
        weight = weight.abs() + 0.01
    return weight


def brute_force(group: Tensor, bits: int, symmetric: bool) -> float:
    """The least error over a fine grid of scales, of both signs if symmetric, and every zero."""
    top = 2**bits - 1
    spread = float(group.abs().max() * 2 if symmetric else group.max().clamp(min=0) - group.min().clamp(max=0))
    scales = torch.linspace(0.2, 1.1, 600)[:, None] * spread / top
    scales = torch.cat([scales, -scales]) if symmetric else scales
    least = float("inf")
    for zero in [2 ** (bits - 1)] if symmetric else range(top + 1):
        integers = (group[None] / scales).round().clamp(-zero, top - zero)
        least = min(least, float((group[None] - integers * scales).square().sum(1).min()))
    return least


def test_a_symmetric_group_already_on_its_grid_is_stored_exactly() -> None:
    weight = torch.tensor([[-8.0, -3.0, -1.0, 0.0, 1.0, 2.0, 5.0, 7.0]]) * 0.25
    grid = quantize(weight, 4, 8, True)
    assert grid.zeros is None
    assert grid.scales.tolist() == [[0.25]]
    assert unpack(grid.packed, 4, 8).tolist() == [[0, 5, 7, 8, 9, 10, 13, 15]]


def test_the_largest_value_takes_the_longer_end_of_a_symmetric_grid() -> None:
    weight = torch.tensor([[8.0, 3.0, 1.0, 0.0, -1.0, -2.0, -5.0, -7.0]]) * 0.25
    grid = quantize(weight, 4, 8, True)
    assert grid.scales.tolist() == [[-0.25]]
    assert unpack(grid.packed, 4, 8).tolist() == [[0, 5, 7, 8, 9, 10, 13, 15]]
    assert torch.equal(decode(grid, 4, 8), weight)


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_integers_without_the_longest_are_stored_exactly(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    weight = torch.arange(-top, top + 1).float()[None] * 0.5
    assert torch.equal(decode(quantize(weight, bits, weight.shape[1], True), bits, weight.shape[1]), weight)


def test_groups_of_32_beat_the_rule_of_ggml_q4_0() -> None:
    """Q4_0: the value furthest from zero at -8, with its float16 scale."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5)).bfloat16()
    groups = weight.float().view(-1, 32)
    scales = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    q4_0 = (groups - (groups / scales).round().clamp(-8, 7) * scales.half().float()).square().sum()
    assert float(group_errors(weight, quantize(weight, 4, 32, True), 4).sum() / q4_0) < 0.91


def test_an_asymmetric_absmax_group_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    grid = quantize(weight, 2, 4, False, "absmax")
    assert grid.zeros is not None
    assert (grid.scales.tolist(), grid.zeros.tolist()) == ([[1.0]], [[1]])
    assert unpack(grid.packed, 2, 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["gauss", "outliers", "heavy", "shifted"])
def test_mse_is_never_worse_than_absmax_in_any_group(kind: str, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = samples(kind).to(dtype)
    for group_size in (32, 128, 512):
        absmax = group_errors(weight, quantize(weight, bits, group_size, symmetric, "absmax"), bits)
        mse = group_errors(weight, quantize(weight, bits, group_size, symmetric, "mse"), bits)
        assert bool((mse <= absmax * (1 + 1e-12)).all())  # sums in float64, their order aside


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_near_the_best_of_a_fine_search(bits: int, symmetric: bool) -> None:
    weight = samples("gauss", 4, 256)
    found = group_errors(weight, quantize(weight, bits, 128, symmetric), bits).flatten()
    best = torch.tensor([brute_force(group, bits, symmetric) for group in weight.view(-1, 128)])
    assert float(found.sum() / best.sum()) < 1.01, (found / best).tolist()


@pytest.mark.parametrize(
    "bits, symmetric, invariant",
    [(4, True, 0.0102), (4, False, 0.0090), (3, True, 0.0382), (3, False, 0.0348), (2, True, 0.147), (2, False, 0.136)],
)
def test_gaussian_errors_reach_the_known_ones(bits: int, symmetric: bool, invariant: float) -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(3)).bfloat16()
    error = group_errors(weight, quantize(weight, bits, 128, symmetric), bits).sum()
    assert float(error / weight.double().square().sum()) < invariant * 1.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_groups_decode_to_zero_with_a_plain_scale(dtype: torch.dtype, clip: str, symmetric: bool) -> None:
    weight = torch.zeros(3, 64, dtype=dtype)
    grid = quantize(weight, 4, 32, symmetric, clip)
    assert grid.scales.dtype == dtype and bool((grid.scales == 1).all())
    assert torch.equal(decode(grid, 4, 64), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_and_tiny_and_huge_rows_stay_near_and_finite(dtype: torch.dtype, symmetric: bool) -> None:
    limits = torch.finfo(dtype)
    for value in (0.37, -0.37, limits.tiny, limits.smallest_normal / 4, limits.max / 4, -limits.max / 4):
        weight = torch.full((1, 32), value, dtype=dtype)
        grid = quantize(weight, 4, 32, symmetric)
        assert bool((grid.scales != 0).all()) and bool(grid.scales.isfinite().all())
        error = (decode(grid, 4, 32).double() - weight.double()).abs().max()
        # A scale cannot be below the smallest one that is allowed, 2**-126 or 2**-24.
        assert float(error) <= max(0.08 * abs(float(weight[0, 0])), 2.0**-24 if dtype == torch.float16 else 2.0**-126)


@pytest.mark.parametrize("group_size", [1, 3, 4, 7, 21, 84])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_odd_groups_and_widths_round_to_nearest(bits: int, group_size: int) -> None:
    weight = samples("gauss", 1, 84)
    for symmetric in (True, False):
        grid = quantize(weight, bits, group_size, symmetric, "absmax")
        scales = grid.scales.repeat_interleave(group_size, dim=1)
        # Half a step; half a step more where an asymmetric zero was rounded.
        assert bool(((decode(grid, bits, 84) - weight).abs() <= scales * (0.501 if symmetric else 1.001)).all())


def test_the_bytes_do_not_depend_on_the_number_of_threads(on_threads: Any) -> None:
    weight = samples("outliers", 61, 2048).bfloat16()
    grids = on_threads(lambda: quantize(weight, 4, 128, False))
    for grid in grids[1:]:
        assert torch.equal(grid.packed, grids[0].packed) and torch.equal(grid.scales, grids[0].scales)
        assert grid.zeros is not None and grids[0].zeros is not None and torch.equal(grid.zeros, grids[0].zeros)


def test_a_transposed_weight_is_read_by_value() -> None:
    weight = samples("gauss", 64, 32).bfloat16().T
    assert torch.equal(quantize(weight, 4, 32, True).packed, quantize(weight.clone(), 4, 32, True).packed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_non_finite_weights_neither_hang_nor_touch_other_groups(bad: float, symmetric: bool) -> None:
    weight = samples("gauss", 2, 128)
    clean = quantize(weight, 4, 32, symmetric)
    weight[0, 5] = bad
    grid = quantize(weight, 4, 32, symmetric)
    assert torch.equal(grid.packed[1], clean.packed[1]) and torch.equal(grid.scales[:, 1:], clean.scales[:, 1:])


def test_bad_arguments_are_refused() -> None:
    weight = torch.ones(2, 64)
    with pytest.raises(ValueError, match="in_features 64 is not a multiple of group_size 48"):
        quantize(weight, 4, 48, True)
    with pytest.raises(ValueError, match="bits: 9 is not in 2..8"):
        quantize(weight, 9, 32, True)
    with pytest.raises(ValueError, match="clip: 'best' is not one of"):
        quantize(weight, 4, 32, True, "best")
    with pytest.raises(ValueError, match="weight: a 2-D"):
        quantize(weight.double(), 4, 32, True)
