"""Codebooks trained through their soft assignment (DKM [2108.12659]), with little kept for it (eDKM [2309.00964]).

What stands for a weight w is differentiated as sum_k a_k c_k, where a = softmax(-(w - c)**2 / temperature); forwards it
is the nearest entry, which is what will be stored. Attention is over few values of w, as in eDKM, which has those of 16
bits: here 256 for a codebook, as many in each cell, so that an index takes 8 bits. For the backward pass only these are
kept, and attention and weight are computed again. The weights themselves are not trained. Those that GPTQ's feedback
has moved about (`ganq.py`) lie where their entries are, and stay with them: their errors make good one another's, and
one that goes to another entry leaves the others' behind (block errors then grew, at every rate of training).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.formats import cluster

VALUES = 256  # of a codebook
TEMPERATURE = 0.05  # per square of the mean distance between entries


class Clusters:
    """One weight (out_features, in_features) in codebooks that can be trained.

    weight: (out_features, in_features) float32, or None for where its entries are. codes: the same shape, uint8.
    levels: (codebooks, K) float32, ascending, each for `rows` rows. scale: (out_features, 1) float32, of each row, or
    None. All on one device.
    """

    def __init__(self, weight: Tensor | None, codes: Tensor, levels: Tensor, rows: int, scale: Tensor | None) -> None:
        device, entries = levels.device, levels.shape[1]
        self._rows, self._start, self._scale = rows, levels, scale
        self._gap = (levels[:, -1:] - levels[:, :1]) / max(entries - 1, 1)
        self.parameters = [torch.zeros_like(levels).requires_grad_()]
        if scale is not None:
            self.parameters.append(torch.zeros_like(scale).requires_grad_())
        spread = levels.repeat_interleave(rows, 0)[: len(codes)]
        if weight is None:
            weight = spread.gather(1, codes.long())
        elif scale is not None:
            weight = weight / scale
        books = torch.arange(len(weight), device=device)[:, None] // rows
        cells = (books * entries + codes).flatten()
        none = torch.zeros(levels.numel(), device=device)
        ends = [none.scatter_reduce(0, cells, weight.flatten(), end, include_self=False) for end in ("amin", "amax")]
        parts = VALUES // entries
        step = ((ends[1] - ends[0]) / parts)[:, None]
        self.values = (ends[0][:, None] + step * (torch.arange(parts, device=device) + 0.5)).view(len(levels), -1)
        inside = (weight.flatten() - ends[0][cells]) / step[cells, 0]
        inside = inside.nan_to_num(0).clamp(0, parts - 1).to(torch.uint8).view(weight.shape)
        self.indices = codes * parts + inside

    @property
    def levels(self) -> Tensor:
        """The codebooks as they are now, in any order."""
        return self._start + self._gap * self.parameters[0]

    @property
    def scale(self) -> Tensor | None:
        return None if self._scale is None else self._scale * (1 + self.parameters[1])

    def multiply(self, x: Tensor) -> Tensor:
        """x: (..., in_features) float32. Returns (..., out_features)."""
        temperature = TEMPERATURE * self._gap.square()
        temperature = temperature.where(temperature > 0, 1.0)
        product: Tensor = _Product.apply(x, self.levels, self.scale, self.values, self.indices, temperature, self._rows)
        return product

    def codes(self, levels: Tensor) -> Tensor:
        """Of the nearest of `levels`, which are ascending: (out_features, in_features) uint8."""
        chosen = cluster.assign(self.values.cpu(), levels.cpu()).to(self.indices.device)
        return chosen.flatten()[_places(self.indices, self._rows).long()].view(self.indices.shape)


class _Product(torch.autograd.Function):
    """x times the transposed weight. Saved are x, codebooks, scales, and what does not change: values and indices."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        levels: Tensor,
        scale: Tensor | None,
        values: Tensor,
        indices: Tensor,
        temperature: Tensor,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(x, levels, scale, values, indices, temperature)
        ctx.rows = rows
        weight = _weight(levels, values, indices, rows)
        return x @ (weight if scale is None else weight * scale).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, levels, scale, values, indices, temperature = ctx.saved_tensors
        weight = _weight(levels, values, indices, ctx.rows)
        of_x = gradient @ (weight if scale is None else weight * scale)
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        of_scale = None
        if scale is not None:
            of_scale, of_weight = (of_weight * weight).sum(1, keepdim=True), of_weight * scale
        of_values = torch.zeros(values.numel(), device=x.device)
        of_values.index_add_(0, _places(indices, ctx.rows), of_weight.flatten())
        return of_x, _of_levels(of_values.view_as(values), levels, values, temperature), of_scale, *[None] * 4


def _of_levels(of_values: Tensor, levels: Tensor, values: Tensor, temperature: Tensor) -> Tensor:
    """The gradient of the codebooks, from that of what stands for `values`.

    With d = values - c: the derivative of sum_j a_j c_j by c_k is a_k (1 + 2 d_k / temperature (c_k - sum_j a_j c_j)).
    """
    distance = values[..., None] - levels[:, None]
    attention = (-distance.square() / temperature[..., None]).softmax(-1)
    soft = (attention * levels[:, None]).sum(-1, keepdim=True)
    slope = attention * (1 + 2 * distance / temperature[..., None] * (levels[:, None] - soft))
    return torch.einsum("nu,nuk->nk", of_values, slope)


def _weight(levels: Tensor, values: Tensor, indices: Tensor, rows: int) -> Tensor:
    """(out_features, in_features): for each value the nearest of the levels, which come in any order."""
    ordered = levels.sort(dim=1).values
    bounds = (ordered[:, 1:] + ordered[:, :-1]) / 2
    table = ordered.gather(1, torch.searchsorted(bounds, values))
    return table.flatten().index_select(0, _places(indices, rows)).view(indices.shape)


def _places(indices: Tensor, rows: int) -> Tensor:
    """Of the weights in the values of all codebooks, one after the other: (out_features * in_features,) int32."""
    books = torch.arange(len(indices), dtype=torch.int32, device=indices.device)[:, None] // rows
    return (books * VALUES + indices).flatten()
