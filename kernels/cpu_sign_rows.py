"""Machine code of `cpu_sign_products`: tables of sums, and the signs of rows side by side, which look into them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import intrinsic
from compress.kernels import simd
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, join, load, splat, vector

TILE = 512  # columns whose tables have a scale together
GROUPS = TILE // 4  # tables of 16 sums; of every eight, those of the even groups come before those of the odd ones
SHARED = {1: 2, 4: 4}  # by the groups in a vector: so many vectors of rows share tables in registers
OFFSET = 64  # makes digits positive, which are below; two of them are added up in a byte
DIGIT = 128  # what the first factor's higher digit is worth in units of the lower one


class Form(NamedTuple):
    """What a loop is compiled for: bit planes, bytes in a vector, and of how many groups of columns a vector has every
    row's signs: 1, or 4 where bytes can look into 64, which are four tables."""

    planes: int
    width: int
    groups: int

    @property
    def rows(self) -> int:
        """In a block."""
        return 2 * self.width

    @property
    def together(self) -> int:
        """Rows that share tables in registers."""
        return SHARED[self.groups] * self.width // self.groups


def form(planes: int) -> Form:
    """The fastest of this processor."""
    return Form(planes, 2 * simd.lanes(), 4 if simd.has_wide_tables() else 1)


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
            start = builder.mul(group, integer(16))  # of 4 values, 4 bytes each
            odd, pair = builder.and_(group, integer(1)), builder.lshr(builder.and_(group, integer(7)), integer(1))
            place = builder.add(builder.and_(group, integer(-8)), builder.add(builder.mul(odd, integer(4)), pair))
            place = builder.mul(place, integer(16))  # 16 sums of 1 byte
            sums = constant(floats, 0.0)
            for i, sign in enumerate(signs):
                value = load(builder, source, f32, builder.add(start, integer(4 * i)))
                sums = simd.fma(builder, splat(builder, value, 16), sign, sums)

            def rounded(offset: int, sums: Any = sums) -> Any:
                return builder.fptosi(builder.fadd(sums, constant(floats, offset + 0.5)), wide)

            with builder.if_else(is_first) as (first, others):
                with first:
                    digits = rounded(OFFSET * (DIGIT + 1))
                    put(builder.lshr(digits, constant(wide, DIGIT.bit_length() - 1)), place)
                    put(builder.and_(digits, constant(wide, DIGIT - 1)), builder.add(place, integer(16 * GROUPS)))
                with others:
                    put(rounded(OFFSET), place)
        return context.get_dummy_value()

    return numba.void(values, table, is_first), generate


@intrinsic
def transpose(context, plane, place, index, bit, form):  # type: ignore[no-untyped-def]
    """For every four columns of a tile, a byte of every row with its bits of them, and where their table begins.

    plane: flat uint8, of rows. place: the first byte of the tile, and bytes from one row to the next. index: flat
    uint8, (patterns, rows / together, GROUPS / groups, together, groups) in terms of the form, groups in the order of
    tables. bit: 0 makes pattern 0; others make the patterns with this as the lowest bit, of those without it.
    """
    chosen = Form(*map(int, form.literal_value.split()))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, target = (simd.data(context, builder, arguments[i], signature.args[i]) for i in (0, 2))
        first, stride = cgutils.unpack_tuple(builder, arguments[1])
        one, chunks, shared = integer(1), integer(TILE // 128), integer(SHARED[chosen.groups])
        vectors = integer(chosen.rows * chosen.groups // chosen.width)
        with cgutils.for_range_slice(builder, integer(0), vectors, one, inc=True) as (number, _):
            row = builder.mul(number, integer(chosen.width // chosen.groups))
            block = builder.mul(builder.udiv(number, shared), integer(GROUPS))
            within = builder.mul(builder.urem(number, shared), integer(chosen.width))
            with cgutils.for_range_slice(builder, integer(0), chunks, one, inc=True) as (chunk, _):
                start = builder.add(first, builder.mul(chunk, integer(16)))
                group = builder.add(block, builder.mul(chunk, integer(32)))
                at = builder.add(builder.mul(group, integer(chosen.together)), within)
                columns = _columns(builder, chosen, source, start, stride, row)
                _store(builder, chosen, columns, (builder.gep(target, [at]), arguments[3]))
        return context.get_dummy_value()

    return numba.void(plane, place, index, bit, form), generate


def _columns(builder: Any, form: Form, source: Any, start: Any, stride: Any, row: Any) -> list[Any]:
    """16 bytes of each row of a vector, from byte `start` of the first row on: vectors of `form.groups` bytes of each
    row, one behind the other."""
    sixteen, count = vector(i8, 16), 16 // form.groups
    places = [builder.mul(builder.add(row, integer(r)), stride) for r in range(form.width // form.groups)]
    rows = [load(builder, source, sixteen, builder.add(start, place)) for place in places]
    parts, half = vector(ir.IntType(8 * form.groups), form.width // form.groups), count // 2
    found = [builder.bitcast(join(builder, rows[r::count]), parts) for r in range(count)]
    # Interleaving the parts of two rows, in every 16 bytes, rotates the bits of (row, part) by one.
    orders = [
        [
            first + high + i + where
            for first in range(0, parts.count, count)
            for i in range(half)
            for where in (0, parts.count)
        ]
        for high in (0, half)
    ]
    masks = [constant(vector(i32, parts.count), order) for order in orders]
    for _ in range(count.bit_length() - 1):
        found = [builder.shuffle_vector(found[i // 2], found[i // 2 + half], masks[i % 2]) for i in range(count)]
    return [builder.bitcast(column, vector(i8, form.width)) for column in found]


def _store(builder: Any, form: Form, columns: list[Any], place: tuple[Any, Any]) -> None:
    """Puts the lower and the higher four bits of bytes where those of even and of odd groups are. place: of the first
    in pattern 0, and the bit of patterns."""
    words, kind = vector(i16, form.width // 2), vector(i8, form.width)
    target, bit = place
    found = []
    for group, bits in zip((group for group in range(0, 32, form.groups) if group % 8 < 4), columns, strict=True):
        moved = builder.bitcast(builder.lshr(builder.bitcast(bits, words), constant(words, 4)), kind)
        found += [(group, builder.and_(bits, constant(kind, 15))), (group + 4, builder.and_(moved, constant(kind, 15)))]

    def at(pattern: Any, group: int) -> Any:
        offset = builder.add(builder.mul(pattern, integer(GROUPS * form.rows)), integer(group * form.together))
        return builder.bitcast(builder.gep(target, [offset]), kind.as_pointer())

    with builder.if_else(builder.icmp_signed("==", bit, integer(0))) as (first, others):
        with first:
            tables = constant(kind, [16 * (i % form.groups) for i in range(form.width)])
            for group, four in found:
                builder.store(builder.or_(four, tables), at(bit, group), align=16)
        with others:
            step, end = builder.add(bit, bit), integer(1 << (form.planes - 1))
            with cgutils.for_range_slice(builder, bit, end, step, inc=True) as (pattern, _):
                for group, four in found:
                    without = builder.load(at(builder.sub(pattern, bit), group), align=16)
                    builder.store(builder.xor(without, four), at(pattern, group), align=16)
