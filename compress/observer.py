"""Adding up what layers are given while a model runs."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from compress.stats import Accumulator, Stats


class Observer:
    """Adds up the inputs of layers; layers that are given the same tensor, and want the same of it, share the sums."""

    def __init__(self) -> None:
        self._sums: dict[str, Accumulator] = {}
        self._leaders: dict[str, str] = {}  # module -> the one that adds up for it
        self._stats: dict[str, Stats | None] = {}
        self._missing: dict[str, tuple[int, Tensor]] = {}
        self._inputs: list[tuple[weakref.ref[Tensor], str, tuple[bool, bool]]] = []  # of this pass

    def add(self, module: str, x: Tensor, wanted: tuple[bool, bool]) -> None:
        """wanted: a Hessian, a sample."""
        leaders = [leader for seen, leader, its in self._inputs if seen() is x and its == wanted]
        leader = self._leaders.setdefault(module, leaders[0] if leaders else module)
        if leader == module:
            self._sums.setdefault(module, Accumulator(*wanted)).add(x)
            self._inputs.append((weakref.ref(x), module, wanted))
        elif leader not in leaders:
            raise RuntimeError(f"{module}: its input is that of {leader} in one pass and not in another")

    def compare(self, module: str, x: Tensor, y: Tensor, original: Tensor) -> None:
        """x: (..., in_features). y, original: (..., out_features)."""
        x, difference = (part.reshape(-1, part.shape[-1]).float() for part in (x, original - y))
        tokens, missing = self._missing.get(module, (0, torch.zeros(())))
        self._missing[module] = (tokens + len(x), missing.to(x) + difference.T @ x)

    def end_pass(self) -> None:
        self._inputs.clear()

    def stats(self, module: str) -> Stats | None:
        """What was measured; and what was missing, where it was compared on all tokens."""
        leader = self._leaders.get(module)
        if leader is not None and leader not in self._stats:
            self._stats[leader] = self._sums.pop(leader).stats()
        stats = None if leader is None else self._stats[leader]
        tokens, missing = self._missing.pop(module, (0, torch.zeros(())))
        return replace(stats, missing=missing / tokens) if stats is not None and tokens == stats.tokens else stats
