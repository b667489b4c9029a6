"""Stats: what calibration measured at the input of one linear layer, and how it adds up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ROWS = 512  # of inputs that a sample has at most


@dataclass(frozen=True)
class Stats:
    """Of x, the (tokens, in_features) inputs that a linear layer saw. All float32, on the CPU but for the matrices,
    which lie where the model ran."""

    tokens: int
    second_moment: Tensor  # (in_features,): mean of x**2
    absmean: Tensor  # (in_features,): mean of |x|
    absmax: Tensor  # (in_features,): largest |x|
    hessian: Tensor | None = None  # (in_features, in_features): mean of x x^T
    # (out_features, in_features): mean of (o - y) x^T, where y came of x and its weight as it was, and o is what the
    # original model has in the place of y
    missing: Tensor | None = None
    sample: Tensor | None = None  # (some tokens, in_features): x itself, from all over the text
    # (out_features, in_features), on the CPU: the mean over samples of the squared gradient of their loss (`fisher.py`)
    fisher: Tensor | None = None

    def energy(self, weight: Tensor) -> float:
        """The mean over tokens of |x @ weight.T|**2; without a Hessian as if the channels were independent.

        weight: (out_features, in_features) float32.
        """
        if self.hessian is None:
            return float((weight.square() @ self.second_moment).sum())
        weight = weight.to(self.hessian.device)
        return float(((weight @ self.hessian) * weight).sum())

    def scaled(self, scale: Tensor) -> Stats:
        """Those of x * scale. scale: (in_features,), positive."""
        scale = scale.float()
        vectors = (self.second_moment * scale**2, self.absmean * scale, self.absmax * scale)
        return self._changed(vectors, lambda x: x * scale.to(x.device))

    def ordered(self, order: Tensor) -> Stats:
        """Those of x[order]. order: (in_features,) int64."""
        vectors = (self.second_moment[order], self.absmean[order], self.absmax[order])
        return self._changed(vectors, lambda x: x[..., order.to(x.device)])

    def rotated(self, rotation: Tensor) -> Stats:
        """Those of x, each run of neighbours multiplied with the (size, size) orthogonal `rotation`.

        Second moments are those of the Hessian, or without one as if channels were independent. The mean size is that
        of a normal distribution; of the largest, it is the most that can be.
        """
        size = len(rotation)
        moment = (self.second_moment.view(-1, size) @ rotation**2).flatten()
        most = (self.absmax.view(-1, size) @ rotation.abs()).flatten()
        turned = self._changed(
            (moment, moment, most), lambda x: (x.unflatten(-1, (-1, size)) @ rotation.to(x)).flatten(-2)
        )
        if turned.hessian is not None:
            moment = turned.hessian.diagonal().clamp(min=0).cpu()
        return replace(turned, second_moment=moment, absmean=(moment * 2 / math.pi).sqrt())

    def _changed(self, vectors: tuple[Tensor, Tensor, Tensor], change: Callable[[Tensor], Tensor]) -> Stats:
        """vectors: the second moment, absmean and absmax. change: does to the last axis what is done to x."""
        hessian, sample, missing = self.hessian, self.sample, self.missing
        if hessian is not None:
            hessian = change(change(hessian).T.contiguous())
        sample, missing = (None if part is None else change(part) for part in (sample, missing))
        return Stats(self.tokens, *vectors, hessian, missing, sample)


class Accumulator:
    """Adds up the inputs of a layer batch by batch, on their device; never holds more than sums and a sample."""

    def __init__(self, hessian: bool, sample: bool = False) -> None:
        self._with_hessian = hessian
        self._sample = _Sample() if sample else None
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        """x: (..., in_features)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self._tokens += len(x)
        if self._sample is not None:
            self._sample.add(x)
        magnitude = x.abs()
        found: dict[str, Any] = {"square": x.square().sum(0), "abs": magnitude.sum(0), "max": magnitude.amax(0)}
        if self._with_hessian:
            found["hessian"] = x.T @ x
        for name, value in found.items():
            if name not in self._sums:
                self._sums[name] = value
            elif name == "max":
                torch.maximum(self._sums[name], value, out=self._sums[name])
            else:
                self._sums[name] += value

    def stats(self) -> Stats | None:
        """None where no token came this way. To be called once: the sums become what is returned."""
        if not self._tokens:
            return None
        square, magnitude, most = (self._sums[name].cpu() for name in ("square", "abs", "max"))
        hessian = self._sums["hessian"].div_(self._tokens) if self._with_hessian else None
        sample = None if self._sample is None else self._sample.rows()
        return Stats(self._tokens, square / self._tokens, magnitude / self._tokens, most, hessian, sample=sample)


class _Sample:
    """Every 2**k-th row of what is added, with k as large as keeps them few."""

    def __init__(self) -> None:
        self._step, self._seen = 1, 0
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self._parts.append(x[-self._seen % self._step :: self._step].to("cpu", copy=True))
        self._seen += len(x)
        while sum(map(len, self._parts)) > ROWS:
            self._parts, self._step = [self.rows()[::2].clone()], 2 * self._step

    def rows(self) -> Tensor:
        return torch.cat(self._parts)
