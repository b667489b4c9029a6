"""Prepared: a weight as the kernels of its device want it, which can do more than be decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec

import torch
from torch import Tensor


class Prepared(ABC):
    """What `Scheme.prepare` returns where kernels want another layout than the stored one, or to multiply with it."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight, (out_features, in_features) in its dtype."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x @ W.T + bias, (..., in_features) -> (..., out_features); None where decoding W is better."""


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: a GPU of either maker, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None
