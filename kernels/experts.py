"""CompressedExperts: stands in for the 3-D parameter of a mixture-of-experts layer.

transformers 5 stores all experts of a layer as one (experts, out_features, in_features) parameter and multiplies with
`parameter[expert]`. Here that expression gives an `ExpertWeight`, which runs the packed linears instead of making the
dense weight wherever the model calls `F.linear`, and is decoded for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What multiplies with a weight as it lies in the model: (out_features, in_features), or transposed.
_PRODUCTS = {False: (F.linear,), True: (torch.matmul, Tensor.matmul, Tensor.__matmul__)}


class ExpertWeight:
    """The weight of one expert: the rows of `parts`, one below the other; transposed, (in_features, out_features)."""

    def __init__(self, parts: Sequence[Any], transposed: bool) -> None:
        self.parts, self.transposed = parts, transposed

    def dense(self) -> Tensor:
        weight = torch.cat([part.weight for part in self.parts])
        return weight.T if self.transposed else weight

    def multiply(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features) of all parts side by side."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @property
    def shape(self) -> torch.Size:
        return self.dense().shape

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if len(args) >= 2 and isinstance(args[1], ExpertWeight) and function in _PRODUCTS[args[1].transposed]:
            y = args[1].multiply(args[0])
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return y if bias is None else y + bias
        # In the dtype of the activations, as the other linears run: a model may be loaded in another than it is stored.
        dtype = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
        args = [value.dense().to(dtype) if isinstance(value, ExpertWeight) else value for value in args]
        return function(*args, **{key: _dense(value) for key, value in (kwargs or {}).items()})


class CompressedExperts(nn.Module):
    """experts[e] is a list of linear layers without bias, packed or not, whose rows make the weight of expert e."""

    # transformers initialises parameters that no checkpoint fills; there is nothing here that it could initialise.
    _is_hf_initialized = True

    def __init__(self, experts: Sequence[Sequence[nn.Module]], transposed: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)
        self.transposed = transposed

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int | Tensor) -> ExpertWeight:
        parts: Any = self.experts[int(expert)]
        return ExpertWeight(list(parts), self.transposed)

    def dense(self) -> Tensor:
        """The whole parameter: (experts, out_features, in_features), or transposed as the model has it."""
        return torch.stack([self[expert].dense() for expert in range(len(self))])

    @property
    def shape(self) -> torch.Size:
        parts: Any = self.experts[0]
        rows, columns = sum(part.out_features for part in parts), parts[0].in_features
        return torch.Size((len(self), *((columns, rows) if self.transposed else (rows, columns))))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*map(_dense, args), **{key: _dense(value) for key, value in (kwargs or {}).items()})


def _dense(value: Any) -> Any:
    if isinstance(value, list | tuple):  # torch.cat
        return [_dense(item) for item in value]
    return value.dense() if isinstance(value, ExpertWeight | CompressedExperts) else value
