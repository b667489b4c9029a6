"""What the squared errors of weights are weighted by where no Hessian says more: by channels, or one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.ganq import DAMPING
from compress.stats import Stats


def of(sensitivity: str, width: int, stats: Stats | None) -> Tensor:
    """(1 or out_features, in_features) float32, all positive, 1 on average.

    activation: second moments of the inputs. fisher: squared gradients of the loss, and the former where it has none.
    """
    if stats is None or sensitivity == "none":
        return torch.ones(1, width)
    measured = stats.second_moment[None]
    if sensitivity == "fisher" and stats.fisher is not None and stats.fisher.any():
        measured = stats.fisher
    mean = measured.mean(dtype=torch.float64)
    if not mean > 0:
        return torch.ones(1, width)
    # As GPTQ damps the Hessian, whose diagonal the second moments are.
    return ((measured.double() / mean + DAMPING) / (1 + DAMPING)).float()
