"""Floats as the words that lossless codes are made for: 16 bits with the exponent on top, or all 8 of a float8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTHS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 2, torch.float8_e4m3fn: 1, torch.float8_e5m2: 1}  # bytes


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
    bits = weight.view(torch.int32)
    words = (bits >> 16).to(torch.int16).view(-1).numpy().view(np.uint16)
    low = bits.to(torch.int16)  # the lower half: a conversion keeps the lower bits
    return words, low if low.any() else None


def join(words: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inverse of `split`. words: int16 or uint8 in the shape of the weight."""
    if dtype != torch.float32:
        return words.view(dtype)
    bits = words.to(torch.int32) << 16
    return (bits if low is None else bits | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)
