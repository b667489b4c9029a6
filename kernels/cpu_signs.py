"""Products with a few bit planes and a few tokens on the CPU: what the signs of four columns make of x is looked up.

After T-MAC (arXiv:2407.00088, section 3), for signs on a low-rank scale. A level is a sum of coefficients, each times
the signs of some of the code's bits (the Walsh transform of the levels), so that without the floor

    W @ x = sum_p c_p * sum_r u_r * (S_p @ (v_r * x)),

where S_p has the signs that the exclusive or of some planes gives. Of four columns, S_p @ (v_r * x) has 16 values:
these are computed once for a token, rounded to 14 bits of the largest of a tile for the first factor, by far the
largest, and to 6 for others, and looked up for a vector of rows at a time (`cpu_sign_rows.py`). On Gaussian weights and
inputs that is off by 0.004, where four planes are by 0.1. What the floor adds to single weights is added behind.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from compress.formats.compiled import jit, lines
from compress.formats.threads import in_threads
from compress.kernels import simd
from compress.kernels.cpu_sign_rows import (
    DIGIT,
    FIRST,
    GROUPS,
    OTHERS,
    TILE,
    Form,
    add_looked_up,
    fill_table,
    transpose,
)

MOST_PLANES = 4  # of more, there are too many sums of signs
MOST_SUMS = 8  # of signs and tokens, that take less time than adding up the scale of every weight
MOST_COLUMNS = 1 << 16
WEIGHTS = 1024  # of so many, the floor may raise one
LEFT = 1 / 500  # of the weights, in the root mean square: so much of what the floor adds may be left out
_LEAST = np.float32(1e-30)  # a largest magnitude below has no reciprocal in float32 that is large enough


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
    return 4 * (rows + 1) + 4 * (rows * columns // WEIGHTS)


def prepared(planes: tuple[Any, ...], u: Any, v: Any, levels: Any, floor: float) -> Signs | None:
    """None where the floor adds so much that more than LEFT would be left out.

    levels: (2**(planes - 1),) float32. floor: of the first factors' product. The others as `Signs` has them.
    """
    height, size, most = len(u), len(u) * v.shape[1], len(u) * v.shape[1] // WEIGHTS
    counts, squares = np.zeros(height + 1, np.int64), np.zeros(height)
    in_threads(_count, height, size, u, v, np.float32(floor), counts[1:], squares)
    starts = np.cumsum(counts)
    if starts[-1] > 4 * most:
        return None
    columns, found = np.empty(starts[-1], np.uint16), np.empty(starts[-1], np.float32)
    in_threads(_differences, height, size, planes, u, v, levels, np.float32(floor), starts, columns, found)
    kept = np.sort(np.argsort(-np.abs(found), kind="stable")[:most])
    left = np.square(found, dtype=np.float64).sum() - np.square(found[kept], dtype=np.float64).sum()
    if left > LEFT**2 * squares.sum() * np.square(levels, dtype=np.float64).mean():
        return None
    words = ((found[kept].view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    starts = np.searchsorted(kept, starts).astype(np.int32)
    return Signs(planes, u, v, _coefficients(levels), starts, columns[kept], words)


def _coefficients(levels: Any) -> Any:
    """The Walsh transform of the levels."""
    codes = range(len(levels))
    odd = np.array([[(code & bits).bit_count() & 1 for code in codes] for bits in codes])
    return ((1 - 2 * odd) @ levels.astype(np.float64) / len(levels)).astype(np.float32)


def takes(planes: int, tokens: int) -> bool:
    """Whether looking up takes less time than adding up the scale of every weight."""
    return tokens << (planes - 1) <= MOST_SUMS


def product(signs: Signs, x: Any) -> Any:
    """(tokens, rows) float32; None where x is not finite, or next to nothing. x: (tokens, columns) float32."""
    (rank, columns), tokens, height = signs.v.shape, len(x), len(signs.u)
    tiles, form = -(-columns // TILE), Form(len(signs.planes), 2 * simd.lanes())
    tables = lines(tokens * tiles * (rank + 1) * GROUPS * 16).reshape(tokens, tiles, rank + 1, GROUPS * 16)
    scales = np.empty((tokens, tiles, rank + 1), np.float32)
    in_threads(_fill_tables, tokens * tiles, tables.size, signs.v, x, tables, scales)
    if np.isnan(scales.max(initial=0)):
        return None
    out = np.empty((tokens, height), np.float32)
    size = tokens * height * columns
    in_threads(_sum_rows(form), -(-height // form.rows), size, tuple(signs), tables, scales, x, out)
    return out


@jit
def _float(word):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@jit
def _row(u, v, sums, least, floor):  # type: ignore[no-untyped-def]
    """The factors' sums for a row, in their order, and where the floor is. u: (k,)."""
    first = _float(u[0])
    for i in range(sums.shape[0]):
        sums[i] = first * _float(v[0, i])
        least[i] = sums[i] * floor
    for k in range(1, u.shape[0]):
        factor = _float(u[k])
        for i in range(sums.shape[0]):
            sums[i] += factor * _float(v[k, i])


@jit
def _count(start, stop, u, v, floor, counts, squares):  # type: ignore[no-untyped-def]
    sums, least = np.empty(v.shape[1], np.float32), np.empty(v.shape[1], np.float32)
    for row in range(start, stop):
        _row(u[row], v, sums, least, floor)
        count, square = 0, np.float64(0)
        for i in range(sums.shape[0]):
            count += sums[i] < least[i]
            square += np.float64(sums[i]) * np.float64(sums[i])
        counts[row], squares[row] = count, square


@jit
def _differences(start, stop, planes, u, v, levels, floor, starts, columns, found):  # type: ignore[no-untyped-def]
    sums, least = np.empty(v.shape[1], np.float32), np.empty(v.shape[1], np.float32)
    for row in range(start, stop):
        at = starts[row]
        if at == starts[row + 1]:
            continue
        _row(u[row], v, sums, least, floor)
        for i in range(sums.shape[0]):
            if sums[i] < least[i]:
                code, shift = 0, np.uint8(i & 7)
                for plane in range(1, len(planes)):
                    code = code << 1 | (planes[plane][row, i >> 3] >> shift & 1)
                size = (least[i] - sums[i]) * levels[code]
                columns[at], found[at] = i, -size if planes[0][row, i >> 3] >> shift & 1 else size
                at += 1


@jit
def _exclusive_or(index, source, own, target):  # type: ignore[no-untyped-def]
    """index[target] = index[source] ^ own, in blocks of its size."""
    size, words = own.shape[0], own.view(np.uint64)
    left = index[source * size : (source + 1) * size].view(np.uint64)
    found = index[target * size : (target + 1) * size].view(np.uint64)
    for i in range(words.shape[0]):
        found[i] = left[i] ^ words[i]


@jit
def _fill_tables(start, stop, v, x, tables, scales):  # type: ignore[no-untyped-def]
    """start, stop: of tiles of tokens. The first factor has two tables, of the higher and the lower digits."""
    tiles, columns, values = tables.shape[1], x.shape[1], np.empty(TILE, np.float32)
    for number in range(start, stop):
        token, tile = number // tiles, number % tiles
        first = tile * TILE
        count = min(TILE, columns - first)
        for factor in range(v.shape[0]):
            values[count:] = 0
            for i in range(count):
                values[i] = _float(v[factor, first + i]) * x[token, first + i]
            most, total = np.float32(0), np.float32(0)
            for i in range(0, TILE, 4):
                four = abs(values[i]) + abs(values[i + 1]) + abs(values[i + 2]) + abs(values[i + 3])
                most = max(most, four)
                total += four  # not finite where one of them is not
            known = total < np.float32(np.inf) and (most > _LEAST or total == 0)
            limit = np.float32(OTHERS - 1 if factor else (FIRST - 1) * (DIGIT + 1))
            values *= limit / most if known and total > 0 else np.float32(0)
            at = factor + 1 if factor else 0
            step = most / limit if known else np.float32(np.nan)
            scales[token, tile, at] = step
            if factor == 0:
                scales[token, tile, 0] = step * np.float32(DIGIT)
                scales[token, tile, 1] = step
            fill_table(values, tables[token, tile, at:].reshape(-1), int(factor == 0))


@cache
def _sum_rows(form: Form) -> Any:
    text, rows, patterns, half = " ".join(map(str, form)), form.rows, 1 << (form.planes - 1), form.width // 2
    wide, size = TILE // 8, GROUPS * form.rows

    @jit
    def rows_of(start, stop, signs, tables, scales, x, out):  # type: ignore[no-untyped-def]
        """start, stop: of blocks of rows."""
        planes, u, _, coefficients, starts, columns, differences = signs
        (tokens, tiles, count), (height, width) = scales.shape, planes[0].shape
        edge, own, index = lines(rows * wide), lines(size), lines(patterns * size)
        found = lines(4 * tokens * count * rows).view(np.float32)
        for block in range(start, stop):
            row = block * rows
            found[:] = 0
            for tile in range(tiles):
                byte = tile * wide
                ahead = wide if tile + 1 < tiles else rows * width - byte
                for plane in range(len(planes)):
                    # Plane 0 has the signs; of the others the first has the highest bit of the code.
                    bit = 1 << (len(planes) - 1 - plane) if plane else 0
                    target = own if plane else index[:size]
                    if row + rows <= height and byte + wide <= width:
                        transpose(planes[plane].reshape(-1), (row * width + byte, width, ahead), target, text)
                    else:
                        edge[:] = 0
                        for r in range(min(rows, height - row)):
                            for b in range(min(wide, width - byte)):
                                edge[r * wide + b] = planes[plane][row + r, byte + b]
                        transpose(edge, (0, wide, 0), target, text)
                    if plane:
                        for pattern in range(bit, patterns, 2 * bit):
                            _exclusive_or(index, pattern - bit, own, pattern)
                for token in range(tokens):
                    arrays = (tables[token, tile].reshape(-1), scales[token, tile], coefficients, index)
                    add_looked_up(arrays, found[token * count * rows :], count, text)
            for token in range(tokens):
                for r in range(min(rows, height - row)):
                    # Vectors of rows have the even ones first.
                    place = r // (2 * half) * 2 * half + r % 2 * half + r % (2 * half) // 2
                    factors, total = u[row + r], np.float32(0)
                    for q in range(count):
                        total += _float(factors[max(0, q - 1)]) * found[(token * count + q) * rows + place]
                    for i in range(starts[row + r], starts[row + r + 1]):
                        total += _float(differences[i]) * x[token, columns[i]]
                    out[token, row + r] = total

    return rows_of
