"""Codes of 1 to 8 bits that are looked up in registers: packed codes in, int16 levels out, for `cpu_row`.

Codes become bytes, whose low four bits choose from parts of 16 of a table; all parts are asked, and those that a code
does not reach give nothing. The two bytes of a level are looked up apart.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compress.kernels import simd
from compress.kernels.simd import constant, i8, i16, i32, integer, load, shuffle, vector

HALF = 8  # parts of a table: as far as the sign of a byte tells which of them a code reaches


def unit(lanes: int) -> int:
    """Columns whose codes are two vectors of bytes."""
    return 4 * lanes


def entries(bits: int) -> int:
    """Levels that a row's table has room for."""
    return max(16, 1 << bits)


@cache
def order(columns: int, lanes: int, bits: int, high_first: bool) -> Any:
    """From where the columns of `looked_up` come: by vector of bytes, then by its halves of each 16 bytes."""
    size = unit(lanes)
    places = np.arange(size)
    if bits in (1, 2, 4):  # field f of byte i, the fields one behind the other
        byte, field = places % (size * bits // 8), places // (size * bits // 8)
        places = byte * (8 // bits) + (8 // bits - 1 - field if high_first else field)
    places = places.reshape(2, -1, 2, 8).transpose(0, 2, 1, 3).reshape(-1)
    return (np.arange(0, columns, size)[:, None] + places).reshape(-1)


def tables(builder: Any, source: Any, at: Any, bits: int, lanes: int) -> list[list[Any]]:
    """A row's tables, of the lower bytes of its levels and of the higher ones, in parts of 16. After the first of a
    half, each is what has to be added to the one before, where to add is exclusive or."""
    found, count = [], entries(bits) // 16
    for number in range(2 * count):
        found.append(load(builder, source, vector(i8, 16), builder.add(at, integer(16 * number))))
    steps = [builder.xor(part, found[i - 1]) if i % count % HALF else part for i, part in enumerate(found)]
    wide = [shuffle(builder, part, list(range(16)) * (lanes // 8)) for part in steps]
    return [wide[:count], wide[count:]]


def looked_up(builder: Any, books: list[list[Any]], codes: Any, at: Any, bits: int, lanes: int) -> list[Any]:
    """The levels of a unit of codes, four vectors of int16. books: from `tables`. at: where the codes begin, bytes."""
    for line in range(0, unit(lanes) * bits // 8, 64):
        simd.prefetch(builder, codes, builder.add(at, integer(simd.AHEAD + line)))
    if bits == 8:
        numbers = [load(builder, codes, vector(i8, 2 * lanes), builder.add(at, integer(v * 2 * lanes))) for v in (0, 1)]
    elif bits in (1, 2, 4):
        numbers = _fields(builder, codes, at, bits, lanes)
    else:
        starts = [builder.add(at, integer(v * lanes * bits // 4)) for v in (0, 1)]
        numbers = [_straddling(builder, codes, start, bits, lanes) for start in starts]
    return _levels(builder, books, numbers)


def _fields(builder: Any, codes: Any, at: Any, bits: int, lanes: int) -> list[Any]:
    """Two vectors of bytes, of all fields of the bytes of a unit."""
    parts, size = 4 // bits, lanes * bits // 8
    words = load(builder, codes, vector(i32, size), at)
    words, found = shuffle(builder, words, list(range(size)) * parts), []
    for v in (0, 1):
        shifts = [bits * (v * parts + part) for part in range(parts) for _ in range(size)]
        bytes_ = builder.bitcast(builder.lshr(words, constant(words.type, shifts)), vector(i8, 2 * lanes))
        found.append(builder.and_(bytes_, constant(bytes_.type, (1 << bits) - 1)))
    return found


def _straddling(builder: Any, codes: Any, at: Any, bits: int, lanes: int) -> Any:
    """A vector of bytes, of codes that follow one another: the two bytes of each, lifted to where it belongs."""
    lots, words = lanes // 8, vector(i16, lanes)
    parts = [load(builder, codes, vector(i8, 16), builder.add(at, integer(2 * bits * lot))) for lot in range(lots)]
    source, found = simd.join(builder, parts), []
    for odd in (0, 1):
        starts = [bits * i for i in range(odd, 16, 2)]
        pairs = [16 * lot + byte for lot in range(lots) for start in starts for byte in (start // 8, start // 8 + 1)]
        lifts = [1 << ((8 if odd else 16 - bits) - start % 8) for start in starts] * lots
        lifted = builder.mul(builder.bitcast(shuffle(builder, source, pairs), words), constant(words, lifts))
        if odd:
            found.append(builder.and_(lifted, constant(words, (1 << bits) - 1 << 8)))
        else:
            found.append(builder.lshr(lifted, constant(words, 16 - bits)))
    return builder.bitcast(builder.or_(*found), vector(i8, 2 * lanes))


def _levels(builder: Any, books: list[list[Any]], numbers: list[Any]) -> list[Any]:
    """Of each vector of codes: of the bytes 0..7 of each 16, then of the others."""
    count, found = numbers[0].type.count, []
    for low, high in _bytes(builder, books, numbers):
        for half in (0, 8):
            bytes_ = [16 * (i // 8) + half + i % 8 for i in range(count // 2)]
            pairs = constant(vector(i32, count), [i + source for i in bytes_ for source in (0, count)])
            found.append(builder.bitcast(builder.shuffle_vector(low, high, pairs), vector(i16, count // 2)))
    return found


def _bytes(builder: Any, books: list[list[Any]], numbers: list[Any]) -> list[list[Any]]:
    """What tables have for codes: the sum of what their parts have for all codes that reach them, as an index below
    zero finds nothing; of each half of 256, which is then chosen. Vectors take turns: the parts do not all fit into
    registers."""
    kind = numbers[0].type
    halves = [book[start : start + HALF] for book in books for start in range(0, len(book), HALF)]
    whole = len(halves) == len(books)
    indices = numbers if whole else [builder.and_(number, constant(kind, 0x7F)) for number in numbers]
    sums = [[constant(kind, 0)] * len(halves) for _ in numbers]
    for place, parts in enumerate(zip(*halves, strict=True)):
        if place:
            indices = [builder.sub(index, constant(kind, 16)) for index in indices]
        for v, index in enumerate(indices):
            found = [simd.look_up(builder, part, index) for part in parts]
            sums[v] = [builder.xor(*pair) for pair in zip(sums[v], found, strict=True)]
    if whole:
        return sums
    above = [builder.icmp_signed("<", number, constant(kind, 0)) for number in numbers]
    return [[builder.select(a, s[i + 1], s[i]) for i in (0, 2)] for a, s in zip(above, sums, strict=True)]
