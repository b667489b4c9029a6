"""Single weights that are stored as they are, beside those that are coded: a sparse matrix by rows (SqueezeLLM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.scheme import Spec, Tensors

NAMES = ("outlier_start", "outlier_column", "outlier_value")


def specs(shape: tuple[int, ...], dtype: torch.dtype, fraction: float) -> dict[str, Spec]:
    """The stored tensors for the rounded fraction of a weight's values: none where that is zero."""
    count = round(fraction * math.prod(shape))
    if not count:
        return {}
    column = torch.uint16 if shape[1] <= 1 << 16 else torch.int32
    found = (Spec(torch.int32, (shape[0] + 1,)), Spec(column, (count,)), Spec(dtype, (count,)))
    return dict(zip(NAMES, found, strict=True))


def choose(weight: Tensor, fraction: float, importance: Tensor) -> Tensor | None:
    """The weights that lose most where their row's mean stands for them: (out_features, in_features) bool, or None.

    weight: (out_features, in_features) float32. importance: (1 or out_features, in_features).
    """
    count = round(fraction * weight.numel())
    if not count:
        return None
    error = (weight - weight.mean(1, keepdim=True)).abs() * importance.sqrt()
    chosen = torch.zeros(weight.numel(), dtype=torch.bool)
    chosen[error.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return chosen.view(weight.shape)


def pack(values: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensors:
    """The chosen of `values`, in `dtype`, row by row."""
    rows, columns = chosen.nonzero(as_tuple=True)
    start = torch.zeros(len(chosen) + 1, dtype=torch.int32)
    start[1:] = torch.bincount(rows, minlength=len(chosen)).cumsum(0)
    column = torch.uint16 if chosen.shape[1] <= 1 << 16 else torch.int32
    return dict(zip(NAMES, (start, columns.to(column), values[rows, columns].to(dtype)), strict=True))


def rows(tensors: Tensors) -> Tensor:
    """The row of each value: (count,) int64. Raises ValueError for damaged tensors."""
    start = tensors["outlier_start"].long()
    counts = start.diff()
    if int(start[0]) or int(start[-1]) != tensors["outlier_value"].numel() or (counts < 0).any():
        raise ValueError("outlier_start: is not that of these values; download the checkpoint again")
    return torch.arange(len(counts), device=start.device).repeat_interleave(counts)


def put(weight: Tensor, tensors: Tensors) -> Tensor:
    """Writes the values into a weight, and returns it."""
    columns = tensors["outlier_column"].long()
    if columns.numel() and int(columns.max()) >= weight.shape[1]:
        raise ValueError(f"outlier_column: is past the last of {weight.shape[1]}; download the checkpoint again")
    weight[rows(tensors), columns] = tensors["outlier_value"]
    return weight
