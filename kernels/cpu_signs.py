"""Bit planes as their products on the CPU take them: signs, and what the floor of their scale adds to single weights.

A level is a sum of coefficients, each times the signs of some of the code's bits (the Walsh transform of the levels):
without the floor a weight is a sum of signs times factors, and `cpu_sign_products.py` multiplies with that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from compress.formats.compiled import jit
from compress.formats.threads import in_threads
from compress.kernels import simd
from compress.kernels.cpu_sign_rows import DIGIT, GROUPS, OFFSET, TILE

MOST_PLANES = 4  # of more, there are too many sums of signs
MOST_COLUMNS = 1 << 16
EVERY = 1024  # weights: for so many, the difference that the floor makes to one is kept
LEFT = 1 / 500  # of the weights, in the root mean square: so much of these differences may be left out
# Likewise of rounding, and twice that of a row: a tenth of what 1 to 4 planes err by in Gaussian weights.
ROUNDED = 0.06, 0.03, 0.015, 0.0075
LARGEST = 1.6  # of Gaussian inputs the largest sum of four in a tile, in units of that of four ones


class Signs(NamedTuple):
    """Planes with what their products need beside them.

    planes: each (rows, ceil(columns / 8)) uint8. u: (rows, k) uint16, the bits of bfloat16. v: (k, columns), the same.
    coefficients: (2**(planes - 1),) float32, by the bits of the code whose signs each goes with. Of the weights that
    the floor raises, starts: (rows + 1,) int32, where those of each row begin; columns: uint16; differences: as v.
    """

    planes: tuple[Any, ...]
    u: Any
    v: Any
    coefficients: Any
    starts: Any
    columns: Any
    differences: Any


def can_run(planes: int, columns: int) -> bool:
    """Whether so many planes can be looked up here."""
    return planes <= MOST_PLANES and columns <= MOST_COLUMNS and simd.has_tables()


def beside(rows: int, columns: int) -> int:
    """The most bytes that `Signs` adds to what is stored."""
    return 4 * (rows + 1) + 4 * (rows * columns // EVERY)


def prepared(planes: tuple[Any, ...], u: Any, v: Any, levels: Any, floor: float) -> Signs | None:
    """None where more than LEFT of what the floor adds would be left out, or rounding would lose more than ROUNDED.

    levels: (2**(planes - 1),) float32. floor: of the first factors' product. The others as `Signs` has them.
    """
    height, size, most = len(u), len(u) * v.shape[1], len(u) * v.shape[1] // EVERY
    factors = _floats(u), _floats(v), np.float32(floor)
    counts, squares = np.zeros(height + 1, np.int64), np.zeros(height)
    in_threads(_count, height, size, *factors, counts[1:], squares)
    starts = np.cumsum(counts)
    lost, limit = _rounding(*factors[:2]), ROUNDED[len(planes) - 1] ** 2
    if starts[-1] > 4 * most or lost.sum() > limit * squares.sum() or np.any(lost > 4 * limit * squares):
        return None
    columns, found = np.empty(starts[-1], np.uint16), np.empty(starts[-1], np.float32)
    in_threads(_differences, height, size, planes, *factors, levels, starts, columns, found)
    kept = np.sort(np.argsort(-np.abs(found), kind="stable")[:most])
    left = np.square(found, dtype=np.float64).sum() - np.square(found[kept], dtype=np.float64).sum()
    if left > LEFT**2 * squares.sum() * np.square(levels, dtype=np.float64).mean():
        return None
    words = ((found[kept].view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    starts = np.searchsorted(kept, starts).astype(np.int32)
    return Signs(planes, u, v, _coefficients(levels), starts, columns[kept], words)


def _floats(words: Any) -> Any:
    """The float32 of the bits of bfloat16, all of them."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def _rounding(u: Any, v: Any) -> Any:
    """The mean square of what tables lose by rounding, for Gaussian inputs: (rows,) float64, as sums of squared scales
    are; levels multiply both alike."""
    fours = np.abs(np.pad(v, ((0, 0), (0, -v.shape[1] % TILE)))).reshape(len(v), -1, GROUPS, 4)
    largest = fours.sum(-1).max(-1).astype(np.float64)
    limits = np.full(len(v), OFFSET - 1)
    limits[0] = (OFFSET - 1) * (DIGIT + 1)
    lost = GROUPS / 12 * np.square(LARGEST * largest / limits[:, None]).sum(1)  # a step is evenly distributed
    return np.square(u, dtype=np.float64) @ lost


def _coefficients(levels: Any) -> Any:
    """The Walsh transform of the levels."""
    codes = range(len(levels))
    odd = np.array([[(code & bits).bit_count() & 1 for code in codes] for bits in codes])
    return ((1 - 2 * odd) @ levels.astype(np.float64) / len(levels)).astype(np.float32)


@jit
def bfloat(word):  # type: ignore[no-untyped-def]
    """The float32 of the bits of bfloat16."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@jit
def scale_row(u, v, floor, sums, least):  # type: ignore[no-untyped-def]
    """The factors' sums for a row, in their order, and the least that each counts as. u: (k,), v: (k, columns)."""
    for i in range(sums.shape[0]):
        sums[i] = u[0] * v[0, i]
        least[i] = sums[i] * floor
    for k in range(1, u.shape[0]):
        factor, row = u[k], v[k]
        for i in range(sums.shape[0]):
            sums[i] += factor * row[i]


@jit
def _count(start, stop, u, v, floor, counts, squares):  # type: ignore[no-untyped-def]
    sums, least = np.empty(v.shape[1], np.float32), np.empty(v.shape[1], np.float32)
    for row in range(start, stop):
        scale_row(u[row], v, floor, sums, least)
        count, square = 0, np.float64(0)
        for i in range(sums.shape[0]):
            count += sums[i] < least[i]
            square += np.float64(max(sums[i], least[i])) ** 2
        counts[row], squares[row] = count, square


@jit
def _differences(start, stop, planes, u, v, floor, levels, starts, columns, found):  # type: ignore[no-untyped-def]
    sums, least = np.empty(v.shape[1], np.float32), np.empty(v.shape[1], np.float32)
    for row in range(start, stop):
        at = starts[row]
        if at == starts[row + 1]:
            continue
        scale_row(u[row], v, floor, sums, least)
        for i in range(sums.shape[0]):
            if sums[i] < least[i]:
                code, shift = 0, np.uint8(i & 7)
                for plane in range(1, len(planes)):
                    code = code << 1 | (planes[plane][row, i >> 3] >> shift & 1)
                size = (least[i] - sums[i]) * levels[code]
                columns[at], found[at] = i, -size if planes[0][row, i >> 3] >> shift & 1 else size
                at += 1
