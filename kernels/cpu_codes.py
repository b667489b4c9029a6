"""Products with packed weights on the CPU, read as they are stored: integers in groups, and tables of numbers.

Codes become integers of 16 bits in registers, and are multiplied with activations of 16 bits (`cpu_activations`); sums
are exact up to the end of a unit of columns, and are then scaled in float32.

A product is made of a weight once, and then called with x, (tokens, columns) bf16, fp16 or fp32, and a dtype: it
returns x @ W.T, (tokens, rows), in float32 or already in that dtype, or None where x has numbers that `quantize` does
not take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import jit
from compress.formats.threads import in_threads
from compress.kernels import cpu_tables, simd
from compress.kernels.cpu_activations import quantize, together
from compress.kernels.cpu_few import Few
from compress.kernels.cpu_row import (
    BFLOAT16,
    E4M3,
    FLOAT32,
    INTEGERS,
    POWER,
    TABLES,
    WITH_ZEROS,
    Layout,
    fields,
    row_product,
)

LIMIT = 32767
TABLE_LIMIT = 8191  # eight products with numbers of 16 bits fit into 32
MOST_UNIT = 128  # columns whose products are added before they are scaled
WHOLE = 1 << 30  # the size of a single group, so that rows of any length have the same loop
ROWS, COLUMNS = 16, 2048  # a part of the weight that stays in the cache for all tokens
_SCALES = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.uint8: POWER, torch.float8_e4m3fn: E4M3}
_WORDS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
Multiply = Callable[[Tensor, torch.dtype], Tensor | None]

TABLE_GROUP = 128  # one that `table_unit` takes with vectors of any length


def integer_unit(bits: int, group_size: int) -> int | None:
    """Columns that are added as integers: whole groups, or a part of one. None where groups do not suit vectors."""
    least = fields(bits) * simd.lanes()
    if least % group_size == 0 and group_size % (2 * fields(bits)) == 0:
        return least
    return next((size for size in (MOST_UNIT, MOST_UNIT // 2, least) if group_size % size == 0 and size >= least), None)


def table_unit(group_size: int, bits: int = 4) -> int | None:
    """As `integer_unit`, for codes that are looked up. Only 4 bits have an order of columns for smaller groups."""
    size = cpu_tables.unit(simd.lanes())
    suits = group_size % size == 0 or (bits == 4 and group_size % 16 == 0 and size % group_size == 0)
    return size if suits and simd.has_tables() else None


def integers(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, power: int = 0
) -> Multiply:
    """A product with W = (code - zero) * scale.

    packed: (rows, bytes) uint8, `bits` bits for each column, low bits first. scales: (rows, groups) bf16 or fp32,
    finite; or uint8, whose number e stands for 2**(e - 127 - power). zeros: (rows, groups) uint8, or None for
    2**(bits - 1). group_size: `integer_unit` takes it; a single group may be of any size.
    """
    half = 1 << (bits - 1)
    if scales.shape[1] == 1:
        group_size = WHOLE
    size = integer_unit(bits, group_size)
    if size is None:
        raise ValueError(f"groups of {group_size} values of {bits} bits have no kernel here")
    order = _field_order(columns, fields(bits), simd.lanes(), size)
    codes = INTEGERS if zeros is None else WITH_ZEROS
    layout = Layout(bits, group_size, size, simd.lanes(), _SCALES[scales.dtype], codes, power, 1)
    others = torch.zeros(1, 1, dtype=torch.uint8) if zeros is None else zeros
    return _product(layout, packed, scales, others, (1, 1), order, LIMIT, -half if zeros is None else -1)


def tables(
    packed: Tensor,
    scales: Tensor,
    books: Tensor,
    rows: tuple[int, int],
    bits: int,
    group_size: int,
    columns: int,
    high_first: bool = False,
) -> Multiply:
    """A product with W = book[code] * scale.

    packed: (height, bytes) uint8, `bits` bits for each column, low bits first unless high_first, which 4 bits can be.
    scales: (n, groups) fp32, bf16 or E4M3, not negative; or uint8 e for 2**(e - 127). books: (m, 2 n) uint8, the lower
    and the higher bytes of n int16, n = max(16, 2**bits). rows: that share scales, and a book. group_size: `table_unit`
    takes it; a single group may be of any size.
    """
    lanes = simd.lanes()
    if scales.shape[1] == 1:
        group_size = WHOLE
    size = table_unit(group_size, bits)
    if size is None:
        raise ValueError(f"groups of {group_size} values of {bits} bits have no table kernel here")
    layout = Layout(bits, group_size, size, lanes, _SCALES[scales.dtype], TABLES, 0, 1)
    order = cpu_tables.order(columns, lanes, bits, high_first)
    return _product(layout, packed, scales, books, rows, order, TABLE_LIMIT)


def _product(
    layout: Layout,
    packed: Tensor,
    scales: Tensor,
    others: Tensor,
    shared: tuple[int, int],
    order: Any,
    limit: int,
    factor: int = 0,
) -> Multiply:
    """shared: rows with the same scales, and with the same of `others`. The last three as in `quantize`."""
    steps = scales.contiguous().view(_WORDS.get(scales.dtype, scales.dtype)).numpy()
    steps = steps.view(np.uint16) if layout.scales == BFLOAT16 else steps
    weights = (packed.contiguous().numpy(), steps, others.contiguous().numpy(), *shared)
    height = len(packed)
    few = Few(_kernel(layout), weights, height, (order, layout.unit, limit, factor), layout.lanes)

    def run(x: Tensor, dtype: torch.dtype) -> Tensor | None:
        if few.takes(x, dtype):
            return few(x, dtype)
        found = quantize(x, order, layout.unit, limit, layout.lanes, factor)
        if found is None:
            return None
        loop = _kernel(layout._replace(tokens=together(x.shape[0])))
        out = np.zeros((len(found.x), height), np.float32)
        in_threads(loop, height, out.size * len(order), *weights, found.x, found.scales, found.sums, out)
        return torch.from_numpy(out[: x.shape[0]])

    return run


@cache
def _field_order(columns: int, count: int, lanes: int, size: int) -> Any:
    """Field j of lane l of a vector is column count * l + j; the vectors of the fields follow one another."""
    padded = -(-columns // size) * size
    return np.arange(padded).reshape(-1, lanes, count).transpose(0, 2, 1).reshape(-1).copy()


@cache
def _kernel(layout: Layout) -> Any:
    """The loop over rows for one layout: numba compiles it when it is first called, and keeps it on disk."""
    bits, group_size, size, _, _, codes, _, tokens = layout
    text = " ".join(map(str, layout))
    slack = 16 + size * bits // 8  # bytes that may be read behind a row
    more = max(1, size // group_size)  # and scales
    has_zeros = codes == WITH_ZEROS

    @jit
    def rows_of(start, stop, packed, scales, others, share, other_share, x, x_scales, x_sums, out):  # type: ignore[no-untyped-def]
        (height, width), groups, units = packed.shape, scales.shape[1], x_scales.shape[1]
        step = units if x.shape[0] == 1 else COLUMNS // size
        # The last rows, behind which there is not enough to read, are copied to where there is.
        whole = max(0, height - (slack + width - 1) // width)
        last = min(height - whole, max(0, stop - whole))
        codes, steps = np.zeros(last * width + slack, np.uint8), np.zeros(last * groups + more, scales.dtype)
        zeros, found = np.zeros(last * groups + more, np.uint8), np.empty(tokens, np.float32)
        for row in range(last):
            codes[row * width : (row + 1) * width] = packed[whole + row]
            steps[row * groups : (row + 1) * groups] = scales[(whole + row) // share]
            if has_zeros:
                zeros[row * groups : (row + 1) * groups] = others[whole + row]
        inputs, all_others = (x.reshape(-1), x_scales.reshape(-1), x_sums.reshape(-1)), others.reshape(-1)
        weights, base, shared = (packed.reshape(-1), scales.reshape(-1), all_others), 0, share
        low, high = start, min(stop, whole)
        for _ in range(2):
            for first in range(low, high, ROWS):
                for token in range(0, x.shape[0], tokens):
                    for begin in range(0, units, step):
                        for row in range(first, min(first + ROWS, high)):
                            group = (row - base) // shared * groups
                            other = group if has_zeros else row // other_share * others.shape[1]
                            part = (token * units, units, begin, min(begin + step, units))
                            row_product(weights, inputs, ((row - base) * width, group, other, *part), found, text)
                            for t in range(tokens):
                                out[token + t, row] += found[t]
            weights, base, shared = (codes, steps, zeros if has_zeros else all_others), whole, 1
            low, high = max(start, whole), stop

    return rows_of
