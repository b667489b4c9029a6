"""The machine code of `cpu_sign_products`: tables of sums, bits of rows side by side, and sums of what they look up."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import intrinsic
from compress.kernels import simd
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, join, load, shuffle, splat, vector

TILE = 512  # columns whose tables have a scale together
GROUPS = TILE // 4  # tables of 16 sums
VECTORS = 2  # of rows, which share tables in registers
OFFSET = 64  # makes digits positive, which are below; two of them are added up in a byte
TOGETHER = 256 // (2 * OFFSET)
DIGIT = 128  # what the first factor's higher digit is worth in units of the lower one


class Form(NamedTuple):
    """What a loop is compiled for: bit planes, and bytes in a vector."""

    planes: int
    width: int

    @property
    def rows(self) -> int:
        return VECTORS * self.width


@intrinsic
def fill_table(context, values, table, is_first):  # type: ignore[no-untyped-def]
    """The sums of every four of TILE values with all signs: bit i of a place in the table is that of value i.

    values: (TILE,) float32, in units of the table. table: flat uint8; the first factor's of lower digits follows.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, target = (simd.data(context, builder, arguments[i], signature.args[i]) for i in range(2))
        floats, wide, bytes_ = (vector(kind, 16) for kind in (f32, i32, i8))
        signs = [constant(floats, [-1.0 if code >> i & 1 else 1.0 for code in range(16)]) for i in range(4)]
        is_first = builder.icmp_signed("!=", arguments[2], ir.Constant(arguments[2].type, 0))

        def put(numbers: Any, at: Any) -> None:
            place = builder.bitcast(builder.gep(target, [at]), bytes_.as_pointer())
            builder.store(builder.trunc(numbers, bytes_), place, align=16)

        with cgutils.for_range_slice(builder, integer(0), integer(GROUPS), integer(1), inc=True) as (group, _):
            start = builder.mul(group, integer(16))  # 4 values of 4 bytes, and 16 sums of 1
            sums = constant(floats, 0.0)
            for i, sign in enumerate(signs):
                value = load(builder, source, f32, builder.add(start, integer(4 * i)))
                sums = simd.fma(builder, splat(builder, value, 16), sign, sums)

            def rounded(offset: int, sums: Any = sums) -> Any:
                return builder.fptosi(builder.fadd(sums, constant(floats, offset + 0.5)), wide)

            with builder.if_else(is_first) as (first, others):
                with first:
                    digits = rounded(OFFSET * (DIGIT + 1))
                    put(builder.lshr(digits, constant(wide, DIGIT.bit_length() - 1)), start)
                    put(builder.and_(digits, constant(wide, DIGIT - 1)), builder.add(start, integer(16 * GROUPS)))
                with others:
                    put(rounded(OFFSET), start)
        return context.get_dummy_value()

    return numba.void(values, table, is_first), generate


@intrinsic
def transpose(context, plane, place, index, form):  # type: ignore[no-untyped-def]
    """For every four columns of a tile, a byte of every row with its bits of them.

    plane: flat uint8, of rows. place: the first byte of the tile, bytes from one row to the next, and to the tile
    that is asked for next. index: flat uint8, (GROUPS, rows).
    """
    chosen = Form(*map(int, form.literal_value.split()))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, target = (simd.data(context, builder, arguments[i], signature.args[i]) for i in (0, 2))
        first, stride, ahead = cgutils.unpack_tuple(builder, arguments[1])
        one, chunks = integer(1), integer(TILE // 128)
        with cgutils.for_range_slice(builder, integer(0), integer(VECTORS), one, inc=True) as (number, _):
            row = builder.mul(number, integer(chosen.width))
            with cgutils.for_range_slice(builder, integer(0), chunks, one, inc=True) as (chunk, _):
                start = builder.add(first, builder.mul(chunk, integer(16)))
                each = chosen.width // (TILE // 128)
                for r in range(each):  # a few at a time: all at once would wait for one another
                    there = builder.add(row, builder.add(builder.mul(chunk, integer(each)), integer(r)))
                    there = builder.add(builder.add(first, ahead), builder.mul(there, stride))
                    simd.prefetch(builder, source, there)
                columns = _columns(builder, chosen, source, start, stride, row)
                for byte, bits in enumerate(columns):
                    at = builder.add(builder.mul(chunk, integer(32)), integer(2 * byte))
                    at = builder.add(builder.mul(at, integer(chosen.rows)), row)
                    for half, four in enumerate(_halves(builder, bits)):
                        where = builder.gep(target, [builder.add(at, integer(half * chosen.rows))])
                        builder.store(four, builder.bitcast(where, four.type.as_pointer()), align=16)
        return context.get_dummy_value()

    return numba.void(plane, place, index, form), generate


def _columns(builder: Any, form: Form, source: Any, start: Any, stride: Any, row: Any) -> list[Any]:
    """16 bytes of each row of a vector, from byte `start` of the first row on: 16 vectors, one for each column."""
    lanes, sixteen = form.width // 16, vector(i8, 16)
    places = [builder.mul(builder.add(row, integer(r)), stride) for r in range(form.width)]
    rows = [load(builder, source, sixteen, builder.add(start, place)) for place in places]
    found = [join(builder, rows[r::16]) for r in range(16)]
    # Interleaving the bytes of rows r and r + 8, in every 16, rotates the 8 bits of (row, byte): four times swap them.
    orders = [
        [16 * lane + 8 * high + i + where for lane in range(lanes) for i in range(8) for where in (0, form.width)]
        for high in (0, 1)
    ]
    masks = [constant(vector(i32, form.width), order) for order in orders]
    for _ in range(4):
        found = [builder.shuffle_vector(found[i // 2], found[i // 2 + 8], masks[i % 2]) for i in range(16)]
    return found


def _halves(builder: Any, bits: Any) -> tuple[Any, Any]:
    """The lower and the higher four bits of bytes."""
    words, low = vector(i16, bits.type.count // 2), constant(bits.type, 15)
    moved = builder.lshr(builder.bitcast(bits, words), constant(words, 4))
    return builder.and_(bits, low), builder.and_(builder.bitcast(moved, bits.type), low)


@intrinsic
def add_looked_up(context, arrays, found, count, form):  # type: ignore[no-untyped-def]
    """Adds what the rows of a tile look up, in every pattern of planes, to found: flat float32, (count, rows), of every
    vector of rows the even ones before the odd ones.

    arrays: flat. tables: (count, GROUPS, 16) uint8. scales: (count,) float32. coefficients: (patterns,) float32. index:
    (patterns, GROUPS, rows) uint8.
    """
    chosen = Form(*map(int, form.literal_value.split()))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        values = cgutils.unpack_tuple(builder, arguments[0])
        pointers = [simd.data(context, builder, *pair) for pair in zip(values, signature.args[0], strict=True)]
        found, count = simd.data(context, builder, arguments[1], signature.args[1]), arguments[2]
        patterns, end = integer(1 << (chosen.planes - 1)), builder.sub(count, integer(1))
        with cgutils.for_range_slice(builder, integer(0), patterns, integer(1), inc=True) as (pattern, _):
            rows = _Rows(builder, chosen, pointers, found, pattern)
            with cgutils.for_range_slice(builder, integer(0), end, integer(2), inc=True) as (table, _):
                rows.add(table, 2)
            with builder.if_then(builder.trunc(count, ir.IntType(1))):
                rows.add(end, 1)
        return context.get_dummy_value()

    return numba.void(arrays, found, count, form), generate


class _Rows:
    """The code for a block of rows and a pattern of planes."""

    def __init__(self, builder: Any, form: Form, pointers: list[Any], found: Any, pattern: Any) -> None:
        self.builder, self.form, self.found, self.pattern = builder, form, found, pattern
        self.tables, self.scales, self.coefficients, self.index = pointers
        self.bytes, self.words = vector(i8, form.width), vector(i16, form.width // 2)

    def add(self, first: Any, count: int) -> None:
        """Of `count` tables from `first` on."""
        builder, form = self.builder, self.form
        sums = [[self._zeros() for _ in range(VECTORS)] for _ in range(count)]
        tables = [builder.mul(builder.add(first, integer(t)), integer(16 * GROUPS)) for t in range(count)]
        with cgutils.for_range_slice(builder, integer(0), integer(GROUPS), integer(TOGETHER), inc=True) as (group, _):
            index = builder.add(builder.mul(self.pattern, integer(GROUPS)), group)
            index = builder.mul(index, integer(form.rows))
            places = [builder.add(table, builder.mul(group, integer(16))) for table in tables]
            for found, pair in zip(self._looked_up(index, places), sum(sums, []), strict=True):
                both = builder.bitcast(found, self.words)
                for place, value in zip(pair, (both, builder.lshr(both, constant(self.words, 8))), strict=True):
                    builder.store(builder.add(builder.load(place), value), place)
        for t in range(count):
            scale = self._scale(builder.add(first, integer(t)))
            for number, pair in enumerate(sums[t]):
                both, odd = map(builder.load, pair)
                even = builder.sub(both, builder.shl(odd, constant(self.words, 8)))
                for half, words in enumerate((even, odd)):
                    at = builder.mul(builder.add(first, integer(t)), integer(form.rows))
                    at = builder.add(at, integer((2 * number + half) * form.width // 2))
                    self._put(builder.sub(words, constant(self.words, OFFSET * GROUPS)), scale, at)

    def _zeros(self) -> list[Any]:
        """Where the sums of the words of a vector are kept, and those of their higher bytes alone."""
        places = [cgutils.alloca_once(self.builder, self.words) for _ in range(2)]
        for place in places:
            self.builder.store(constant(self.words, 0), place)
        return places

    def _looked_up(self, index: Any, places: list[Any]) -> list[Any]:
        """Sums, in bytes, of what TOGETHER groups give: for every table, and vector of rows."""
        builder, form, found = self.builder, self.form, []
        for group in range(TOGETHER):
            at = [builder.add(index, integer((VECTORS * group + v) * form.width)) for v in range(VECTORS)]
            bits = [load(builder, self.index, self.bytes, place) for place in at]
            for place in places:
                table = load(builder, self.tables, vector(i8, 16), builder.add(place, integer(16 * group)))
                table = shuffle(builder, table, list(range(16)) * (form.width // 16))
                found += [simd.look_up(builder, table, four) for four in bits]
        each = len(places) * VECTORS
        sums = found[:each]
        for start in range(each, len(found), each):
            sums = [builder.add(*pair) for pair in zip(sums, found[start : start + each], strict=True)]
        return sums

    def _scale(self, table: Any) -> Any:
        builder = self.builder
        scale = load(builder, self.scales, f32, builder.mul(table, integer(4)))
        factor = load(builder, self.coefficients, f32, builder.mul(self.pattern, integer(4)))
        return splat(builder, builder.fmul(scale, factor), self.form.width // 2)

    def _put(self, words: Any, scale: Any, at: Any) -> None:
        """Adds them, times the scale, to what is found."""
        builder, count = self.builder, words.type.count
        values = builder.sitofp(builder.sext(words, vector(i32, count)), vector(f32, count))
        place = builder.bitcast(builder.gep(self.found, [at]), values.type.as_pointer())
        builder.store(simd.fma(builder, scale, values, builder.load(place, align=4)), place, align=4)
