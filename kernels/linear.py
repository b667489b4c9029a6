"""CompressedLinear: the module that stands in for `nn.Linear`, whatever the scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class LinearScheme(Protocol):
    """What a scheme must do to run."""

    def decode(self, tensors: dict[str, Tensor]) -> Tensor: ...

    def linear(self, x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor: ...


class CompressedLinear(nn.Module):
    """A linear layer on packed tensors: y = x @ W.T + bias with W = scheme.decode(tensors)."""

    def __init__(
        self,
        scheme: LinearScheme,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: nn.Parameter | None = None,
    ) -> None:
        """shape: (out_features, in_features). tensors: by local name, on any device, "meta" before loading."""
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = shape
        self.local_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(_attribute(name), tensor)
        self.bias = bias

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by local name."""
        return {name: self._buffers[_attribute(name)] for name in self.local_names}  # type: ignore[misc]

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts a copy of a loaded tensor where the local tensor `name` lies; one on "meta" is made on the CPU."""
        current = self.tensors()[name]
        device = "cpu" if current.is_meta else current.device
        setattr(self, _attribute(name), tensor.to(device, copy=True))

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features): decoded anew at every access."""
        return self.scheme.decode(self.tensors())

    def forward(self, x: Tensor) -> Tensor:
        return self.scheme.linear(x, self.tensors(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


def _attribute(name: str) -> str:
    # `weight` is what other code calls the decoded weight; fp8 stores one of that name.
    return "qweight" if name == "weight" else name


def meta(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor without memory, to be filled when its checkpoint is read."""
    return torch.empty(shape, dtype=dtype, device="meta")
