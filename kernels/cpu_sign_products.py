"""Products with a few bit planes and a few tokens on the CPU: what the signs of four columns make of x is looked up.

After T-MAC (arXiv:2407.00088, section 3), for signs on a low-rank scale. A level is a sum of coefficients, each times
the signs of some of the code's bits (the Walsh transform of the levels), so that without the floor

    W @ x = sum_p c_p * sum_r u_r * (S_p @ (v_r * x)),

where S_p has the signs that the exclusive or of some planes gives. Of four columns, S_p @ (v_r * x) has 16 values:
these are computed once for a token, rounded to 14 bits of the largest of a tile for the first factor, by far the
largest, and to 7 for others, and looked up for a vector of rows at a time (`cpu_sign_sums.py`): in one table or, with
the same bits, in four beside one another. On Gaussian weights and inputs that is off by 0.002, where four planes are by
0.1. What the floor adds to single weights is added behind.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compress.formats.compiled import jit, lines
from compress.formats.threads import in_threads
from compress.kernels.cpu_sign_rows import DIGIT, GROUPS, OFFSET, TILE, Form, fill_table, form, transpose
from compress.kernels.cpu_sign_sums import add_looked_up
from compress.kernels.cpu_signs import Signs, bfloat

# Sums of signs and tokens that take less time than adding up the scale of every weight, by the groups in a vector.
MOST_SUMS = {1: 8, 4: 16}
_LEAST = np.float32(1e-30)  # a largest magnitude below has no reciprocal in float32 that is large enough


def takes(planes: int, tokens: int) -> bool:
    """Whether looking up takes less time than adding up the scale of every weight."""
    return tokens << (planes - 1) <= MOST_SUMS[form(planes).groups]


def product(signs: Signs, x: Any) -> Any:
    """(tokens, rows) float32; None where x is not finite, or next to nothing. x: (tokens, columns) float32."""
    (rank, columns), tokens, height = signs.v.shape, len(x), len(signs.u)
    tiles, chosen = -(-columns // TILE), form(len(signs.planes))
    tables = lines(tokens * tiles * (rank + 1) * GROUPS * 16).reshape(tokens, tiles, rank + 1, GROUPS * 16)
    scales = np.empty((tokens, tiles, rank + 1), np.float32)
    in_threads(_fill_tables, tokens * tiles, tables.size, signs.v, x, tables, scales)
    if np.isnan(scales.max(initial=0)):
        return None
    out = np.empty((tokens, height), np.float32)
    size = tokens * height * columns
    in_threads(_sum_rows(chosen), -(-height // chosen.rows), size, tuple(signs), tables, scales, x, out)
    return out


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
                values[i] = bfloat(v[factor, first + i]) * x[token, first + i]
            most, total = np.float32(0), np.float32(0)
            for i in range(0, TILE, 4):
                four = abs(values[i]) + abs(values[i + 1]) + abs(values[i + 2]) + abs(values[i + 3])
                most = max(most, four)
                total += four  # not finite where one of them is not
            known = total < np.float32(np.inf) and (most > _LEAST or total == 0)
            limit = np.float32(OFFSET - 1 if factor else (OFFSET - 1) * (DIGIT + 1))
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
    text, rows, patterns = " ".join(map(str, form)), form.rows, 1 << (form.planes - 1)
    wide, size, half = TILE // 8, GROUPS * form.rows, form.width // 2 if form.groups == 1 else 1

    @jit
    def rows_of(start, stop, signs, tables, scales, x, out):  # type: ignore[no-untyped-def]
        """start, stop: of blocks of rows."""
        planes, u, _, coefficients, starts, columns, differences = signs
        (tokens, tiles, count), (height, width) = scales.shape, planes[0].shape
        edge, index = lines(rows * wide), lines(patterns * size)
        found = lines(4 * tokens * count * rows).view(np.float32)
        for block in range(start, stop):
            row = block * rows
            found[:] = 0
            for tile in range(tiles):
                byte = tile * wide
                ahead = (row * width + byte + wide if tile + 1 < tiles else (row + rows) * width, width)
                for plane in range(len(planes)):
                    # Plane 0 has the signs; of the others the first has the highest bit of the code.
                    bit = 1 << (len(planes) - 1 - plane) if plane else 0
                    if row + rows <= height and byte + wide <= width:
                        transpose(planes[plane].reshape(-1), (row * width + byte, width), index, bit, text)
                    else:
                        edge[:] = 0
                        for r in range(min(rows, height - row)):
                            for b in range(min(wide, width - byte)):
                                edge[r * wide + b] = planes[plane][row + r, byte + b]
                        transpose(edge, (0, wide), index, bit, text)
                for token in range(tokens):
                    arrays = (tables[token, tile].reshape(-1), scales[token, tile], coefficients, index)
                    add_looked_up(arrays, planes, ahead, found[token * count * rows :], count, text)
            for token in range(tokens):
                here = out[token, row : row + rows]
                here[:] = 0
                for q in range(count):
                    sums = found[(token * count + q) * rows :]
                    for r in range(here.shape[0]):
                        # Vectors of one group's rows have the even ones first.
                        place = r // (2 * half) * 2 * half + r % 2 * half + r % (2 * half) // 2
                        here[r] += bfloat(u[row + r, max(0, q - 1)]) * sums[place]
                for r in range(here.shape[0]):
                    for i in range(starts[row + r], starts[row + r + 1]):
                        here[r] += bfloat(differences[i]) * x[token, columns[i]]

    return rows_of
