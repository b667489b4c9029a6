"""Few levels, looked up in registers: bytes of codes in, words of 16 bits out."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import intrinsic, jit
from compress.kernels import simd
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, join, load, shuffle, splat, vector

LEVELS = 16  # in a table that every machine with tables looks into
SMALL = 2.0**-100  # scales below which a product may be subnormal, and is rounded otherwise


def most_levels(group_size: int) -> int:
    """In a table that is looked into for groups of so many codes."""
    return 64 if simd.has_long_tables() and group_size % 32 == 0 else LEVELS


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
    be done for in vectors: their number. levels: float32, 16, 32 or 64 but no more than `most_levels`, that differ from
    a zero by 2**-26 or more or not at all; none where codes stand for themselves. codes: uint8. scales, zeros: float32,
    of each group."""
    groups, arrays = min(scales.shape[0], out.shape[0] // group_size), (levels, codes, scales, zeros)
    count = levels.shape[0]
    if group_size % 16:
        return 0
    if group_size % 32:
        if count:
            return _take_groups(arrays, groups, group_size, out, 16, 16)
        return _take_groups(arrays, groups, group_size, out, 0, 16)
    if count == 0:
        return _take_groups(arrays, groups, group_size, out, 0, 32)
    if count == 16:
        return _take_groups(arrays, groups, group_size, out, 16, 32)
    if count == 32:
        return _take_groups(arrays, groups, group_size, out, 32, 32)
    return _take_groups(arrays, groups, group_size, out, 64, 32)


@intrinsic
def _take(context, table, codes, out, count, size):  # type: ignore[no-untyped-def]
    """`take` of whole vectors of codes. Returns how many codes these are: none where a table of that size is not looked
    up in registers. table: uint16."""
    entries = size.literal_value

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if not simd.has_tables() or (entries > LEVELS and not simd.has_long_tables()):
            return integer(0)
        source, chosen, target = (simd.data(context, builder, arguments[i], signature.args[i]) for i in range(3))
        words = min(32, entries)
        parts = [load(builder, source, vector(i16, words), integer(64 * i)) for i in range(entries // words)]
        tables = _tables(builder, parts, 32)
        end = builder.and_(arguments[3], integer(-32))
        with cgutils.for_range_slice(builder, integer(0), end, integer(32), inc=True) as (at, _):
            _look_up(builder, tables, chosen, target, at, 32)
        return end

    return numba.int64(table, codes, out, count, size), generate


@intrinsic
def _take_groups(context, arrays, groups, group_size, out, count, step):  # type: ignore[no-untyped-def]
    """`take_groups` of so many groups, each a multiple of `step` codes, with `count` levels. Returns their number, 0
    where the processor has nothing for that."""
    entries, width = count.literal_value, step.literal_value

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if (entries and not simd.has_tables()) or (entries > LEVELS and not simd.has_long_tables()):
            return integer(0)
        pairs = zip(cgutils.unpack_tuple(builder, arguments[0]), signature.args[0], strict=True)
        levels, chosen, scales, zeros = (simd.data(context, builder, *pair) for pair in pairs)
        target = simd.data(context, builder, arguments[3], signature.args[3])
        size, floats = arguments[2], vector(f32, 16)

        def fill(group: Any, zero: Any, scale: Any, native: bool) -> None:
            """One group."""

            def words(values: list[Any]) -> Any:
                return _rounded(builder, [builder.fmul(builder.fsub(value, zero), scale) for value in values], native)

            table = [load(builder, levels, floats, integer(64 * i)) for i in range(entries // 16)]
            parts = [words(table[i : i + 2]) for i in range(0, len(table), 2)]
            tables = _tables(builder, parts, width) if parts else []
            start = builder.mul(group, size)
            end = builder.add(start, size)
            with cgutils.for_range_slice(builder, start, end, integer(width), inc=True) as (at, _):
                if tables:
                    _look_up(builder, tables, chosen, target, at, width)
                else:
                    places = [builder.add(at, integer(i)) for i in range(0, width, 16)]
                    codes = [load(builder, chosen, vector(i8, 16), place) for place in places]
                    _store(builder, words([builder.uitofp(code, floats) for code in codes]), target, at)

        with cgutils.for_range_slice(builder, integer(0), arguments[1], integer(1), inc=True) as (group, _):
            numbers = [load(builder, of, f32, builder.mul(group, integer(4))) for of in (zeros, scales)]
            zero, scale = (splat(builder, number, 16) for number in numbers)
            if simd.has_dots():
                with builder.if_else(_is_small(builder, numbers[1])) as (small, usual):
                    with small:
                        fill(group, zero, scale, False)
                    with usual:
                        fill(group, zero, scale, True)
            else:
                fill(group, zero, scale, False)
        return arguments[1]

    return numba.int64(arrays, groups, group_size, out, count, step), generate


def _is_small(builder: Any, scale: Any) -> Any:
    """Whether a scale is smaller than SMALL, and not zero."""
    size = builder.and_(builder.bitcast(scale, i32), ir.Constant(i32, 0x7FFFFFFF))
    limit = int(np.float32(SMALL).view(np.uint32)) - 1
    return builder.icmp_unsigned("<", builder.sub(size, ir.Constant(i32, 1)), ir.Constant(i32, limit))


def _rounded(builder: Any, parts: list[Any], native: bool) -> Any:
    """The words of bfloat16, to nearest, ties to even. parts: one or two vectors of 16 float32. native: by the
    processor, which takes subnormal numbers for zero."""
    if native:
        return simd.bfloat16(builder, parts)
    found = []
    for part in parts:
        bits = builder.bitcast(part, vector(i32, 16))
        odd = builder.and_(builder.lshr(bits, constant(bits.type, 16)), constant(bits.type, 1))
        sums = builder.add(bits, builder.add(odd, constant(bits.type, 0x7FFF)))
        found.append(builder.trunc(builder.lshr(sums, constant(bits.type, 16)), vector(i16, 16)))
    return join(builder, found)


def _tables(builder: Any, parts: list[Any], width: int) -> list[Any]:
    """What `_look_up` looks into for `width` codes at a time. parts: of a table, 16 words, or vectors of 32."""
    if simd.has_long_tables():
        return [shuffle(builder, part, [i % part.type.count for i in range(width)]) for part in parts]
    bytes_ = builder.bitcast(parts[0], vector(i8, 2 * LEVELS))
    halves = (list(range(half, 2 * LEVELS, 2)) for half in (0, 1))  # the lower bytes, and the higher ones
    return [shuffle(builder, bytes_, half * (width // LEVELS)) for half in halves]


def _look_up(builder: Any, tables: list[Any], codes: Any, out: Any, at: Any, width: int) -> None:
    """So many codes from `at` on."""
    found = load(builder, codes, vector(i8, width), at)
    if simd.has_long_tables():
        words = simd.look_up_words(builder, tables, builder.zext(found, vector(i16, width)))
    else:
        low, high = (simd.look_up(builder, table, found) for table in tables)
        order = [i + half for i in range(width) for half in (0, width)]
        words = builder.shuffle_vector(low, high, constant(vector(i32, 2 * width), order))
    _store(builder, words, out, at)


def _store(builder: Any, words: Any, out: Any, at: Any) -> None:
    place = builder.gep(builder.bitcast(out, i16.as_pointer()), [at])
    builder.store(words, builder.bitcast(place, words.type.as_pointer()), align=1)
