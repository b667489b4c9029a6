"""Coordinate descent against a version that tries every integer, and that no step is for the worse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.descent import Grid, descend
from compress.formats import bitpack
from compress.int4 import Int4
from compress.rtn import quantize
from compress.stats import Stats


def problem(rows: int, groups: int, size: int, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor, Grid]:
    """A weight, the Hessian of correlated inputs, and the weight rounded to nearest."""
    generator = torch.Generator().manual_seed(rows + groups + size + bits)
    width = groups * size
    x = torch.randn(300, width, generator=generator) @ torch.randn(width, width, generator=generator)
    weight = torch.randn(rows, width, generator=generator).bfloat16()
    grid = quantize(weight, bits, size, symmetric)
    scales = grid.scales.T.float().contiguous()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if grid.zeros is None else grid.zeros.T.float().contiguous()
    codes = bitpack.unpack(grid.packed, bits, width).T.float().contiguous()
    return weight.float(), x.T @ x / 300, Grid(codes, scales, zeros, 2**bits - 1, torch.bfloat16)


def error(weight: Tensor, hessian: Tensor, grid: Grid) -> float:
    difference = (grid.values().T - weight).double()
    return float((difference @ hessian.double() * difference).sum())


def slow(weight: Tensor, hessian: Tensor, grid: Grid, size: int) -> None:
    """One sweep in which each scale is fitted to the whole error, and each column tries every integer."""

    def row_error(row: int, values: Tensor) -> float:
        difference = (values - weight[row]).double()
        return float(difference @ hessian.double() @ difference)

    for row in range(len(weight)):
        for group in range(len(grid.scales)):
            columns = range(group * size, (group + 1) * size)
            direction = torch.zeros(weight.shape[1], dtype=torch.float64)
            for column in columns:
                direction[column] = grid.codes[column, row] - grid.zeros[group, row]
            rest = weight[row].double() - (grid.values()[:, row].double() - direction * grid.scales[group, row])
            curvature = direction @ hessian.double() @ direction
            if curvature > 0:
                best = ((rest @ hessian.double() @ direction) / curvature).bfloat16().float()
                before, kept = row_error(row, grid.values()[:, row]), grid.scales[group, row].clone()
                grid.scales[group, row] = best
                if row_error(row, grid.values()[:, row]) >= before or best * kept <= 0:
                    grid.scales[group, row] = kept
            for column in columns:
                errors = []
                for code in range(grid.most + 1):
                    grid.codes[column, row] = code
                    errors.append(row_error(row, grid.values()[:, row]))
                grid.codes[column, row] = errors.index(min(errors))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_it_takes_the_best_scale_and_the_best_integer_of_all(bits: int, symmetric: bool) -> None:
    weight, hessian, found = problem(6, 3, 8, bits, symmetric)
    expected = problem(6, 3, 8, bits, symmetric)[2]
    descend(weight, hessian, found, sweeps=1)
    slow(weight, hessian, expected, 8)
    assert torch.equal(found.scales, expected.scales) and torch.equal(found.codes, expected.codes)


def test_two_columns_by_hand() -> None:
    # Both inputs are nearly alike: 0.4 + 0.4 is 1 + 0, which no column finds alone; and a scale of 0.8 makes it exact.
    hessian = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
    grid = Grid(torch.tensor([[2.0], [2.0]]), torch.ones(1, 1), torch.full((1, 1), 2.0), 3, torch.float32)
    descend(torch.full((1, 2), 0.4), hessian, grid, sweeps=2)
    assert sorted(grid.codes.flatten().tolist()) == [2, 3]
    assert grid.scales.item() == pytest.approx(0.8 * 0.995)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows, groups, size", [(1, 1, 1), (1, 5, 16), (7, 2, 32), (3, 1, 9)])
def test_no_sweep_is_for_the_worse(rows: int, groups: int, size: int, bits: int) -> None:
    weight, hessian, grid = problem(rows, groups, size, bits)
    errors = [error(weight, hessian, grid)]
    for _ in range(4):
        descend(weight, hessian, grid, sweeps=1)
        errors.append(error(weight, hessian, grid))
    assert all(after <= before * (1 + 1e-5) + 1e-6 for before, after in zip(errors, errors[1:], strict=False))
    assert 0 <= grid.codes.min() and grid.codes.max() <= grid.most and torch.equal(grid.codes, grid.codes.round())
    assert torch.equal(grid.scales, grid.scales.bfloat16().float())


def test_a_group_of_zeros_stays_zero_and_does_not_divide_by_it() -> None:
    weight, hessian, _ = problem(4, 2, 8, 2)
    weight[:, :8] = 0
    grid = quantize(weight.bfloat16(), 2, 8, False)
    assert grid.zeros is not None
    codes = bitpack.unpack(grid.packed, 2, 16).T.float().contiguous()
    found = Grid(codes, grid.scales.T.float().contiguous(), grid.zeros.T.float().contiguous(), 3, torch.bfloat16)
    descend(weight, hessian, found)
    assert found.values().isfinite().all() and found.scales.ne(0).all()


def test_the_same_bytes_on_any_number_of_threads(on_threads: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    weight, missing = (torch.randn(192, 256, generator=generator) for _ in range(2))
    stats = Stats(600, x.square().mean(0), x.abs().mean(0), x.abs().amax(0), x.T @ x / 600, missing)
    scheme = Int4(bits=3, group_size=64, symmetric=False, method="gptq")
    first, *others = on_threads(lambda: scheme.encode(weight.bfloat16(), stats))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
