"""The compiled loops that fit codes to outputs, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.formats import fitting
from compress.ganq import choose, pairs


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow(wanted: Tensor, base: Tensor | None, reach: Tensor, levels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row, every level tried. base: None for what is wanted when its turn comes. Returns codes and changes."""
    codes, changes = torch.zeros(wanted.shape, dtype=torch.uint8), torch.zeros(wanted.shape)
    for row in range(len(wanted)):
        left = wanted[row].clone()
        for i in range(len(left)):
            codes[row, i] = (levels[i, row] - left[i]).abs().argmin()
            chosen = left[i] if kept[row, i] else levels[i, row, codes[row, i].long()]
            changes[row, i] = chosen - (left[i] if base is None else base[row, i])
            left[i + 1 :] += changes[row, i] * reach[i, i + 1 :]
    return codes, changes


@pytest.mark.parametrize("run", [fitting.choose, choose], ids=["compiled", "torch"])
@pytest.mark.parametrize("compensating", [True, False])
@pytest.mark.parametrize(
    "rows, columns, clusters, block", [(1, 1, 2, 1), (3, 40, 16, 7), (21, 33, 4, 99), (2, 5, 256, 2)]
)
def test_columns_are_chosen_as_if_every_level_were_tried(
    rows: int, columns: int, clusters: int, block: int, compensating: bool, run: Callable[..., None]
) -> None:
    wanted, reach, old = drawn(rows, columns), 0.3 * drawn(columns, columns, seed=1), drawn(rows, columns, seed=2)
    levels, kept = drawn(-(-columns // block), rows, clusters, seed=3).sort(2).values, drawn(rows, columns) > 1
    blocks, order = torch.arange(columns) // block, torch.arange(columns).flip(0)
    codes, stored = torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(rows, columns)
    changes = wanted.clone()
    base = changes if compensating else old
    run(changes, base, reach, (levels, blocks), order, (codes, stored, kept))
    expected = slow(wanted, None if compensating else old, reach, levels[blocks[order]], kept[:, order])
    assert torch.equal(codes[:, order], expected[0]) and torch.allclose(changes, expected[1], atol=1e-4)
    values = levels[blocks[order], torch.arange(rows)[:, None], codes[:, order].long()]
    assert torch.equal(stored[:, order][~kept[:, order]], values[~kept[:, order]])


@pytest.mark.parametrize("rows, columns, clusters", [(1, 1, 2), (5, 130, 3), (70, 300, 17), (2, 1300, 5)])
def test_sums_over_pairs_of_codes_are_those_of_products_with_one_hot_codes(
    rows: int, columns: int, clusters: int
) -> None:
    hessian, pulled = drawn(columns, columns), drawn(rows, columns, seed=1)
    codes = torch.randint(0, clusters, (rows, columns), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    found, expected = (sums(codes, pulled, hessian + hessian.T, clusters) for sums in (fitting.pairs, pairs))
    for part, wanted in zip(found, expected, strict=True):
        assert part.shape == wanted.shape and part.dtype == torch.float64
        assert (part - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_sums_by_hand() -> None:
    hessian, codes = torch.tensor([[1.0, 2.0, 4.0], [2.0, 8.0, 16.0], [4.0, 16.0, 32.0]]), torch.tensor([[0, 1, 0]])
    matrices, vectors = fitting.pairs(codes.to(torch.uint8), torch.tensor([[1.0, 2.0, 3.0]]), hessian, 2)
    assert matrices.tolist() == [[[1 + 2 * 4 + 32, 2 + 16], [2 + 16, 8]]] and vectors.tolist() == [[4, 2]]


def test_threads_do_not_change_a_bit(on_threads: Any) -> None:
    codes = torch.randint(0, 4, (60, 512), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    hessian, pulled = drawn(512, 512), drawn(60, 512, seed=1)
    first, *others = on_threads(lambda: fitting.pairs(codes, pulled, hessian + hessian.T, 4))
    assert all(torch.equal(*both) for other in others for both in zip(first, other, strict=True))
