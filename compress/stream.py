"""stream: one order for the channels of the residual stream, through a whole model.

Embeddings, norms and every linear layer that reads the stream or adds to it are put in the same order, so that the
model computes what it did. Where the channels lie in each tensor follows from shapes; it is tried before it is used:
blocks in a random order, given inputs in that order, must give their outputs in it.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.blocks import Blocks
from compress.folding import some_rows
from compress.hollow import OUTSIDE
from compress.pipeline import read_weight
from compress.planning import Packed, Plan
from compress.source import Source
from compress.stats import Stats
from compress.structure import Linear, Structure

if TYPE_CHECKING:
    from compress.statistics import Statistics

# Layers that add to the stream, where shapes do not tell: as many features go into them as come out.
WRITERS = ("o_proj", "out_proj", "o", "wo", "dense", "c_proj", "down_proj", "fc2", "w2", "dense_4h_to_h", "fc_out")
HEAD_NORMS = ("q_norm", "k_norm")  # of queries and keys, never of the stream
TOKENS = 2048  # that are run to try an order and to measure what it does
TOLERANCE = 1e-4  # of the norm of an output: float32's rounding, in another order of additions
KEY = "stream"  # of compress.json


@dataclass(frozen=True)
class Stream:
    """axes: the axis of each stored tensor along which the stream's channels lie. order: (channels,) which channel
    comes to each place. gains: by module that reads it, the part of its squared error that this saves."""

    axes: dict[str, int]
    order: list[int]
    gains: dict[str, float] = field(default_factory=dict)

    def note(self, module: str, other: str | None) -> str | None:
        """What the report says of a module, beside `other`."""
        gain = self.gains.get(module)
        said = [f"residual stream reordered: squared error down by {gain:.1%}"] if gain is not None else []
        return "; ".join([*said, *([other] if other else [])]) or None

    def to_dict(self) -> dict[str, Any]:
        order = torch.tensor(self.order, dtype=torch.int32).numpy().tobytes()
        return {**asdict(self), "order": b64encode(order).decode()}

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Stream:
        order = torch.frombuffer(bytearray(b64decode(described["order"])), dtype=torch.int32)
        return cls(described["axes"], order.tolist(), described["gains"])


class Reordered(Source):
    """A source whose tensors are read with the channels of the stream in another order."""

    def __init__(self, source: Source, axes: Mapping[str, int], order: Iterable[int]) -> None:
        vars(self).update(vars(source))
        self._axes, self._order = axes, torch.tensor(list(order))

    def read(self, name: str, index: int | None = None) -> Tensor:
        tensor = super().read(name, index)
        if name not in self._axes:
            return tensor
        return tensor.index_select(self._axes[name] - (index is not None), self._order)

    def identity(self) -> list[list[object]]:
        return [*super().identity(), self._order.tolist()]

    def is_packed(self, name: str) -> bool:
        return name in self._axes or super().is_packed(name)


def restored(source: Source, document: Mapping[str, Any]) -> Source:
    """A compressed directory with the stream's channels in their first order. document: its compress.json."""
    if KEY not in document:
        return source
    stream = Stream.from_dict(document[KEY])
    return Reordered(source, stream.axes, torch.tensor(stream.order).argsort().tolist())


def choose(
    source: Source, plan: Plan, structure: Structure, text: Tensor | Statistics, folder: Path, device: str
) -> Stream | str:
    """The order with the least squared error that makes no layer's larger; or why the channels stay where they are.

    text: (n, length) int64 tokens, of which the first 2048 are run, or what was measured on some. folder: for
    activations. Errors are those of weights that are encoded without compensation, weighted with the mean squares of
    their inputs.
    """
    width = _width(structure)
    axes = find(structure, source, width)
    planned = {module: packed for module, packed in plan.modules.items() if packed.source in axes}
    if not all("order" in packed.scheme.folds for packed in planned.values()):
        return "a scheme that does not reorder has a part in it"
    reading = {m: structure.linears[m] for m, side in sides(structure, source).items() if side == 1 and m in planned}
    if not reading:
        return "no layer that reads it is compressed"
    if isinstance(text, Tensor):
        measured = _measured(source, axes, width, reading, _few(text), folder, device)
    else:
        measured = {module: text.stats(module, ()) for module in reading} if text.follows else None
    if measured is None:
        return "tried in another order, this model computes something else"
    layers = {m: _Layer(source, planned[m], stats) for m, stats in measured.items() if stats is not None}
    if not layers:
        return "the calibration text reaches none of its layers"
    before = {module: layer.loss(torch.arange(width)) for module, layer in layers.items()}
    best, gains = None, dict.fromkeys(layers, 0.0)
    for order in _orders(list(layers.values()), width):
        gained = {m: _gain(loss, layers[m].loss(order)) for m, loss in before.items()}
        if min(gained.values()) >= 0 and sum(gained.values()) > sum(gains.values()):
            best, gains = order, gained
    return (
        "every order that was tried makes the error of a layer larger"
        if best is None
        else Stream(axes, best.tolist(), gains)
    )


def follows(source: Source, structure: Structure, text: Tensor, folder: Path, device: str) -> bool:
    """Whether the model computes the same with its stream in another order. Arguments as of `choose`."""
    width = _width(structure)
    axes = find(structure, source, width)
    return bool(axes) and _measured(source, axes, width, {}, _few(text), folder, device) is not None


def sides(structure: Structure, source: Source) -> dict[str, int]:
    """Along which axis of its weight (out_features, in_features) a linear layer has the stream's channels."""
    width = _width(structure)
    found = {module: _side(linear, source, width) for module, linear in structure.linears.items()}
    return {module: side for module, side in found.items() if side is not None}


def _width(structure: Structure) -> int:
    width: int = structure.model.config.get_text_config().hidden_size
    return width


def _few(text: Tensor) -> Tensor:
    return text[: max(1, TOKENS // text.shape[1])]


def _gain(before: float, after: float) -> float:
    """The part of an error that is saved; negative where it grows."""
    return 1 - after / before if before else -after


def find(structure: Structure, source: Source, width: int) -> dict[str, int]:
    """Where `width` channels of the stream lie, as far as shapes and names tell: stored tensor -> axis."""
    linears = {linear.source: linear for linear in structure.linears.values()}
    axes: dict[str, int] = {}
    for name, spec in source.specs.items():
        linear = linears.get(name) or linears.get(f"{name.removesuffix('bias')}weight")
        path = structure.target(name)[0].rpartition(".")[0]
        if name in structure.left_out or width not in spec.shape:
            continue
        if linear is not None:
            side = _side(linear, source, width)
            if name == linear.source and side is not None:
                axes[name] = (linear.index is not None) + (side ^ linear.transposed)
            elif name != linear.source and side == 0:
                axes[name] = 0
        elif spec.shape[-1] == width and path.rpartition(".")[2] not in HEAD_NORMS:
            axes[name] = len(spec.shape) - 1
    return axes


def _side(linear: Linear, source: Source, width: int) -> int | None:
    """1 for a layer that reads the stream, 0 for one that adds to it: the axis of its (out_features, in_features)."""
    shape = source.specs[linear.source].shape[-2:]
    sides = [axis for axis, size in enumerate(reversed(shape) if linear.transposed else shape) if size == width]
    if len(sides) < 2:
        return sides[0] if sides else None
    return 0 if re.sub(r"\.\d+$|\.weight$", "", linear.path).rpartition(".")[2] in WRITERS else 1


def _measured(
    source: Source,
    axes: Mapping[str, int],
    width: int,
    linears: Mapping[str, Linear],
    samples: Tensor,
    folder: Path,
    device: str,
) -> dict[str, Stats | None] | None:
    """The inputs of layers; None where blocks whose channels are in a random order do not give what they should."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    plain = Blocks(source, linears, samples, folder / "in order", device)
    other = Blocks(Reordered(source, axes, order.tolist()), {}, samples, folder / "in another", device)
    found: dict[str, Stats | None] = {}
    while (block := plain.next()) is not None:
        for model in (plain, other):
            model.open(block)
        found |= plain.measure(block) if plain.linears(block) else {}
        expected, got = plain.output(block), other.output(block)
        if expected.shape[-1] != width or _differ(expected[..., order.to(expected.device)], got):
            return None
        for model in (plain, other):
            model.close(block)
            model.leave([block])
    if any(_differ(a, b) for a, b in zip(plain.logits(), other.logits(), strict=True)):
        return None
    return found | (plain.measure(OUTSIDE) if plain.linears(OUTSIDE) else {})


def _differ(expected: Tensor, got: Tensor) -> bool:
    return not bool((got - expected).norm() <= TOLERANCE * expected.norm())


@dataclass(frozen=True)
class _Layer:
    source: Source
    packed: Packed
    stats: Stats

    def weight(self) -> Tensor:
        """Rows from all over it, as stored."""
        return some_rows(read_weight(self.source, self.packed))

    def loss(self, order: Tensor) -> float:
        """The mean over tokens of the squared error of those outputs, with the channels in this order."""
        weight, stats, scheme = self.weight()[:, order].contiguous(), self.stats.ordered(order), self.packed.scheme
        return stats.energy(scheme.decode(scheme.encode(weight, stats)).float() - weight.float())


def _orders(layers: list[_Layer], width: int) -> Iterator[Tensor]:
    """Descending by what makes a block's largest value, or by what its errors cost, over all layers alike."""
    keys = torch.zeros(4, width)
    for layer in layers:
        weight, moment = layer.weight().float(), layer.stats.second_moment
        squares = weight.square().sum(0)
        found = torch.stack([weight.abs().amax(0), squares, moment, squares * moment])
        keys += found / found.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    yield from keys.argsort(dim=1, descending=True, stable=True)
