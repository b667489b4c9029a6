"""What the squared errors of weights are weighted by where no Hessian says more: by channels, or one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.ganq import DAMPING  # of the Hessian, whose diagonal second moments are
from compress.stats import Stats

FISHER_DAMPING = 1.0  # of their mean: those of single weights are few samples' (benchmarks/results/kmeans.md)


def of(sensitivity: str, width: int, stats: Stats | None) -> Tensor:
    """(1 or out_features, in_features) float32, all positive, 1 on average.

    activation: second moments of the inputs. fisher: squared gradients of the loss, and the former where it has none.
    """
    if stats is None or sensitivity == "none":
        return torch.ones(1, width)
    measured, damping = stats.second_moment[None], DAMPING
    if sensitivity == "fisher" and stats.fisher is not None and stats.fisher.any():
        measured = stats.fisher
        damping = FISHER_DAMPING
    mean = measured.mean(dtype=torch.float64)
    if not mean > 0:
        return torch.ones(1, width)
    return ((measured.double() / mean + damping) / (1 + damping)).float()
