"""Which way a packed weight on the CPU is multiplied with: as it is stored, or decoded and then by torch.

A compiled product reads a weight once for a few tokens, and never writes it out; for many tokens torch may be faster by
more than decoding takes. From how many on is measured when that is first asked for, once for each machine and layout
(`measured.py`). COMPRESS_CPU_PATH=fused or dense chooses without measuring.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels import cpu_integers, measured

FEW = 4  # tokens, for which reading a weight is what takes time: a decoded one is larger, and is written and read
LEAST = 1 << 16  # weights: of fewer, calling a compiled product takes longer than it


@dataclass(frozen=True)
class Product:
    """x @ W.T without a decoded W. layout: a name for what takes the same time for each weight.

    run: (tokens, columns) bf16, fp16 or fp32 -> (tokens, rows) float32, or None where x is not finite.
    """

    layout: str
    shape: tuple[int, int]
    run: Callable[[Tensor], Tensor | None]

    def linear(self, x: Tensor, bias: Tensor | None, decode: Callable[[], Tensor]) -> Tensor | None:
        """(..., columns) -> (..., rows) in x's dtype; None where a decoded weight is better. decode: makes it."""
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat) or not self._is_faster(len(flat), decode):
            return None
        y = self.run(flat)
        if y is None:
            return None
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def _is_faster(self, tokens: int, decode: Callable[[], Tensor]) -> bool:
        forced = os.environ.get("COMPRESS_CPU_PATH")
        if forced in ("fused", "dense"):
            return forced == "fused"
        if self.shape[0] * self.shape[1] < LEAST:
            return False
        return tokens <= FEW or tokens <= measured.most_tokens(self.layout, self.shape, self.run, decode)


class Prepared(dict[str, Tensor]):
    """The stored tensors of a weight, by local name, and what multiplies with them."""

    def __init__(self, tensors: dict[str, Tensor], product: Product) -> None:
        super().__init__(tensors)
        self.product = product


def multiply(x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, decode: Callable[[], Tensor]) -> Tensor | None:
    """x @ W.T + bias where `tensors` are `Prepared` and that is faster than with decode(); None elsewhere."""
    if not isinstance(tensors, Prepared) or x.device.type != "cpu" or x.dtype not in _DTYPES:
        return None
    if torch.is_grad_enabled() and x.requires_grad:  # compiled products have no backward pass
        return None
    return tensors.product.linear(x, bias, decode)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in x's dtype; through float32 where this processor multiplies that faster, in parts of the weight."""
    tokens = x.numel() // max(1, x.shape[-1])
    narrow = x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"
    if not narrow or weight.numel() < LEAST or (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, weight.to(x.dtype), bias)
    if not measured.is_wider_faster(x.dtype, tokens):
        return F.linear(x, weight.to(x.dtype), bias)
    y, wide = x.new_empty(*x.shape[:-1], len(weight)), x.float()
    step = max(1, _AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), step):
        part = slice(first, first + step)
        rest = None if bias is None else bias[part].float()
        y[..., part] = F.linear(wide, weight[part].float(), rest)
    return y


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_AT_ONCE = 1 << 21  # weights that are in float32 at a time: they stay in the cache


def integers(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, power: int = 0
) -> Product | None:
    """For weights (code - zero) * scale, as `cpu_integers.linear` takes them; None where it does not."""
    if packed.device.type != "cpu" or (scales.shape[1] > 1 and cpu_integers.unit(bits, group_size) is None):
        return None
    if scales.dtype == torch.float16:
        scales = scales.float()
    sound = (scales < 255).all() & (scales > power) if scales.dtype == torch.uint8 else scales.isfinite()
    if not scales.numel() or not bool(sound.all()):
        return None
    codes = packed.contiguous().view(torch.uint8)

    def run(x: Tensor) -> Tensor | None:
        return cpu_integers.linear(x, codes, scales, zeros, bits, group_size, power)

    layout = f"{bits}-bit integers in groups of {min(group_size, 128)}" + (" with zeros" if zeros is not None else "")
    return Product(layout, (len(packed), columns), run)
