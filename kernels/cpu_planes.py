"""Rows of bit planes on a low-rank scale on the CPU: decoded a few at a time, into the cache nearest to the processor.

Where they go from there is the caller's matter: `kernels.bitstack` has the format, a dense weight and a product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compress.formats.compiled import jit
from compress.formats.threads import in_threads
from compress.kernels import simd
from compress.kernels.cpu_floats import FLOAT32, Layout, float_row
from compress.kernels.cpu_plane_rows import EXACT, FUSED, PAIRED, ROWS, SUMS, WEIGHTS, WORDS, Form, plane_rows
from compress.kernels.decode import store


def can_run(columns: int) -> bool:
    """Whether a row has the bits of a whole vector."""
    return -(-columns // 8) >= simd.lanes() // 8


def interleaved(v: Any) -> Any:
    """v: (k, columns) float32. Returns (vectors, k, lanes): for each vector of columns what is added up to its scale.

    The last vector ends with the last whole byte of bits, and begins before the one before it ends.
    """
    lanes, width = simd.lanes(), -(-v.shape[1] // 8) * 8
    starts = np.minimum(np.arange(0, width, lanes), width - lanes)
    padded = np.zeros((len(v), width), np.float32)
    padded[:, : v.shape[1]] = v
    return np.ascontiguousarray(padded[:, starts[:, None] + np.arange(lanes)].transpose(1, 0, 2))


def paired(v: Any) -> Any:
    """`interleaved` with two factors of bfloat16 in 32 bits, for sums that are `PAIRED`. v: (k, columns) float32 that
    are bfloat16."""
    words = np.concatenate((v, np.zeros((len(v) % 2, v.shape[1]), np.float32))).view(np.uint32)
    pairs = words[::2] >> 16 | words[1::2] & 0xFFFF0000
    return interleaved(pairs.view(np.float32)).view(np.uint32)


def loop(planes: int, exact: bool) -> Any:
    """The loop of a `Rows` that decodes so many planes, as every machine does; or, not exactly so, sooner. Its
    arguments are the stack of `product`, with v as `interleaved` gives it where it is exact."""
    if exact or not simd.has_dots():
        return _dense_rows(Form(planes, simd.lanes(), EXACT if exact else FUSED, WEIGHTS))
    return _dense_rows(Form(planes, simd.lanes(), PAIRED, WORDS))


def _sums() -> int:
    return PAIRED if simd.has_dots() else FUSED


def product(stack: tuple[Any, ...], x: Any, columns: int) -> Any:
    """(tokens, rows) float32. x: (tokens, 128 * n) float32, zeros behind W's columns.

    stack: addresses, (planes,) int64, of planes that are each (rows, ceil(columns / 8)) uint8. u, (rows, k) uint16, the
    bits of bfloat16. v, as `paired` gives it where the processor adds pairs up, else as `interleaved`. levels,
    (2**(planes - 1),) float32. The floor, and the largest weight, float32.
    """
    addresses, u = stack[:2]
    out = np.empty((len(x), len(u)), np.float32)
    width, form = -(-columns // 8) * 8, Form(len(addresses), simd.lanes(), _sums(), SUMS if len(x) == 1 else WEIGHTS)
    if form.gives == SUMS:
        loop, x = _sum_rows(form), _once(x, width)
    else:
        loop = _product_rows(form, Layout(FLOAT32, 0, 128, form.lanes, 1))
    in_threads(loop, len(u), len(u) * width, *stack, x, width, out)
    return out


def _once(x: Any, width: int) -> Any:
    """x as `interleaved` lays it out, where every column counts once: (vectors, 1, lanes)."""
    found = interleaved(x[:, :width])
    found[-1, 0, : -width % simd.lanes()] = 0
    return found


@cache
def _dense_rows(form: Form) -> Any:
    text, in_pairs, gives_words = " ".join(map(str, form)), form.sums == PAIRED, form.gives == WORDS

    @jit
    def bit_planes(start, stop, base, columns, out, dropped, addresses, u, v, levels, floor, largest):  # type: ignore[no-untyped-def]
        width = (columns + 7) // 8 * 8
        found, left = np.empty(ROWS * width, np.float32), np.empty(ROWS * u.shape[1], np.uint32)
        words, factors = found.view(np.uint16), (addresses, left, v.reshape(-1), levels, levels, found)
        for row in range(base + start, base + stop, ROWS):
            count = _fill(u, row, base + stop, in_pairs, left)
            plane_rows((floor, largest), factors, (row, base + stop, count, width), text)
            for r in range(min(ROWS, base + stop - row)):
                line = out[row - base + r, :columns]
                if gives_words:
                    part = words[r * width : r * width + columns]
                    for i in range(columns):  # an assignment of arrays is no loop of vectors
                        line[i] = part[i]
                else:
                    store(found[r * width : r * width + columns], line, dropped)

    return bit_planes


@cache
def _product_rows(form: Form, layout: Layout) -> Any:
    text, how, in_pairs = " ".join(map(str, form)), " ".join(map(str, layout)), form.sums == PAIRED

    @jit
    def rows_of(start, stop, addresses, u, v, levels, floor, largest, x, width, out):  # type: ignore[no-untyped-def]
        padded = x.shape[1]
        rows = np.zeros(ROWS * width + padded, np.float32)
        left, inputs = np.empty(ROWS * u.shape[1], np.uint32), x.reshape(-1)
        factors = (addresses, left, v.reshape(-1), levels, levels, rows)
        codes, steps, found = rows.view(np.uint8), np.zeros(1, np.float32), np.empty(1, np.float32)
        for row in range(start, stop, ROWS):
            count = _fill(u, row, stop, in_pairs, left)
            plane_rows((floor, largest), factors, (row, stop, count, width), text)
            for token in range(x.shape[0]):
                for r in range(min(ROWS, stop - row)):
                    float_row((codes, steps, inputs), (4 * r * width, token * padded, padded), found, how)
                    out[token, row + r] = found[0]

    return rows_of


@cache
def _sum_rows(form: Form) -> Any:
    text, in_pairs = " ".join(map(str, form)), form.sums == PAIRED

    @jit
    def rows_of(start, stop, addresses, u, v, levels, floor, largest, x, width, out):  # type: ignore[no-untyped-def]
        found, left = np.empty(ROWS, np.float32), np.empty(ROWS * u.shape[1], np.uint32)
        factors = (addresses, left, v.reshape(-1), levels, x.reshape(-1), found)
        for row in range(start, stop, ROWS):
            count = _fill(u, row, stop, in_pairs, left)
            plane_rows((floor, largest), factors, (row, stop, count, width), text)
            for r in range(min(ROWS, stop - row)):
                out[0, row + r] = found[r]

    return rows_of


@jit
def _fill(u, row, stop, in_pairs, left):  # type: ignore[no-untyped-def]
    """The factors of a few rows in float32, or pairs of them. Returns how many there are of a row."""
    rank = u.shape[1]
    count = (rank + 1) // 2 if in_pairs else rank
    for r in range(ROWS):
        source = u[min(row + r, stop - 1)]
        for i in range(count):
            if not in_pairs:
                left[r * count + i] = np.uint32(source[i]) << np.uint32(16)
            elif 2 * i + 1 < rank:
                left[r * count + i] = np.uint32(source[2 * i]) | np.uint32(source[2 * i + 1]) << np.uint32(16)
            else:
                left[r * count + i] = np.uint32(source[2 * i])
    return count
