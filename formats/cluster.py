"""1-D k-means, solved to the optimum, on the distinct values of each row with their importance summed up."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import empty, float_bits, jit
from compress.formats.distinct import distinct, room
from compress.formats.intervals import GAUSSIAN, cut, mean
from compress.formats.nesting import nest, shelf
from compress.formats.threads import in_threads

MOST = 256  # clusters
_TOGETHER = 16  # rows whose prices start from one another's; a fixed number, so that threads do not matter


def codebooks(weight: Tensor, clusters: int, importance: Tensor | None = None) -> Tensor:
    """The centroids of each row that leave the least sum of importance * (value - nearest centroid)**2.

    weight: (rows, columns) bf16, fp16 or fp32, on the CPU, finite. importance: (1 or rows, n) positive, of the columns
    modulo n. Returns (rows, clusters) float32, ascending; of a row with fewer distinct values these, the last one
    repeated. Of float32 rows longer than 65536, intervals begin where bf16 values do.
    """
    if not 1 <= clusters <= MOST:
        raise ValueError(f"clusters: {clusters} is not in 1..{MOST}")
    found = torch.zeros(len(weight), clusters)
    _in_blocks(_optimal_rows, weight, importance, clusters, found)
    return found


def nested(weight: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Codes of `bits` bits, and codebooks for their upper 2, 3, ... `bits` bits (`nesting.py`).

    Arguments as in `codebooks`. Returns (rows, columns) uint8, and for each width b (rows, 2**b) float32, ascending.
    """
    rows = len(weight)
    bounds, levels = torch.zeros(rows, (1 << bits) - 1), torch.zeros(rows, (2 << bits) - 4)
    _in_blocks(_nested_rows, weight, importance, bits, levels, bounds)
    return _between(weight, bounds), list(levels.split([1 << width for width in range(2, bits + 1)], 1))


def assign(weight: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid, of two as near the lower one.

    weight: (rows, columns) bf16, fp16 or fp32, on the CPU. centroids: (rows, clusters), ascending. Returns (rows,
    columns) uint8.
    """
    return _between(weight, ((centroids[:, :-1].double() + centroids[:, 1:].double()) / 2).float())


def _between(weight: Tensor, bounds: Tensor) -> Tensor:
    source, shift = float_bits(weight)
    codes = empty(tuple(weight.shape), torch.uint8)
    in_threads(_assign_rows, len(weight), weight.numel(), source, shift, bounds.contiguous().numpy(), codes.numpy())
    return codes


def _in_blocks(function: Any, weight: Tensor, importance: Tensor | None, size: int, *found: Tensor) -> None:
    """Runs a loop over blocks of rows."""
    if weight.numel():
        source, shift = float_bits(weight)
        weights = np.ones((1, 1), np.float32) if importance is None else importance.float().contiguous().numpy()
        arguments = (source, shift, weights, size, *(part.numpy() for part in found))
        in_threads(function, -(-len(weight) // _TOGETHER), weight.numel(), *arguments)


@jit
def _assign_rows(start, stop, source, shift, bounds, codes):  # type: ignore[no-untyped-def]
    """The number of bounds that lie below each value."""
    columns, count = source.shape[1], bounds.shape[1]
    values = np.empty(columns, np.float32)
    for row in range(start, stop):
        code = codes[row]
        for i in range(columns):
            values[i] = np.uint32(np.uint32(source[row, i]) << shift).view(np.float32)
            code[i] = 0
        if count <= 15:
            for k in range(count):
                bound = bounds[row, k]
                for i in range(columns):
                    code[i] += np.uint8(values[i] > bound)
            continue
        for i in range(columns):
            low, high = 0, count
            while low < high:
                middle = (low + high) // 2
                if values[i] > bounds[row, middle]:
                    low = middle + 1
                else:
                    high = middle
            code[i] = low


@jit
def _optimal_rows(start, stop, source, shift, importance, clusters, centroids):  # type: ignore[no-untyped-def]
    """Over blocks of rows. importance: (1 or rows, n) float32."""
    rows, columns = source.shape
    items, sums, work, places, cuts = room(columns)
    for block in range(start, stop):
        price = 2 * GAUSSIAN / clusters**3  # of an interval, per sum of squares
        for row in range(block * _TOGETHER, min((block + 1) * _TOGETHER, rows)):
            count = distinct(source[row], shift, importance[min(row, importance.shape[0] - 1)], items, sums)
            price = cut(sums[:, : count + 1], clusters, price, work, places, cuts)
            for k in range(clusters):
                centroids[row, k] = _centre(sums, cuts[k], cuts[k + 1])


@jit
def _nested_rows(start, stop, source, shift, importance, bits, levels, bounds):  # type: ignore[no-untyped-def]
    """As `_optimal_rows`. levels: of all widths, side by side."""
    rows, columns = source.shape
    items, sums, work, places, cuts = room(columns)
    cells, weights, shelves = np.empty((1 << bits) + 1, np.int64), np.zeros(bits + 1), shelf(bits)
    for row in range(start * _TOGETHER, min(stop * _TOGETHER, rows)):
        if row % _TOGETHER == 0:
            weights[2:] = 1 / (bits - 1)
        count = distinct(source[row], shift, importance[min(row, importance.shape[0] - 1)], items, sums)
        nest(sums[:, : count + 1], bits, (work, places, cuts), weights, shelves, cells)
        for width in range(2, bits + 1):
            step = 1 << (bits - width)
            for k in range(1 << width):
                levels[row, (1 << width) - 4 + k] = _centre(sums, cells[k * step], cells[(k + 1) * step])
        for k in range(1, 1 << bits):
            i = cells[k]
            below = _centre(sums, i - 1, i) if i else -np.inf
            bounds[row, k - 1] = (below + _centre(sums, i, i + 1)) / 2 if i < count else np.inf


@jit
def _centre(sums, i, j):  # type: ignore[no-untyped-def]
    """The mean of an interval; of an empty one the value before it."""
    return mean(sums, i, j) if i < j else mean(sums, max(i - 1, 0), max(i, 1))
