"""Folding: which scales, orders and rotations make the errors of one block's layers smaller.

A change is made only where the layers that read the changed channels, encoded in full, then err less on the calibration
text. In another order no single layer must be worse; a rotation mixes the rows of the layer before too, so that counts
as well, both in parts of their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from compress import awq, smooth
from compress.change import Change, changed
from compress.fold import Fold, rotation
from compress.gptq import NotPositiveDefinite
from compress.pipeline import read_weight
from compress.planning import Packed
from compress.scheme import Tensors
from compress.source import Source
from compress.stats import Stats

ROWS = 512  # of a weight that are looked at
LESS = 0.99  # of an error: what saves less is not worth a change, and may be chance
DONE = {"scale": "input channels scaled", "order": "input channels reordered", "rotation": "input channels rotated"}


class Folding:
    """packed: the modules of a block. stats: of their inputs, as they are without changes."""

    def __init__(self, source: Source, packed: Mapping[str, Packed], stats: Mapping[str, Stats | None]) -> None:
        self._source, self._packed, self._stats = source, packed, stats
        self._inputs: dict[str, Change] = {}
        self._outputs: dict[str, Change] = {}
        self._gains: dict[str, list[str]] = {}

    def inputs(self, module: str) -> Change | None:
        """What was done to the channels that a module reads."""
        return self._inputs.get(module)

    def outputs(self, module: str) -> Change | None:
        return self._outputs.get(module)

    @property
    def changed(self) -> list[str]:
        """The modules that something was done to."""
        return [module for module in self._packed if module in self._inputs or module in self._outputs]

    def stats(self, module: str) -> Stats | None:
        """Of the inputs of a module as they are now."""
        stats, inputs = self._stats[module], self._inputs.get(module)
        return stats if stats is None or inputs is None else inputs.stats(stats)

    def note(self, module: str) -> str | None:
        """What the report says of it."""
        return "; ".join(self._gains[module]) if module in self._gains else None

    def choose(self, fold: Fold, producers: list[str], readers: list[str]) -> tuple[Change, float | None] | None:
        """The change of a fold that helps most, and the part of the squared error that it saves; or one that a scheme
        asks for whatever it saves, and None. producers: its modules, none for a norm."""
        if not all(fold.kind in self._packed[m].scheme.folds and self._stats[m] is not None for m in readers):
            return None
        done = [*(self._inputs.get(m) for m in readers), *(self._outputs.get(m) for m in producers)]
        if any(change and fold.kind in change.tensors for change in done):  # ReLU lets both gate and up be scaled
            return None
        scales = [scale for module in readers if (scale := self._exact_scale(module)) is not None]
        if scales:
            alike = len(scales) == len(readers) and all(torch.equal(scale, scales[0]) for scale in scales)
            fits = alike and not producers and not fold.offset and bool((scales[0] != 1).any())
            return (Change(scale=scales[0]), None) if fits else None
        best = None
        try:
            before = least = self._losses(fold, Change(), producers, readers)
            for change in self._candidates(fold, readers):
                losses = self._losses(fold, change, producers, readers)
                if sum(losses) < LESS * sum(least) and all(a <= b for a, b in zip(losses, least, strict=True)):
                    best, least = change, losses
        except NotPositiveDefinite:
            return None
        return None if best is None else (best, 1 - sum(least) / sum(before))

    def make(
        self, fold: Fold, change: Change, gain: float | None, outputs: Mapping[str, Change], readers: list[str]
    ) -> None:
        """Changes the channels from now on. gain: as of `choose`. outputs: by module, what it is to those that make
        them."""
        why = "by powers of two, in the norm" if gain is None else f"squared error down by {gain:.1%}"
        for module, made in outputs.items():
            self._outputs[module] = self._outputs.get(module, Change()).then(made)
        for module in readers:
            self._inputs[module] = self._inputs.get(module, Change()).then(fold.inputs(change))
            self._gains.setdefault(module, []).append(f"{DONE[fold.kind]}: {why}")

    def _exact_scale(self, module: str) -> Tensor | None:
        stats = self._stats[module]
        return None if stats is None else self._packed[module].scheme.exact_scale(stats.second_moment)

    def _losses(self, fold: Fold, change: Change, producers: list[str], readers: list[str]) -> list[float]:
        """What must not grow: of an order the error of each layer, else that of all of them together."""
        inputs = fold.inputs(change)
        if fold.kind == "rotation":  # layers that do not read the same: in parts of their outputs
            read = [self._loss(module, inputs, Change(), _all_rows) / self._energy(module) for module in readers]
            made = [self._loss(module, Change(), change, _all_rows) / self._energy(module) for module in producers]
            return [sum(read) + sum(made)]
        losses = [self._loss(module, inputs, Change(), some_rows) for module in readers]
        return losses if fold.kind == "order" else [sum(losses)]

    def _energy(self, module: str) -> float:
        """The mean over tokens of the square of a layer's outputs; 1 where it has none."""
        stats = self.stats(module)
        return 1.0 if stats is None else stats.energy(self._weight(module)) or 1.0

    def _loss(self, module: str, inputs: Change, outputs: Change, rows: Callable[[Tensor], Tensor]) -> float:
        """The mean over tokens of the squared error of a layer's outputs, changed as it is and then so, and encoded."""
        stats = self.stats(module)
        if stats is None:
            return 0.0
        weight, stats = rows(outputs.made(inputs.read(self._weight(module)).T).T), inputs.stats(stats)
        scheme, tensors = self._packed[module].scheme, self._encoded(module, weight, stats)
        if stats.sample is None:
            return stats.energy(scheme.decode(tensors).float() - weight)
        error = scheme.linear(stats.sample, tensors) - stats.sample @ weight.T
        return float(error.square().sum()) / len(error)

    def _candidates(self, fold: Fold, readers: list[str]) -> Iterator[Change]:
        if fold.kind == "rotation":
            yield rotation(fold)
            return
        weights = [some_rows(self._weight(module)) for module in readers]
        stats = self.stats(readers[0])
        assert stats is not None
        if fold.kind == "order":
            yield from self._orders(fold, weights, stats)
        elif stats.sample is not None:
            largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
            yield from (Change(scale=fold.channels(scale)) for scale in smooth.scales(stats.absmax, largest))
        elif stats.hessian is not None:
            mean = fold.inputs(Change(scale=fold.channels(stats.absmean))).scale
            assert mean is not None
            rounded = [self._rounded(module) for module in readers]
            yield Change(scale=fold.channels(awq.search(weights, rounded, stats, mean)))

    def _orders(self, fold: Fold, weights: list[Tensor], stats: Stats) -> Iterator[Change]:
        """Descending by what makes a block's largest value, or by what its errors cost."""
        squares = torch.stack([weight.square().sum(0) for weight in weights]).sum(0)
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        for key in (largest, squares, stats.second_moment, squares * stats.second_moment):
            largest_first, inside = fold.channels(key).view(-1, fold.run).sort(dim=1, descending=True, stable=True)
            order = inside + fold.run * torch.arange(len(inside))[:, None]
            yield Change(order=order.flatten())
            if fold.attending:  # heads of which the first channels are the largest, together
                yield Change(order=order[largest_first.sum(1).argsort(descending=True, stable=True)].flatten())

    def _weight(self, module: str) -> Tensor:
        """As it is now, (out_features, in_features) float32."""
        weight = read_weight(self._source, self._packed[module])
        return changed(weight, self._inputs.get(module), self._outputs.get(module)).float()

    def _encoded(self, module: str, weight: Tensor, stats: Stats | None) -> Tensors:
        packed = self._packed[module]
        return packed.scheme.encode(weight.to(self._source.specs[packed.source].dtype), stats)

    def _rounded(self, module: str) -> awq.Rounded:
        scheme = self._packed[module].scheme
        return lambda weight: scheme.decode(self._encoded(module, weight, None)).float()


def _all_rows(weight: Tensor) -> Tensor:
    return weight


def some_rows(weight: Tensor) -> Tensor:
    """Rows all over a weight, as many as it takes to tell what suits their columns."""
    return weight[:: max(1, len(weight) // ROWS)]
