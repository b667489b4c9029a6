"""GPTQ: rounding column by column, each error made good by the columns that are still to come [2210.17323].

It needs to know nothing of the format: `nearest` rounds one column of weights to what can be stored in its place.
Scales are fixed before, in the columns' own order (static groups), so columns may be visited in the order of their
importance without anything to gather at run time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.1
BLOCK = 128  # columns whose errors are carried to the rest of the matrix at once
Nearest = Callable[[Tensor, int], Tensor]  # (out_features,) float32 and the column's number -> what is stored for them


class NotPositiveDefinite(ValueError):
    """No damping that was tried makes the Hessian invertible."""


def compensate(weight: Tensor, hessian: Tensor, nearest: Nearest, damping: float = DAMPING) -> Tensor:
    """The storable matrix whose outputs are near those of `weight` on the calibration data.

    weight: (out_features, in_features) float32. hessian: (in_features, in_features) float32, mean of x x^T. damping:
    a fraction of the Hessian's mean diagonal (more than the usual 0.01: text of another kind than the calibration text
    then loses less, and at 2 bits all does); ten times as much, up to 1, where it is not positive definite. Raises
    NotPositiveDefinite where that does not help. Returns (out_features, in_features) float32, every column of it
    something that `nearest` returned.
    """
    order, factor = ordered(hessian, damping)
    columns, steps = order.tolist(), factor.diagonal().tolist()
    rest = weight.T[order]  # a column lies side by side
    stored = torch.empty_like(rest)
    for first in range(0, len(rest), BLOCK):
        last = min(first + BLOCK, len(rest))
        errors = torch.empty_like(rest[first:last])
        for i in range(first, last):
            chosen = stored[columns[i]] = nearest(rest[i], columns[i])
            error = torch.div(rest[i] - chosen, steps[i], out=errors[i - first])
            rest[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
        rest[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return stored.T.contiguous()


def ordered(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The columns from the most important one on, (in_features,) int64, and the factor of the inverse in that order:
    (in_features, in_features), upper triangular. Arguments and errors as in `compensate`."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    live = diagonal > 0  # inputs that were always zero: such a column is rounded, and concerns no other
    diagonal[diagonal == 0] = diagonal[live].mean() if live.any() else 1
    order = torch.argsort(diagonal, descending=True, stable=True)
    return order, _inverse_factor(hessian[order][:, order], damping)


def remaining(hessian: Tensor) -> float:
    """The part of the squared error of the outputs that `compensate` leaves of rounding each column for itself, where
    these roundings are independent: tr D / tr H, H = L D L^T, without damping (QuIP [2307.13304], section 3)."""
    try:
        order, factor = ordered(hessian)
    except NotPositiveDefinite:
        return 1.0
    # What a column is off by it leaves there and, as its line of this says, in those to come.
    spread = factor / factor.diagonal()[:, None]
    energy = ((spread @ hessian[order][:, order]) * spread).sum(dtype=torch.float64)
    return float(energy / hessian.diagonal().sum(dtype=torch.float64)) if hessian.any() else 1.0


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """hessian: (in_features, in_features). Returns it with a fraction of its mean diagonal added to the diagonal."""
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (hessian + damping)^-1, as the paper's step 3 has it."""
    while damping <= 1:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed:
            inverse: Tensor = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and upper.isfinite().all():
            factor: Tensor = upper
            return factor
        damping *= 10
    raise NotPositiveDefinite("its Hessian is not positive definite, whatever the damping")
