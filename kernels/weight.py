"""CompressedWeight: stands in for the parameter of an embedding, and of an output head that shares it.

The module that owns the parameter stays as it is, whatever it does with the rows (Gemma scales them, OPT shifts the
positions): where it calls `F.embedding`, the rows that are asked for are decoded; `F.linear` runs the packed linear;
and anything else gets the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.linear import CompressedModule, RunningScheme


class CompressedWeight(CompressedModule):
    """A (rows, columns) parameter on packed tensors, seen in the dtype that the model is loaded in."""

    # transformers initialises parameters that no checkpoint fills; there is nothing here that it could initialise.
    _is_hf_initialized = True

    def __init__(
        self, scheme: RunningScheme, shape: tuple[int, ...], dtype: torch.dtype, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(scheme, shape, tensors)
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return self.tensors()[self.local_names[0]].device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def dense(self) -> Tensor:
        """The whole weight."""
        return self.decode().to(self.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, scheme={self.scheme}"

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else None
        if isinstance(weight, CompressedWeight):
            if function is F.embedding and kwargs.get("max_norm") is None:
                return weight.scheme.rows(weight.running(), args[0]).to(weight.dtype)
            if function is F.linear:
                return weight.scheme.linear(args[0], weight.running(), *args[2:], **kwargs)
        return function(*map(_dense, args), **{key: _dense(value) for key, value in kwargs.items()})


def _dense(value: Any) -> Any:
    if isinstance(value, list | tuple):  # torch.cat
        return [_dense(item) for item in value]
    return value.dense() if isinstance(value, CompressedWeight) else value
