"""The gradient of the loss, which goes back through a model one block at a time.

On the way forwards every block leaves what it gave in files; on the way back each is run again, and takes its weights
and what came before it the gradient of what it gave. That is whatever the model's own pass makes of what blocks gave:
so nothing has to be known of an architecture here either. In memory are one block and its gradients, for one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.blocks import Blocks
from compress.formats.files import replacing
from compress.hollow import OUTSIDE
from compress.source import Source
from compress.structure import Linear


class Backwards(Blocks):
    """Blocks that keep what they gave. Step n of the way back is that of block n, and the one before it the head's.

    The loss of a sample is the mean cross-entropy of next tokens, as the model says them (`said`).
    """

    def __init__(
        self, source: Source, linears: Mapping[str, Linear], samples: Tensor, folder: Path, device: str = "cpu"
    ) -> None:
        super().__init__(source, linears, samples, folder, device)
        self._batches = samples.split(1)
        self._order: list[str] = []

    @property
    def order(self) -> list[str]:
        """The blocks that were left; and last what is OUTSIDE, where the way back begins."""
        return [*self._order, OUTSIDE]

    def leave(self, blocks: Iterable[str]) -> None:
        for block in blocks:
            self._leave(block)
            self._order.append(block)

    def ready(self, step: int | None = None) -> bool:
        """Whether what the blocks gave is all there, and the gradients that `step` left."""
        numbers = range(len(self._batches))
        files = [self._file(block, batch) for block in self._order[:step] for batch in numbers]
        files += [self._gradients(step, batch) for batch in numbers if step]
        return all(file.exists() and file.stat().st_size for file in files)

    def gradients(self, step: int) -> Iterator[dict[str, tuple[Tensor, float]]]:
        """Takes a step back. Of each sample: the gradients of the weights (out_features, in_features) of the block, or
        of the head, by module, and the derivative when the weight as a whole is scaled; none where the loss does not
        depend on one. Raises ValueError where there is no way."""
        block, self._differentiated, self._batch = self.order[step], True, -1
        self.open(block)
        if block == OUTSIDE:
            self._open_head()
        self._last = {}
        for earlier in self._order[:step]:
            self._leave(earlier)
        places = {module: self._places[module] for module in self.linears(block)}
        places = {module: place for module, place in places.items() if block != OUTSIDE or place is self._head}
        weights = [self._weight(module).requires_grad_() for module in places]
        for batch in range(len(self._batches)):
            found = zip(places, weights, self._back(step, batch, weights), strict=True)
            yield {m: (self._upright(m, g), float((g * w.detach()).sum())) for m, w, g in found if g is not None}
        if block != OUTSIDE:
            self.drop(block)

    def forget(self, step: int) -> None:
        """The gradients that a step left for the next one, when that is done."""
        for batch in range(len(self._batches)):
            self._gradients(step, batch).unlink(missing_ok=True)

    def _back(self, step: int, batch: int, weights: list[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of weights of a block; those of what other blocks gave are kept for their turn."""
        kept: list[Any] = []
        self._run(batch, self.order[step], kept)
        known: dict[str, list[Tensor | None]] = {}
        ends: list[tuple[Tensor, Tensor | None]]
        if step == len(self._order):
            logits = kept[0][:, :-1].flatten(0, 1).float()
            ends = [(F.cross_entropy(logits, said(logits, batch)), None)]
        else:
            known = torch.load(self._gradients(step + 1, batch), map_location=self.device, weights_only=True)
            given = known.pop(self.order[step], [])
            ends = [(y, g) for y, g in zip(_tensors(kept[0]), given, strict=False) if g is not None and y.requires_grad]
        leaves = {block: _tensors(output) for block, output in self._outputs.items()}
        inputs = [leaf for block in leaves.values() for leaf in block]
        found = self._grad(self.order[step], ends, [*inputs, *weights])
        rest = iter(found)
        for block, parts in leaves.items():
            old = known.get(block) or [None] * len(parts)
            known[block] = [_sum(a, next(rest)) for a in old]
        with replacing(self._gradients(step, batch)) as unfinished:
            torch.save(known, unfinished)
        return found[len(inputs) :]

    def _grad(
        self, block: str, ends: list[tuple[Tensor, Tensor | None]], inputs: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        if not ends or not inputs:
            return (None,) * len(inputs)
        outputs, given = zip(*ends, strict=True)
        try:
            return torch.autograd.grad(outputs, inputs, given, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(
                f"{block or 'the head'}: no gradient can be taken through it ({error}); leave out sensitivity=fisher "
                "or --target-size"
            ) from error

    def _output(self, block: str) -> Any:
        """As a copy, which the model may change; the gradient is that of what is copied."""
        if block in self._outputs or not self._differentiated:
            return _copied(super()._output(block))
        for leaf in _tensors(super()._output(block)):
            leaf.requires_grad_()
        return _copied(self._outputs[block])

    def _gradients(self, step: int | None, batch: int) -> Path:
        return self._folder / f"gradients.{step}.{batch:05d}.pt"


def said(logits: Tensor, seed: int) -> Tensor:
    """(n,) int64: tokens drawn from what (n, vocabulary) logits predict; of NaN any, so that the loss is NaN."""
    logits = logits.detach()
    waits = torch.empty_like(logits).exponential_(generator=torch.Generator(logits.device).manual_seed(seed))
    return logits.softmax(-1).div_(waits).argmax(-1)  # the first of events that come at these rates


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in what a block gave."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []


def _copied(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_copied(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a + b if a is not None and b is not None else (b if a is None else a)
