"""Codes of 1 to 8 bits that are looked up in registers: packed codes in, int16 levels out, for `cpu_row`.

Codes become bytes, whose low four bits choose from tables of 16; the bits above choose between what those gave. The two
bytes of a level are looked up apart.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from compress.kernels import simd
from compress.kernels.simd import constant, i8, i16, i32, integer, load, shuffle, vector


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
    """A row's tables of 16 bytes: of the lower bytes of its levels, and of the higher ones."""
    found, count = [], entries(bits)
    for start in range(0, 2 * count, 16):
        part = load(builder, source, vector(i8, 16), builder.add(at, integer(start)))
        found.append(shuffle(builder, part, list(range(16)) * (lanes // 8)))
    return [found[: count // 16], found[count // 16 :]]


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
    return [level for number in numbers for level in _levels(builder, books, number, bits)]


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


def _levels(builder: Any, books: list[list[Any]], codes: Any, bits: int) -> list[Any]:
    """Of the bytes 0..7 of each 16, then of the others."""
    count = codes.type.count
    index = builder.and_(codes, constant(codes.type, 0x7F)) if bits == 8 else codes
    low, high = (_chosen(builder, book, codes, index, bits) for book in books)
    found = []
    for half in (0, 8):
        bytes_ = [16 * (i // 8) + half + i % 8 for i in range(count // 2)]
        pairs = constant(vector(i32, count), [i + source for i in bytes_ for source in (0, count)])
        found.append(builder.bitcast(builder.shuffle_vector(low, high, pairs), vector(i16, count // 2)))
    return found


def _chosen(builder: Any, book: list[Any], codes: Any, index: Any, bits: int) -> Any:
    """The bytes that a part of a table has for codes, of whose bits `bits` count."""
    if len(book) == 1:
        return simd.look_up(builder, book[0], index)
    half = len(book) // 2
    low, high = (_chosen(builder, part, codes, index, bits - 1) for part in (book[:half], book[half:]))
    words = vector(i16, codes.type.count // 2)  # no machine shifts bytes
    lifted = builder.shl(builder.bitcast(codes, words), constant(words, 8 - bits))
    return builder.select(
        builder.icmp_signed("<", builder.bitcast(lifted, codes.type), constant(codes.type, 0)), high, low
    )
