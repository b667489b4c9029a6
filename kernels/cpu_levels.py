"""Few levels, looked up in registers: bytes of codes in, words of 16 bits out."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import intrinsic, jit
from compress.kernels import simd
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, load, shuffle, splat, vector

LEVELS = 16


@jit
def take(table, codes, out):  # type: ignore[no-untyped-def]
    """out[i] = table[codes[i]]. table: up to 256 words of 16 bits. codes: uint8."""
    words, count, done = np.zeros(256, np.uint16), table.shape[0], 0
    for i in range(count):
        words[i] = np.uint16(table[i])
    if count <= 16:
        done = _take(words, codes, out, out.shape[0], 16)
    elif count <= 64:
        done = _take(words, codes, out, out.shape[0], 64)
    elif count <= 128:
        done = _take(words, codes, out, out.shape[0], 128)
    else:
        done = _take(words, codes, out, out.shape[0], 256)
    rest, left = codes[done:], out[done:]
    for i in range(left.shape[0]):
        left[i] = table[rest[i]]


@jit
def take_groups(levels, codes, scales, zeros, group_size, out):  # type: ignore[no-untyped-def]
    """out[i] = (levels[codes[i]] - zero) * scale in float32, rounded to bfloat16, of as many whole groups as that can
    be done for in vectors: their number. levels: (LEVELS,) float32; none where codes stand for themselves. codes:
    uint8. scales, zeros: float32, of each group."""
    groups, arrays = min(scales.shape[0], out.shape[0] // group_size), (levels, codes, scales, zeros)
    if group_size % 16:
        return 0
    if levels.shape[0] == 0:
        return _take_groups(arrays, groups, group_size, out, 0)
    if group_size % 64 == 0:
        return _take_groups(arrays, groups, group_size, out, 64)
    if group_size % 32 == 0:
        return _take_groups(arrays, groups, group_size, out, 32)
    return _take_groups(arrays, groups, group_size, out, 16)


@intrinsic
def _take(context, table, codes, out, count, size):  # type: ignore[no-untyped-def]
    """`take` of whole vectors of codes. Returns how many codes these are: none where a table of that size is not looked
    up in registers. table: uint16."""
    entries = size.literal_value

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if not simd.has_tables() or (entries > LEVELS and not simd.has_long_tables()):
            return integer(0)
        source, chosen, target = (simd.data(context, builder, arguments[i], signature.args[i]) for i in range(3))
        width = 2 * simd.lanes() if entries == LEVELS else simd.lanes()
        parts = [
            load(builder, source, vector(i16, min(32, entries)), integer(64 * i)) for i in range(-(-entries // 32))
        ]
        tables = _halves(builder, parts[0], width) if entries == LEVELS else []
        end = builder.and_(arguments[3], integer(-width))
        with cgutils.for_range_slice(builder, integer(0), end, integer(width), inc=True) as (at, _):
            if tables:
                _look_up(builder, tables, chosen, target, at)
            else:
                found = builder.zext(load(builder, chosen, vector(i8, width), at), vector(i16, width))
                _store(builder, simd.look_up_words(builder, parts, found), target, at)
        return end

    return numba.int64(table, codes, out, count, size), generate


@intrinsic
def _take_groups(context, arrays, groups, group_size, out, width):  # type: ignore[no-untyped-def]
    """`take_groups` of so many groups, each a multiple of `width` codes; 0 for codes that stand for themselves, of 16.
    Returns their number."""
    looked_up = width.literal_value

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if looked_up and not simd.has_tables():
            return integer(0)
        pairs = zip(cgutils.unpack_tuple(builder, arguments[0]), signature.args[0], strict=True)
        levels, chosen, scales, zeros = (simd.data(context, builder, *pair) for pair in pairs)
        target = simd.data(context, builder, arguments[3], signature.args[3])
        size, step, floats = arguments[2], min(looked_up or 16, 2 * simd.lanes()), vector(f32, LEVELS)
        with cgutils.for_range_slice(builder, integer(0), arguments[1], integer(1), inc=True) as (group, _):
            zero, scale = (
                splat(builder, load(builder, of, f32, builder.mul(group, integer(4))), LEVELS) for of in (zeros, scales)
            )

            def scaled(values: Any, zero: Any = zero, scale: Any = scale) -> Any:
                return _rounded(builder, builder.fmul(builder.fsub(values, zero), scale))

            tables, start = [], builder.mul(group, size)
            if looked_up:
                tables = _halves(builder, scaled(load(builder, levels, floats, integer(0))), step)
            end = builder.add(start, size)
            with cgutils.for_range_slice(builder, start, end, integer(step), inc=True) as (at, _):
                if looked_up:
                    _look_up(builder, tables, chosen, target, at)
                else:
                    codes = builder.uitofp(load(builder, chosen, vector(i8, LEVELS), at), floats)
                    _store(builder, scaled(codes), target, at)
        return arguments[1]

    return numba.int64(arrays, groups, group_size, out, width), generate


def _rounded(builder: Any, values: Any) -> Any:
    """The words of bfloat16, to nearest, ties to even."""
    bits = builder.bitcast(values, vector(i32, LEVELS))
    odd = builder.and_(builder.lshr(bits, constant(bits.type, 16)), constant(bits.type, 1))
    sums = builder.add(bits, builder.add(odd, constant(bits.type, 0x7FFF)))
    return builder.trunc(builder.lshr(sums, constant(bits.type, 16)), vector(i16, LEVELS))


def _halves(builder: Any, table: Any, width: int) -> list[Any]:
    """The lower bytes of a table, and the higher ones, again and again."""
    bytes_ = builder.bitcast(table, vector(i8, 2 * LEVELS))
    parts = (list(range(half, 2 * LEVELS, 2)) for half in (0, 1))
    return [shuffle(builder, bytes_, part * (width // LEVELS)) for part in parts]


def _look_up(builder: Any, tables: list[Any], codes: Any, out: Any, at: Any) -> None:
    """A vector of codes from `at` on."""
    kind = tables[0].type
    found = load(builder, codes, kind, at)
    low, high = (simd.look_up(builder, table, found) for table in tables)
    order = [i + half for i in range(kind.count) for half in (0, kind.count)]
    _store(builder, builder.shuffle_vector(low, high, constant(vector(i32, 2 * kind.count), order)), out, at)


def _store(builder: Any, words: Any, out: Any, at: Any) -> None:
    place = builder.gep(builder.bitcast(out, ir.IntType(16).as_pointer()), [at])
    builder.store(words, builder.bitcast(place, words.type.as_pointer()), align=1)
