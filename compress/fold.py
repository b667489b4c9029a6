"""fold: what moves from one weight to the next without changing what a block computes.

The output channels of a producer are divided by a scale, put in another order or rotated, and the input channels of the
linear layers that read it are changed so that nothing else changes. Norms are producers of scales, found by watching
which layers are given a norm's very output; linear layers are where their output reaches another channel by channel:
v_proj and o_proj, up_proj and down_proj. What might be a fold is tried with a random change, and is one only if the
block then computes the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from compress.change import Change

if TYPE_CHECKING:
    from compress.structure import Linear

Kind = Literal["scale", "order", "rotation"]
KINDS: tuple[Kind, ...] = ("scale", "order", "rotation")  # as they follow one another on the same channels

# Between these, attention adds up tokens and leaves channels alone.
HEADS = (("v_proj", "o_proj"), ("v_proj", "out_proj"), ("v", "o"))
# Layers of one parent that loaders such as vLLM run as one, which then has one scheme (its `packed_modules_mapping`).
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
TOLERANCE = 1e-3  # of what the producers' change does alone: float32's rounding, where the residual is not far larger


@dataclass(frozen=True)
class Fold:
    """producers, readers: paths of modules. kind: how their channels may change. heads: (heads that share a channel,
    channels of a head) of grouped-query attention, where each value head is read by several query heads; channels only
    change places inside a head. attending: the keys and queries of these heads, which may then change places as well.
    offset: a norm multiplies with weight + offset."""

    producers: tuple[str, ...]
    readers: tuple[str, ...]
    width: int  # channels that are changed
    kind: Kind = "scale"
    heads: tuple[int, int] | None = None
    attending: tuple[str, ...] = ()
    offset: float = 0.0

    def outputs(self, change: Change) -> dict[str, Change]:
        """What a change of the (width,) channels is to the outputs of each module that makes something of them."""
        made = dict.fromkeys(self.producers, change)
        if self.heads and self.attending:
            repeats, size = self.heads
            heads = change.of_heads(size)
            made |= zip(self.attending, (heads, heads.repeated(repeats, size)), strict=True) if heads.tensors else ()
        return made

    def inputs(self, change: Change) -> Change:
        """What a change of the (width,) channels is to the readers' in_features."""
        return change if self.heads is None else change.repeated(*self.heads)

    def channels(self, columns: Tensor) -> Tensor:
        """(in_features,) of the readers to (width,): the mean over the heads that share a channel."""
        return columns if self.heads is None else columns.view(-1, *self.heads).mean(1).flatten()

    @property
    def run(self) -> int:
        """So many neighbours may change places."""
        return self.width if self.heads is None else self.heads[1]


def fused(linear: Linear) -> str:
    """The same name for all that loaders run as one layer: those of FUSED, and the experts of a layer."""
    parent, _, leaf = linear.path.rpartition(".")
    if linear.expert is not None:
        return parent
    names = next((names for names in FUSED if leaf in names), (leaf,))
    return f"{parent}.{'+'.join(names)}"


def find(
    model: nn.Module, block: str, head_dim: int | None, kinds: Collection[Kind], run: Callable[[], Tensor]
) -> list[Fold]:
    """The folds of an open block, scales first. run: one pass through the block, which returns its output, float32."""
    expected = run()
    found: list[Fold] = []
    norms = _norms(model, block, run) if "scale" in kinds else ()
    for fold in (*norms, *(fold for fold in _between(model, block, head_dim) if fold.kind in kinds)):
        tried = [fold]
        if is_norm(model, fold):
            tried.append(replace(fold, offset=1.0))
        elif fold.attending:
            tried.append(replace(fold, attending=()))
        fits = (
            candidate
            for candidate in tried
            if _difference(model, candidate, _random(candidate), run, expected) < TOLERANCE
        )
        found += list(islice(fits, 1))
    return sorted(found, key=lambda fold: KINDS.index(fold.kind))


def is_norm(model: nn.Module, fold: Fold) -> bool:
    """Whether the producer is a norm, and no linear layer."""
    return bool(_part(model, fold.producers[0]).weight.dim() == 1)


def _random(fold: Fold) -> Change:
    generator = torch.Generator().manual_seed(0)
    if fold.kind == "scale":
        return Change(scale=torch.exp2(torch.rand(fold.width, generator=generator) * 2 - 1))
    if fold.kind == "rotation":
        return rotation(fold)
    inside = torch.stack([_moved(fold.run, generator) for _ in range(fold.width // fold.run)])
    heads = torch.arange(len(inside)).roll(1 if fold.attending else 0)  # every head changes its place
    return Change(order=(inside + fold.run * heads[:, None]).flatten())


def _moved(count: int, generator: torch.Generator) -> Tensor:
    """A random order of `count` things that is not the one they are in."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def rotation(fold: Fold) -> Change:
    """By the largest Hadamard matrix of Sylvester's that divides what may be mixed."""
    return Change(rotation=torch.tensor([fold.run & -fold.run]))


def check(model: nn.Module, fold: Fold, change: Change, run: Callable[[], Tensor]) -> None:
    """Raises ValueError where a block, run in float32, computes something else with this change. run: as of `find`."""
    expected = run()
    with _applied(model, fold, change):
        if torch.equal(run(), expected):
            return
    difference = _difference(model, fold, change, run, expected)
    if not difference < TOLERANCE:
        raise ValueError(
            f"{', '.join(fold.readers)}: with the {fold.kind} of its channels changed, the block computes something "
            f"else (by {difference:.2g} of what half the change does); leave such changes out, and report this model"
        )


def _difference(model: nn.Module, fold: Fold, change: Change, run: Callable[[], Tensor], expected: Tensor) -> float:
    """What a fold changes of a block's output, as a part of what changing the producers alone does."""
    with _applied(model, fold, change):
        both = float((run() - expected).norm())
    with _applied(model, replace(fold, readers=(), attending=()), change):
        alone = float((run() - expected).norm())
    return both / alone if alone > 0 else math.inf


@contextmanager
def _applied(model: nn.Module, fold: Fold, change: Change) -> Iterator[None]:
    """Parameters are replaced and not written to: theirs may be memory that is mapped from the checkpoint."""
    changed: list[tuple[nn.Module, str, Tensor]] = []
    for producer, made in ((_part(model, path), made.made) for path, made in fold.outputs(change).items()):
        if producer.weight.dim() == 1:
            changed.append((producer, "weight", made(producer.weight + fold.offset) - fold.offset))
        else:
            changed.append((producer, "weight", made(producer.weight.T).T))
        if producer._parameters.get("bias") is not None:
            changed.append((producer, "bias", made(producer.bias)))
    for reader in (_part(model, path) for path in fold.readers):
        changed.append((reader, "weight", fold.inputs(change).read(reader.weight)))
    before = [(module, name, module._parameters[name]) for module, name, _ in changed]
    try:
        for module, name, tensor in changed:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def folded_norm(weight: Tensor, scale: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """weight: (width,) of a norm. Returns what is stored in its place, in its dtype, and the scale that this really is,
    float32: 1 where the norm lets nothing through."""
    stored = ((weight.float() + offset) / scale - offset).to(weight.dtype)
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
        Fold((producer,), tuple(dict.fromkeys(paths)), len(_part(model, producer).weight))
        for producer, paths in readers.items()
    ]


def _between(model: nn.Module, block: str, head_dim: int | None) -> Iterator[Fold]:
    """What might change between linear layers of the same parent: in attention inside value heads, elsewhere wherever
    as many channels come out of one as go into the other."""
    linears = {path: module for path, module in _modules(model, block) if isinstance(module, nn.Linear)}
    for path, reader in linears.items():
        parent, _, leaf = path.rpartition(".")
        siblings = {name.rpartition(".")[2]: m for name, m in linears.items() if name.rpartition(".")[0] == parent}
        values = [first for first, second in HEADS if leaf == second and first in siblings]
        if values and head_dim:
            width, read = siblings[values[0]].out_features, reader.in_features
            if width % head_dim == 0 and read % width == 0:
                fold = Fold((f"{parent}.{values[0]}",), (path,), width, heads=(read // width, head_dim))
                attending = [values[0].replace("v", other) for other in "kq"]
                whole = [siblings[n].out_features for n in attending if n in siblings] == [width, read]
                for kind in KINDS:
                    paths = tuple(f"{parent}.{n}" for n in attending) if kind == "order" and whole else ()
                    yield replace(fold, kind=kind, attending=paths)
            continue
        makers = [f"{parent}.{n}" for n, m in siblings.items() if m.out_features == reader.in_features and n != leaf]
        for maker in makers:
            yield Fold((maker,), (path,), reader.in_features)
        if makers:
            yield Fold(tuple(makers), (path,), reader.in_features, "order")


def _part(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _modules(model: nn.Module, block: str) -> Iterable[tuple[str, nn.Module]]:
    return ((f"{block}.{path}", module) for path, module in model.get_submodule(block).named_modules() if path)
