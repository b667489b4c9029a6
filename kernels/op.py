"""Operators of torch for what it cannot look into, compiled loops and Triton: torch.compile takes them as they are.

A layout is a frozen dataclass of tensors and plain values, and two functions on it. `Layout` registers them as
`compress::NAME_decode` and `compress::NAME_linear`, with fake implementations and a gradient of x; the functions choose
by device, and without torch.compile they are called as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from compress.kernels.prepared import Prepared


class Layout:
    """The operators of weights of one kind, which has a `shape` and a `dtype`.

    decode(weight) returns what they stand for, linear(x, weight, bias) x @ W.T + bias: by default of what is decoded.
    """

    def __init__(
        self, name: str, kind: Any, decode: Callable[[Any], Tensor], linear: Callable[..., Tensor] | None = None
    ) -> None:
        self.name, self.kind, self.decode = name, kind, decode
        self.linear = linear or self._of_decoded
        operator: Any = partial(torch.library.custom_op, mutates_args=())
        self.decode_op = operator(f"compress::{name}_decode", self._decode, schema=_DECODE)
        self.decode_op.register_fake(self._fake_decode)
        self.linear_op = operator(f"compress::{name}_linear", self._linear, schema=_LINEAR)
        self.linear_op.register_fake(self._fake_linear)
        self.linear_op.register_autograd(self._backward, setup_context=_keep)
        self._running: WeakValueDictionary[Any, Any] = WeakValueDictionary()  # weights, by where their parts lie

    def __call__(self, *values: Any, **named: Any) -> Packed:
        """The weight of these fields, prepared."""
        return Packed(self, self.kind(*values, **named))

    def build(self, parts: Sequence[Tensor], rest: str) -> Any:
        """The weight of a `Packed`'s parts and rest."""
        known, tensors = _read(rest), iter(parts)
        values: dict[str, Any] = dict(known["values"])
        for name, count in known["tensors"].items():
            values[name] = next(tensors) if count is None else tuple(next(tensors) for _ in range(count))
        return self.kind(**values)

    def runs(self, weight: Any, parts: Sequence[Tensor], rest: str) -> None:
        """Operators that are given these parts on a CPU take this weight, with what was made of it."""
        if all(part.device.type == "cpu" and type(part) in (Tensor, Parameter) for part in parts):
            self._running[_places(parts, rest)] = weight

    def _known(self, parts: Sequence[Tensor], rest: str) -> Any:
        weight = self._running.get(_places(parts, rest))
        return self.build(parts, rest) if weight is None else weight

    def _of_decoded(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.decode(weight).to(x.dtype), bias)

    def _decode(self, parts: Sequence[Tensor], rest: str) -> Tensor:
        return self.decode(self._known(parts, rest))

    def _linear(self, x: Tensor, parts: Sequence[Tensor], rest: str, bias: Tensor | None) -> Tensor:
        return self.linear(x, self._known(parts, rest), bias)

    def _fake_decode(self, parts: Sequence[Tensor], rest: str) -> Tensor:
        weight = self.build(parts, rest)
        return parts[0].new_empty(weight.shape, dtype=weight.dtype)

    def _fake_linear(self, x: Tensor, parts: Sequence[Tensor], rest: str, bias: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:-1], self.build(parts, rest).shape[0])

    def _backward(self, context: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight = self.decode_op(context.parts, context.rest).to(gradient.dtype)
        bias = gradient.flatten(0, -2).sum(0) if context.has_bias else None
        return gradient @ weight, [None] * len(context.parts), None, bias


_DECODE = "(Tensor[] parts, str rest) -> Tensor"
_LINEAR = "(Tensor x, Tensor[] parts, str rest, Tensor? bias) -> Tensor"


class Packed(Prepared):
    """A weight of a layout; its fields once more as operators take them: tensors, and the rest as text."""

    def __init__(self, layout: Layout, weight: Any) -> None:
        self.layout, self.weight = layout, weight
        self.parts: list[Tensor] = []
        self.rest = self._flatten()
        layout.runs(weight, self.parts, self.rest)

    def _flatten(self) -> str:
        tensors: dict[str, int | None] = {}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self.weight):
            value = getattr(self.weight, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = None
                self.parts.append(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                tensors[field.name] = len(value)
                self.parts.extend(value)
            else:
                values[field.name] = str(value) if isinstance(value, torch.dtype) else value
        return json.dumps({"tensors": tensors, "values": values})

    def decode(self) -> Tensor:
        if torch.compiler.is_compiling():
            found: Tensor = self.layout.decode_op(self.parts, self.rest)
            return found
        return self.layout.decode(self.weight)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            y: Tensor = self.layout.linear_op(x, self.parts, self.rest, bias)
            return y
        return self.layout.linear(x, self.weight, bias)


def _places(parts: Sequence[Tensor], rest: str) -> tuple[Any, ...]:
    return (rest, *((part.data_ptr(), part.shape, part.stride(), part.dtype) for part in parts))


@cache
def _read(rest: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(rest)
    for name, value in known["values"].items():
        if isinstance(value, str) and value.startswith("torch."):
            known["values"][name] = getattr(torch, value.removeprefix("torch."))
        if isinstance(value, list):
            known["values"][name] = tuple(value)
    return known


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.parts, ctx.rest, bias = inputs
    ctx.has_bias = bias is not None
