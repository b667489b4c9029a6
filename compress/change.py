"""Change: what is done to the channels between two weights, and undone in the second.

Channels x become x' = rotated((x / scale)[order]). The weights that make them change alike along their rows; those that
read them along their columns, with the scale multiplied instead, so that every product stays what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.stats import Stats

# What a change consists of, in the order in which it is done.
DTYPES = {"scale": torch.float32, "order": torch.int64, "rotation": torch.int64}


@dataclass(frozen=True, eq=False)
class Change:
    """scale: (channels,) float32, positive. order: (channels,) int64, the channel that comes to each place.
    rotation: (1,) int64, so many neighbours are rotated together, by a Hadamard matrix of this size, a power of two."""

    scale: Tensor | None = None
    order: Tensor | None = None
    rotation: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By field name, those that there are."""
        named = ((name, getattr(self, name)) for name in DTYPES)
        return {name: tensor for name, tensor in named if tensor is not None}

    def then(self, later: Change) -> Change:
        """Both, one after the other: scales come first, and rotations last."""
        numbers = [list(DTYPES).index(name) for name in (*self.tensors, *later.tensors)]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"{list(later.tensors)} cannot follow {list(self.tensors)}")
        return Change(**(self.tensors | later.tensors))

    def made(self, x: Tensor) -> Tensor:
        """x: (..., channels), float32, of a producer: its weight's rows as the last axis, its bias, or its outputs."""
        return self._moved(x if self.scale is None else x / self.scale.to(x.device))

    def read(self, weight: Tensor) -> Tensor:
        """weight: (out_features, channels), float32, of a reader."""
        return self._moved(weight if self.scale is None else weight * self.scale.to(weight.device))

    def unmade(self, x: Tensor) -> Tensor:
        """The inverse of `made`."""
        x = self._moved_back(x)
        return x if self.scale is None else x * self.scale.to(x.device)

    def unread(self, weight: Tensor) -> Tensor:
        """The inverse of `read`."""
        weight = self._moved_back(weight)
        return weight if self.scale is None else weight / self.scale.to(weight.device)

    def stats(self, stats: Stats) -> Stats:
        """Of the changed inputs. After a rotation: second moments from the Hessian (without one as if the channels were
        independent), the mean size of a normal distribution, and of the largest a bound."""
        if self.scale is not None:
            stats = stats.scaled(1 / self.scale)
        if self.order is not None:
            stats = stats.ordered(self.order)
        return stats if self.rotation is None else stats.rotated(hadamard(int(self.rotation)))

    def repeated(self, repeats: int, size: int) -> Change:
        """Of heads of `size` channels, each of which comes `repeats` times in a row. An order leaves heads whole."""
        scale, order = self.scale, self.order
        if scale is not None:
            scale = scale.view(-1, size).repeat_interleave(repeats, 0).flatten()
        if order is not None:
            heads, inside = (order // size).view(-1, 1, size), (order % size).view(-1, 1, size)
            order = ((heads * repeats + torch.arange(repeats)[:, None]) * size + inside).flatten()
        return Change(scale, order, self.rotation)

    def of_heads(self, size: int) -> Change:
        """What it is to others with such heads of `size` channels, which follow where whole heads change places."""
        if self.order is None:
            return Change()
        order = (self.order.view(-1, size)[:, :1] // size * size + torch.arange(size)).flatten()
        return Change() if torch.equal(order, torch.arange(len(order))) else Change(order=order)

    def _moved(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[..., self.order.to(x.device)]
        return x if self.rotation is None else _rotated(x, int(self.rotation))

    def _moved_back(self, x: Tensor) -> Tensor:
        x = x if self.rotation is None else _rotated(x, int(self.rotation))
        return x if self.order is None else x[..., torch.argsort(self.order).to(x.device)]


@cache
def hadamard(size: int) -> Tensor:
    """(size, size), symmetric and its own inverse: Sylvester's construction, for a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def _rotated(x: Tensor, size: int) -> Tensor:
    rotated: Tensor = x.unflatten(-1, (-1, size)) @ hadamard(size).to(x)
    return rotated.flatten(-2)


def changed(weight: Tensor, inputs: Change | None, outputs: Change | None) -> Tensor:
    """A linear weight (out_features, in_features) whose channels are changed, in its dtype."""
    if inputs is None and outputs is None:
        return weight
    whole = weight.float()
    whole = whole if inputs is None else inputs.read(whole)
    return (whole if outputs is None else outputs.made(whole.T).T).contiguous().to(weight.dtype)


def unchanged(weight: Tensor, inputs: Change | None, outputs: Change | None) -> Tensor:
    """The inverse of `changed`, in float32."""
    whole = weight.float() if inputs is None else inputs.unread(weight.float())
    return whole if outputs is None else outputs.unmade(whole.T).T
