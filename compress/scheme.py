"""Scheme: the one interface every compression method implements."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """What a safetensors header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to store one linear weight.

    Its fields are its options: they are written to config.json as they are, and `--set KEY=VALUE` sets them. A scheme
    holds no tensors: the same object encodes, decodes and runs every weight that the plan gives it.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False  # NaN and infinity are only accepted where they come back
    needs_calibration: ClassVar[bool] = False

    def fit(self, shape: tuple[int, int]) -> Scheme:
        """The scheme for an (out_features, in_features) weight: itself, or for example with a group that divides it."""
        return self

    @abstractmethod
    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that `encode` makes of an (out_features, in_features) weight of `dtype`, by local name."""

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensors:
        """weight: (out_features, in_features), bfloat16, float16 or float32, finite. Returns the tensors to store."""

    @abstractmethod
    def decode(self, tensors: Tensors) -> Tensor:
        """The weight that `tensors` stand for: (out_features, in_features), in the dtype that was encoded."""

    @abstractmethod
    def original(self, specs: Mapping[str, Spec]) -> Spec:
        """Shape and dtype of the weight that was encoded, from the headers of its stored tensors alone."""

    def linear(self, x: Tensor, tensors: Tensors, bias: Tensor | None = None) -> Tensor:
        """x: (..., in_features). Returns (..., out_features). Override where a fused kernel exists."""
        return F.linear(x, self.decode(tensors).to(x.dtype), bias)

    @property
    def interchange(self) -> dict[str, Any] | None:
        """The `format` and `weights` of a compressed-tensors config group that reads this, if there is one."""
        return None

    def bytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Exact stored size of an (out_features, in_features) weight of `dtype`."""
        return sum(spec.bytes for spec in self.specs(shape, dtype).values())

    def to_dict(self) -> dict[str, Any]:
        return {"scheme": self.name, **dataclasses.asdict(self)}
