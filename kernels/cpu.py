"""Which way a packed weight on the CPU is multiplied with: as it is stored, or decoded and then by torch.

A compiled product reads a weight once for a few tokens, and never writes it out; for many tokens torch may be faster by
more than decoding takes. From how many on is measured when that is first asked for, once for each machine and layout
(`measured.py`). COMPRESS_CPU_PATH=fused or dense, when a weight is prepared, chooses without measuring.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats import fixed
from compress.kernels import cpu_codes, cpu_floats, cpu_words, measured
from compress.kernels.rows import Rows

FEW = 4  # tokens that a weight which loses nothing is multiplied with undecoded
LEAST = 1 << 16  # weights: of fewer, calling a compiled product takes longer than it

_DECODED = ContextVar("decoded", default=False)  # whether nothing is to be chosen by what was measured


@dataclass(frozen=True)
class Product:
    """x @ W.T without a decoded W. layout: a name for what takes the same time for each weight.

    run: of x, (tokens, columns) bf16, fp16 or fp32, and a dtype; returns (tokens, rows), float32 or already of that
    dtype, or None where x is not finite.
    """

    layout: str
    shape: tuple[int, int]
    run: Callable[[Tensor, torch.dtype], Tensor | None]
    few_only: bool = False  # many tokens get the bits that torch gives: what loses nothing is scored so
    forced: str | None = field(default_factory=lambda: os.environ.get("COMPRESS_CPU_PATH"))

    def linear(self, x: Tensor, bias: Tensor | None, dense: Callable[[Tensor], Tensor]) -> Tensor | None:
        """(..., columns) -> (..., rows) in x's dtype; None where `dense`, which multiplies with a decoded weight, is
        faster."""
        *several, columns = x.shape
        if columns != self.shape[1]:
            raise ValueError(f"x: {columns} columns, and the weight has {self.shape[1]}")
        flat, tokens = x.reshape(-1, columns), math.prod(several)
        if not tokens or not self._is_faster(tokens, dense):
            return None
        y = self.run(flat, x.dtype if bias is None else torch.float32)
        if y is None:
            return None
        y = y if bias is None else y.add_(bias)
        return y.to(x.dtype).view(*several, self.shape[0])

    def _is_faster(self, tokens: int, dense: Callable[[Tensor], Tensor]) -> bool:
        if self.forced in ("fused", "dense"):
            return self.forced == "fused"
        if self.shape[0] * self.shape[1] < LEAST:
            return False
        if self.few_only:
            return tokens <= FEW
        return tokens <= measured.most_tokens(self.layout, self.shape, lambda x: self.run(x, x.dtype), dense)


class Prepared(dict[str, Tensor]):
    """The stored tensors of a weight, by local name, and what multiplies with them."""

    def __init__(self, tensors: dict[str, Tensor], product: Product) -> None:
        super().__init__(tensors)
        self.product = product


@contextmanager
def decoded() -> Iterator[None]:
    """Inside, every product is that of the decoded weight in the dtype of x: what comes of it decides what is stored,
    and must not depend on what this machine has found to be faster."""
    token = _DECODED.set(True)
    try:
        yield
    finally:
        _DECODED.reset(token)


def multiply(x: Tensor, tensors: Any, bias: Tensor | None, dense: Callable[[Tensor], Tensor]) -> Tensor | None:
    """x @ W.T + bias where `tensors` have a `product` and that is faster than dense(x), x @ W.T of a decoded W; None
    elsewhere."""
    product = getattr(tensors, "product", None)
    if torch.compiler.is_compiling() or product is None or x.device.type != "cpu" or x.dtype not in _DTYPES:
        return None
    if torch.is_grad_enabled() and x.requires_grad:  # compiled products have no backward pass
        return None
    if torch.is_autocast_enabled("cpu") or _DECODED.get():
        return None
    y: Tensor | None = product.linear(x, bias, dense)
    return y


def dense(x: Tensor, shape: tuple[int, int], rows: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """x @ W.T + bias in x's dtype, of a decoded W of that shape. rows: those of a slice, which begins at a multiple of
    32. On the CPU a few at a time, which are still in a cache when they are multiplied and need no new memory; in
    float32 where this processor multiplies that faster."""
    height, columns = shape
    if x.shape[-1] != columns:
        raise ValueError(f"x: {x.shape[-1]} columns, and the weight has {columns}")
    differentiated = torch.is_grad_enabled() and x.requires_grad
    few = height * columns < LEAST
    if x.device.type != "cpu" or differentiated or few or _DECODED.get() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, rows(slice(0, height)).to(x.dtype), bias)
    flat = x.reshape(-1, columns)
    if isinstance(rows, Rows) and rows.takes(flat) and len(flat):
        part = replace(rows, shape=(min(height, _TIMED_ROWS), columns))
        ways = (part.product, lambda x: _in_parts(x, part.shape, part, None))
        if len(flat) <= measured.most_tokens(f"{_IN_CACHE} by {rows.name}", part.shape, *ways, _TIMED):
            y = x.new_empty(len(flat), height)
            for first in range(0, len(flat), _TIMED[-1]):  # as many as were timed, which lie in a cache too
                sums = rows.product(flat[first : first + _TIMED[-1]])
                y[first : first + _TIMED[-1]] = sums if bias is None else sums.add_(bias)
            return y.view(*x.shape[:-1], height)
    return _in_parts(flat, shape, rows, bias).view(*x.shape[:-1], height)


def _in_parts(x: Tensor, shape: tuple[int, int], rows: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """`dense` of (tokens, columns), by torch."""
    (height, columns), dtype = shape, x.dtype
    if dtype in (torch.bfloat16, torch.float16) and measured.is_wider_faster(dtype, len(x)):
        dtype = torch.float32
    y, inputs = x.new_empty(len(x), height), x.to(dtype)
    step = max(32, _AT_ONCE // (columns * dtype.itemsize) // 32 * 32)
    for first in range(0, height, step):
        part = slice(first, min(first + step, height))
        y[:, part] = F.linear(inputs, rows(part).to(dtype), None if bias is None else bias[part].to(dtype))
    return y


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_IN_CACHE = "rows that are decoded and multiplied in a cache"
_TIMED_ROWS, _TIMED = 4096, (16, 64, 256)  # of these, and tokens
_AT_ONCE = 1 << 23  # bytes of rows that are decoded at a time, in the dtype that they are multiplied in


def integers(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, power: int = 0
) -> Product | None:
    """For weights (code - zero) * scale, as `cpu_codes.integers` takes them; None where it does not."""
    if packed.device.type != "cpu" or (scales.shape[1] > 1 and cpu_codes.integer_unit(bits, group_size) is None):
        return None
    scales = scales.float() if scales.dtype == torch.float16 else scales
    if not _sound(scales, power):
        return None
    codes, groups = packed.contiguous().view(torch.uint8), -(-columns // group_size)
    fits = 8 * codes.shape[1] >= columns * bits and scales.shape == (len(codes), groups)
    if not fits or (zeros is not None and zeros.shape != scales.shape):
        return None  # decoding says what is wrong

    run = cpu_codes.integers(codes, scales, zeros, bits, group_size, columns, power)
    layout = f"{bits}-bit integers in groups of {min(group_size, 128)}" + (" with zeros" if zeros is not None else "")
    return Product(layout, (len(packed), columns), run)


def tables(
    packed: Tensor,
    scales: Tensor | None,
    levels: Tensor,
    group_size: int,
    shape: tuple[int, int],
    rows: int = 0,
    high_first: bool = False,
    factor: float = 1.0,
) -> Product | None:
    """For weights level[code] * scale * factor, as `cpu_codes.tables` takes them; None where it does not.

    levels: (n, 2**bits) floats, each for `rows` rows, 0 for all. scales: (shape[0], groups), or None for 1. Levels are
    stored as 16-bit integers, in units of a power of two: off by less than 2**-15 of the largest.
    """
    bits, single = levels.shape[1].bit_length() - 1, scales is None or scales.shape[1] == 1
    unit = cpu_codes.table_unit(cpu_codes.TABLE_GROUP if single else group_size, bits)
    if packed.device.type != "cpu" or unit is None or levels.shape[1] != 1 << bits:
        return None
    rows, groups = rows or shape[0], -(-shape[1] // group_size)
    whole = packed.nbytes % max(1, shape[0]) == 0 and 8 * packed.nbytes // max(1, shape[0]) >= shape[1] * bits
    known = len(levels) == -(-shape[0] // rows) if rows else False
    if not whole or not known or (scales is not None and scales.shape != (shape[0], groups)):
        return None  # decoding says what is wrong
    levels = levels.float()
    largest = levels.abs().amax(1, keepdim=True)
    if not bool(largest.isfinite().all()) or (scales is not None and not _sound(scales, 0)):
        return None
    units = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 15)
    books = (F.pad(levels, (0, max(0, 16 - (1 << bits)))) / units).round().clamp(-32768, 32767).to(torch.int16)
    books = books.view(torch.uint8).view(len(books), -1, 2).transpose(1, 2).flatten(1).contiguous()
    share = (rows, rows) if scales is None else (1, rows)
    if scales is None:
        scales = units
    else:
        factor *= float(units[0])
    steps = scales.float() if scales.dtype == torch.float16 else scales
    codes = packed.contiguous().view(torch.uint8).view(shape[0], -1)

    multiply = cpu_codes.tables(codes, steps, books, share, bits, group_size, shape[1], high_first)

    def run(x: Tensor, dtype: torch.dtype) -> Tensor | None:
        y = multiply(x, dtype if factor == 1 else torch.float32)
        return y if y is None or factor == 1 else y.mul_(factor)

    return Product(f"tables of {1 << bits} in groups of {16 if group_size == 16 else 32}", shape, run)


def e4m3(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Product | None:
    """For weights code * scale; None where `cpu_floats.e4m3` does not take them.

    codes: (rows, columns) float8_e4m3fn. scales: (m, n) floats, or uint8 e for 2**(e - 127), each for a block of rows x
    columns.
    """
    across = scales.shape[1] > 1
    if codes.device.type != "cpu" or not cpu_floats.can_run(block[1] if across else 32):
        return None
    stored = codes.view(torch.uint8)
    if not _sound(scales, 0) or bool(((stored & 0x7F) == 0x7F).any()):  # NaN, which the kernel takes for 480
        return None
    if scales.shape != (-(-len(codes) // block[0]), -(-codes.shape[1] // block[1])):
        return None  # decoding says what is wrong
    steps = scales if scales.dtype == torch.uint8 else scales.float()
    whole = None if across else steps.repeat_interleave(block[0], 0)[: len(codes), 0]

    def run(x: Tensor, dtype: torch.dtype) -> Tensor:
        y = cpu_floats.e4m3(x, stored, steps if across else None, block[1], block[0])
        return y if whole is None else y.mul_(whole)

    return Product(f"E4M3 in groups of {min(block[1], 128) if across else 128}", (len(codes), codes.shape[1]), run)


def fixed_words(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Product | None:
    """For bfloat16 in fixed-length codes as `compress.df11` stores it; None on other devices and for damaged codes."""
    codes, counts, escapes, rest = (tensors[name] for name in ("codes", "escape_counts", "escapes", "sign_mantissa"))
    if codes.device.type != "cpu":
        return None
    before = F.pad(counts.int().cumsum(0), (1, 0))
    blocks = -(-rest.numel() // fixed.BLOCK)
    base, whole = int(tensors["base"][0]), codes.numel() == blocks * fixed.BLOCK_BYTES
    if counts.numel() != blocks or not whole or int(before[-1]) != escapes.numel() or base > 256 - fixed.WINDOW:
        return None  # decoding says what is wrong
    starts = before[torch.arange(shape[0]) * shape[1] // fixed.BLOCK]

    multiply = cpu_words.product(base, codes, counts, starts, escapes, rest)
    return Product("bfloat16 in fixed codes", shape, lambda x, dtype: multiply(x), few_only=True)


def _sound(scales: Tensor, power: int) -> bool:
    """Whether there are scales, and all of them numbers that the kernels read as they are meant."""
    if scales.dtype == torch.uint8:
        return bool(scales.numel() and ((scales < 255) & (scales > power)).all())
    if scales.dtype == torch.float8_e4m3fn:
        return bool(scales.numel() and (scales.view(torch.uint8) < 0x7F).all())
    return bool(scales.numel() and scales.isfinite().all())
