"""Floats as the words that lossless codes are made for: 16 bits with the exponent on top, or all 8 of a float8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import empty

WIDTHS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 2, torch.float8_e4m3fn: 1, torch.float8_e5m2: 1}  # bytes
_PART = 1 << 20  # values that are looked at at once


def split(weight: Tensor) -> tuple[Any, Tensor | None]:
    """weight: of any shape, on the CPU, of a dtype in `WIDTHS`, else ValueError.

    Returns its words, (n,) uint16 or uint8, and of a float32 with bits there the lower halves, int16 in its shape.
    """
    if weight.dtype not in WIDTHS:
        raise ValueError(f"weight: {', '.join(map(str, WIDTHS))} can be coded without loss, not {weight.dtype}")
    weight = weight.detach().contiguous()
    if weight.dtype != torch.float32:
        integer, dtype = (torch.int16, np.uint16) if WIDTHS[weight.dtype] == 2 else (torch.uint8, np.uint8)
        return weight.view(-1).view(integer).numpy().view(dtype), None
    # Copies of every other half: arithmetic with the whole words would take as much memory as the weight, and again.
    halves = weight.view(-1).view(torch.int16).view(-1, 2)  # the lower one first
    lower, upper = halves.unbind(1)
    has_low = any(bool(part.any()) for part in lower.split(_PART))
    return _copy(upper).numpy().view(np.uint16), _copy(lower).view(weight.shape) if has_low else None


def join(words: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inverse of `split`. words: int16 or uint8 in the shape of the weight."""
    if dtype != torch.float32:
        return words.view(dtype)
    shape = tuple(words.shape)
    on_cpu = words.device.type == "cpu"
    joined = empty(shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=words.device)
    halves = joined.view(-1).view(torch.int16).view(*shape, 2)
    halves[..., 0] = 0 if low is None else low
    halves[..., 1] = words
    return joined


def _copy(halves: Tensor) -> Tensor:
    return empty(tuple(halves.shape), halves.dtype).copy_(halves)
