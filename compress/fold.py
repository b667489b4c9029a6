"""fold: scales that move from one weight to the next without changing what a block computes.

A producer's output channels are divided by a scale, and the input channels of the linear layers that read it are
multiplied with the same. Producers are norms, found by watching which layers are given a norm's very output; and the
linear layers of which the output reaches another channel by channel: v_proj and o_proj, up_proj and down_proj. What is
found is not believed: each fold is tried with random scales, and kept only if the block then computes the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

# In models with a gate, the second reads the first times something that does not depend on it.
PAIRS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))
TOLERANCE = 1e-3  # of what the producer's scale does alone: float32's rounding, where the residual is not far larger


@dataclass(frozen=True)
class Fold:
    """producer, readers: paths of modules. heads: (heads that share a channel, channels of a head) of grouped-query
    attention, where each value head is read by several query heads. offset: a norm multiplies with weight + offset."""

    producer: str
    readers: tuple[str, ...]
    width: int  # channels that are scaled
    heads: tuple[int, int] = (1, 1)
    offset: float = 0.0

    def columns(self, scale: Tensor) -> Tensor:
        """(width,) to the readers' (in_features,)."""
        repeats, size = self.heads
        return scale.view(-1, size).repeat_interleave(repeats, 0).flatten()

    def channels(self, columns: Tensor) -> Tensor:
        """(in_features,) of the readers to (width,): the mean over the heads that share a channel."""
        repeats, size = self.heads
        return columns.view(-1, repeats, size).mean(1).flatten()


def find(model: nn.Module, block: str, head_dim: int | None, run: Callable[[], Tensor]) -> list[Fold]:
    """The folds of an open block. run: one pass through the block, which returns its output, float32."""
    expected = run()
    found: list[Fold] = []
    for fold in (*_norms(model, block, run), *_pairs(model, block, head_dim)):
        scale = torch.exp2(torch.rand(fold.width, generator=torch.Generator().manual_seed(0)) * 2 - 1)
        is_norm = _part(model, fold.producer).weight.dim() == 1
        tried = (fold, replace(fold, offset=1.0)) if is_norm else (fold,)
        fits = (candidate for candidate in tried if _change(model, candidate, scale, run, expected) < TOLERANCE)
        found += list(islice(fits, 1))
    return found


def _change(model: nn.Module, fold: Fold, scale: Tensor, run: Callable[[], Tensor], expected: Tensor) -> float:
    """What a fold changes of a block's output, as a part of what scaling the producer alone does."""
    with _applied(model, fold, scale):
        both = float((run() - expected).norm())
    with _applied(model, replace(fold, readers=()), scale):
        alone = float((run() - expected).norm())
    return both / alone if alone > 0 else math.inf


@contextmanager
def _applied(model: nn.Module, fold: Fold, scale: Tensor) -> Iterator[None]:
    """Parameters are replaced and not written to: theirs may be memory that is mapped from the checkpoint."""
    producer = _part(model, fold.producer)
    scale = scale.to(producer.weight.device, producer.weight.dtype)
    changed: list[tuple[nn.Module, str, Tensor]] = [(producer, "weight", _divided(producer.weight, scale, fold.offset))]
    for reader in (_part(model, path) for path in fold.readers):
        changed.append((reader, "weight", reader.weight * fold.columns(scale)))
    if producer._parameters.get("bias") is not None:
        changed.append((producer, "bias", producer.bias / scale))
    before = [(module, name, module._parameters[name]) for module, name, _ in changed]
    try:
        for module, name, tensor in changed:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _divided(weight: Tensor, scale: Tensor, offset: float = 0.0) -> Tensor:
    return (weight + offset) / scale - offset if weight.dim() == 1 else weight / scale[:, None]


def scaled(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
    """A linear weight whose input channels are multiplied, and whose output channels are divided, in its dtype."""
    if inputs is None and outputs is None:
        return weight
    whole = weight.float()
    whole = whole if inputs is None else whole * inputs
    return (whole if outputs is None else whole / outputs[:, None]).to(weight.dtype)


def unscaled(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
    """The inverse of `scaled`, in float32."""
    whole = weight.float() if inputs is None else weight.float() / inputs
    return whole if outputs is None else whole * outputs[:, None]


def folded_norm(weight: Tensor, scale: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """weight: (width,) of a norm. Returns what is stored in its place, in its dtype, and the scale that this really is,
    float32: 1 where the norm lets nothing through."""
    stored = _divided(weight.float(), scale, offset).to(weight.dtype)
    before, after = weight.float() + offset, stored.float() + offset
    usable = (before != 0) & (after != 0)
    return torch.where(usable, stored, weight), torch.where(usable, before / after, 1.0)


def _norms(model: nn.Module, block: str, run: Callable[[], Any]) -> list[Fold]:
    """Norms of which the output is, as it is, the input of linear layers."""
    outputs: list[tuple[weakref.ref[Tensor], str]] = []
    readers: dict[str, list[str]] = {}

    def produced(path: str) -> Callable[..., None]:
        return lambda _, __, output: outputs.append((weakref.ref(output), path))

    def read(path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            for producer in (producer for output, producer in outputs if output() is args[0]):
                readers.setdefault(producer, []).append(path)

        return note

    hooks = []
    for path, module in _modules(model, block):
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            hooks.append(module.register_forward_hook(produced(path)))
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(read(path)))
    run()
    for hook in hooks:
        hook.remove()
    return [
        Fold(producer, tuple(dict.fromkeys(paths)), len(_part(model, producer).weight))
        for producer, paths in readers.items()
    ]


def _pairs(model: nn.Module, block: str, head_dim: int | None) -> Iterator[Fold]:
    linears = {path: module for path, module in _modules(model, block) if isinstance(module, nn.Linear)}
    for first, second in PAIRS:
        for path, producer in linears.items():
            parent, _, leaf = path.rpartition(".")
            reader = linears.get(f"{parent}.{second}")
            if leaf != first or reader is None:
                continue
            width, read = producer.out_features, reader.in_features
            if width == read:
                yield Fold(path, (f"{parent}.{second}",), width)
            elif head_dim and read % width == 0 and width % head_dim == 0:
                yield Fold(path, (f"{parent}.{second}",), width, (read // width, head_dim))


def _part(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _modules(model: nn.Module, block: str) -> Iterable[tuple[str, nn.Module]]:
    return ((f"{block}.{path}", module) for path, module in model.get_submodule(block).named_modules() if path)
