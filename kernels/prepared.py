"""Prepared: a weight as the kernels of its device want it, which can do more than be decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

ROCM = torch.version.hip is not None  # the GPUs are AMD's, which torch calls "cuda" too


class Prepared(ABC):
    """What `Scheme.prepare` returns where kernels want another layout than the stored one, or to multiply with it.

    input_scale: what all activations are divided by, where a scheme stores such. product: what multiplies with it on
    the CPU as it is stored (`cpu.Product`), where something does.
    """

    input_scale: Tensor | None = None
    product: Any = None

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight, (out_features, in_features) in its dtype."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W.T + bias, (..., in_features) -> (..., out_features); fused or of the decoded weight, as is faster."""


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: a GPU of either maker, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def stages(count: int) -> int:
    """Of a Triton loop's pipeline: one fewer on AMD's GPUs, where a program has 64 KiB of shared memory."""
    return count - 1 if ROCM else count


def with_input_scale(found: Prepared | None, tensors: dict[str, Tensor]) -> Prepared | None:
    """`found` with the input_scale that is stored beside the weight."""
    if found is not None:
        found.input_scale = tensors.get("input_scale")
    return found
