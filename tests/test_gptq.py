"""GPTQ against a slow version written from the paper, and what must hold for any weight."""

import pytest
import torch
from torch import Tensor

from compress import gptq
from compress.gptq import NotPositiveDefinite, compensate
from compress.int4 import Int4
from compress.stats import Stats


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated channels of very different size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed * torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]


def statistics(x: Tensor) -> Stats:
    return Stats(len(x), x.square().mean(0), x.abs().mean(0), x.abs().amax(0), x.T @ x / len(x))


def halves(column: Tensor, _: int) -> Tensor:
    """The nearest multiple of 0.5."""
    return (column * 2).round() / 2


def slow(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization in a fixed order: after each column, the best change of all that are still free."""
    width = weight.shape[1]
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(width)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    rest, stored, free = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64), list(order)
    for column in order:
        stored[:, column] = halves(rest[:, column], column)
        error = rest[:, column] - stored[:, column]
        inverse = torch.linalg.inv(damped[free][:, free])
        place = free.index(column)
        for k, other in enumerate(free):
            rest[:, other] -= error / inverse[place, place] * inverse[place, k]
        free.remove(column)
    return stored


@pytest.mark.parametrize("width", [1, 2, 7, 40])
def test_it_is_optimal_brain_quantization_of_one_column_after_the_other(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "BLOCK", 8)
    x = inputs(200, width)
    hessian = x.T @ x / len(x)
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    found = compensate(weight, hessian, halves, damping=0.01)
    assert (found == slow(weight, hessian, 0.01)).float().mean() > 0.97  # sums that lie between two steps may differ


def test_what_remains_of_the_error_is_known_before() -> None:
    x = inputs(2000, 40)
    hessian = x.T @ x / len(x)
    weight = torch.randn(400, 40, generator=torch.Generator().manual_seed(1)) * 20  # many steps: errors are independent

    def energy(stored: Tensor) -> float:
        error = stored - weight
        return float(((error @ hessian) * error).sum())

    found = energy(compensate(weight, hessian, halves)) / energy(halves(weight, 0))
    assert found == pytest.approx(gptq.remaining(hessian), rel=0.05) and found < 0.8
    assert gptq.remaining(torch.eye(5)) == pytest.approx(1)
    assert gptq.remaining(torch.full((2, 2), torch.nan)) == gptq.remaining(torch.zeros(2, 2)) == 1


def test_two_columns_by_hand() -> None:
    # Inputs are alike in both columns but for the damping: what the first loses, the second takes over.
    hessian = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[0.3, 0.0]])
    assert compensate(weight, hessian, halves, damping=1e-3).tolist() == [[0.5, 0.0]]
    assert compensate(torch.tensor([[0.2, 0.2]]), hessian, halves, damping=1e-3).tolist() == [[0.0, 0.5]]
    assert halves(torch.tensor([0.2]), 0).tolist() == [0.0]  # which alone would have lost 0.4 of the sum


def test_the_most_important_column_is_rounded_first_and_nothing_is_lost_on_the_way() -> None:
    seen: list[int] = []

    def nearest(column: Tensor, number: int) -> Tensor:
        seen.append(number)
        return column

    weight = torch.randn(4, 3)
    assert torch.equal(compensate(weight, torch.diag(torch.tensor([1.0, 9.0, 4.0])), nearest), weight)
    assert seen == [1, 2, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_never_further_off_than_with_rounding_to_nearest(bits: int, symmetric: bool) -> None:
    x, weight = inputs(400, 96), torch.randn(24, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    errors = {}
    for method in ("rtn", "gptq"):
        scheme = Int4(bits=bits, group_size=32, symmetric=symmetric, method=method)
        decoded = scheme.decode(scheme.encode(weight, statistics(x)))
        errors[method] = (x @ (weight.float() - decoded.float()).T).norm().item()
    assert errors["gptq"] < errors["rtn"]


def test_with_inputs_that_are_independent_it_rounds_to_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(compensate(weight, torch.eye(64), halves), halves(weight, 0))


def test_channels_that_never_carry_anything_do_no_harm() -> None:
    x = inputs(100, 16)
    x[:, [0, 7, 15]] = 0
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    found = compensate(weight, x.T @ x / 100, halves)
    assert found.isfinite().all()
    assert torch.equal(found[:, [0, 7, 15]], halves(weight, 0)[:, [0, 7, 15]])


def test_fewer_tokens_than_channels_are_damped() -> None:
    x = inputs(4, 32)
    found = compensate(torch.randn(3, 32, generator=torch.Generator().manual_seed(5)), x.T @ x / 4, halves)
    assert found.isfinite().all()


def test_a_hessian_that_is_none_is_refused() -> None:
    with pytest.raises(NotPositiveDefinite, match="not positive definite"):
        compensate(torch.ones(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), halves)
    with pytest.raises(NotPositiveDefinite):
        compensate(torch.ones(2, 2), torch.full((2, 2), float("nan")), halves)


def test_neither_weight_nor_hessian_is_changed() -> None:
    x, weight = inputs(50, 8), torch.randn(2, 8)
    hessian = x.T @ x / 50
    before = weight.clone(), hessian.clone()
    compensate(weight, hessian, halves)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3])
def test_dead_channels_and_the_unit_of_activations_do_not_matter(size: float) -> None:
    x = inputs(300, 64)
    x[:, ::4] = 0
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(6))
    found = compensate(weight, (size * x).T @ (size * x) / 300, halves)
    assert torch.equal(found, compensate(weight, x.T @ x / 300, halves)) or (
        (found == compensate(weight, x.T @ x / 300, halves)).float().mean() > 0.97
    )
