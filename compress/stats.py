"""Stats: what calibration measured at the input of one linear layer, and how it adds up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Of x, the (tokens, in_features) inputs that a linear layer saw. All float32, on the CPU but for the Hessian,
    which lies where the model ran."""

    tokens: int
    second_moment: Tensor  # (in_features,): mean of x**2
    absmean: Tensor  # (in_features,): mean of |x|
    absmax: Tensor  # (in_features,): largest |x|
    hessian: Tensor | None = None  # (in_features, in_features): mean of x x^T

    def scaled(self, scale: Tensor) -> Stats:
        """Those of x * scale. scale: (in_features,), positive."""
        scale = scale.float()
        return Stats(
            self.tokens,
            self.second_moment * scale**2,
            self.absmean * scale,
            self.absmax * scale,
            None if self.hessian is None else self.hessian * torch.outer(scale, scale).to(self.hessian.device),
        )


class Accumulator:
    """Adds up the inputs of a layer batch by batch, on their device; never holds more than sums."""

    def __init__(self, hessian: bool) -> None:
        self._with_hessian = hessian
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        """x: (..., in_features)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self._tokens += len(x)
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
        return Stats(self._tokens, square / self._tokens, magnitude / self._tokens, most, hessian)
