"""Machine code of `cpu_sign_products`: the sums of what the signs of rows look up in tables."""

from __future__ import annotations

from typing import Any

import numba
from numba.core import cgutils

from compress.formats.compiled import intrinsic
from compress.kernels import simd
from compress.kernels.cpu_sign_rows import GROUPS, OFFSET, SHARED, Form
from compress.kernels.simd import constant, f32, i8, i16, i32, i64, integer, load, shuffle, splat, vector

TABLES = {1: 2, 4: 4}  # by the groups in a vector: of so many tables registers hold the sums


@intrinsic
def add_looked_up(context, arrays, planes, place, found, count, form):  # type: ignore[no-untyped-def]
    """Adds what the rows of a tile look up, in every pattern of planes, to found: flat float32, (count, rows). Where a
    vector is of one group, of every vector of rows the even ones come before the odd ones.

    arrays: flat. tables: (count, GROUPS, 16) uint8. scales: (count,) float32. coefficients: (patterns,) float32. index:
    (patterns, ...) uint8, as `transpose` makes it. planes: flat, a tuple; what of them `transpose` reads next is at
    `place`, as it has that.
    """
    chosen = Form(*map(int, form.literal_value.split()))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointers, planes = (
            [
                simd.data(context, builder, *pair)
                for pair in zip(cgutils.unpack_tuple(builder, arguments[i]), signature.args[i], strict=True)
            ]
            for i in (0, 1)
        )
        place, count = cgutils.unpack_tuple(builder, arguments[2]), arguments[4]
        found = simd.data(context, builder, arguments[3], signature.args[3])
        patterns, most = integer(1 << (chosen.planes - 1)), TABLES[chosen.groups]
        with cgutils.for_range_slice(builder, integer(0), patterns, integer(1), inc=True) as (pattern, _):
            plane = planes[0]  # there are as many patterns as planes, or more
            for number in range(1, chosen.planes):
                its = builder.icmp_signed("==", pattern, integer(number))
                plane = builder.select(its, planes[number], plane)
            rows = _Rows(builder, chosen, [*pointers, found], pattern, _Ahead(builder, plane, place, chosen.rows))
            whole = builder.and_(count, integer(-most))
            with cgutils.for_range_slice(builder, integer(0), whole, integer(most), inc=True) as (table, _):
                rows.add(table, most)
            while most > 1:
                most //= 2
                with builder.if_then(builder.icmp_signed("!=", builder.and_(count, integer(most)), integer(0))):
                    rows.add(builder.and_(count, integer(-2 * most)), most)
        return context.get_dummy_value()

    return numba.void(arrays, planes, place, found, count, form), generate


class _Rows:
    """The code for a block of rows and a pattern of planes."""

    def __init__(self, builder: Any, form: Form, pointers: list[Any], pattern: Any, ahead: _Ahead) -> None:
        self.builder, self.form, self.pattern, self.ahead = builder, form, pattern, ahead
        self.tables, self.scales, self.coefficients, self.index, self.found = pointers

    def add(self, first: Any, count: int) -> None:
        """Of `count` tables from `first` on."""
        builder, form = self.builder, self.form
        tables, step = [builder.add(first, integer(t)) for t in range(count)], integer(2 * form.groups)
        kind, end = _Words if form.groups == 1 else _Fours, integer(form.rows // form.together)
        with cgutils.for_range_slice(builder, integer(0), end, integer(1), inc=True) as (block, _):
            start = builder.mul(builder.add(builder.mul(self.pattern, end), block), integer(GROUPS))
            sums = [[kind(builder, form.width) for _ in range(SHARED[form.groups])] for _ in tables]
            with cgutils.for_range_slice(builder, integer(0), integer(GROUPS), step, inc=True) as (group, _):
                self.ahead.ask()
                groups = [builder.add(group, integer(g)) for g in (0, form.groups)]
                bits = [self._bits(builder.add(start, group)) for group in groups]
                for table, places in zip(tables, sums, strict=True):
                    parts = [self._table(table, group) for group in groups]
                    for place, *indices in zip(places, *bits, strict=True):
                        place.add(parts, indices)
            for table, places in zip(tables, sums, strict=True):
                at = builder.add(builder.mul(table, integer(form.rows)), builder.mul(block, integer(form.together)))
                self._put([values for place in places for values in place.numbers()], table, at)

    def _bits(self, group: Any) -> list[Any]:
        """The signs of groups from one on."""
        builder, form = self.builder, self.form
        start = builder.mul(group, integer(form.together))
        places = [builder.add(start, integer(v * form.width)) for v in range(SHARED[form.groups])]
        return [load(builder, self.index, vector(i8, form.width), place) for place in places]

    def _table(self, table: Any, group: Any) -> Any:
        """The sums of groups from one on."""
        builder, size = self.builder, 16 * self.form.groups
        place = builder.mul(builder.add(builder.mul(table, integer(GROUPS)), group), integer(16))
        sums = load(builder, self.tables, vector(i8, size), place)
        return shuffle(builder, sums, list(range(size)) * (self.form.width // size))

    def _put(self, numbers: list[Any], table: Any, at: Any) -> None:
        """Adds them, times the scale, to what is found from `at` on."""
        builder = self.builder
        scale = load(builder, self.scales, f32, builder.mul(table, integer(4)))
        factor = load(builder, self.coefficients, f32, builder.mul(self.pattern, integer(4)))
        for values in numbers:
            count = values.type.count
            place = builder.bitcast(builder.gep(self.found, [at]), vector(f32, count).as_pointer())
            values = builder.sitofp(values, vector(f32, count))
            scales = splat(builder, builder.fmul(scale, factor), count)
            builder.store(simd.fma(builder, scales, values, builder.load(place, align=4)), place, align=4)
            at = builder.add(at, integer(count))


class _Ahead:
    """Asks for the rows of a plane's next tile, one after the other."""

    def __init__(self, builder: Any, plane: Any, place: tuple[Any, Any], rows: int) -> None:
        """place: the first byte of that tile, and bytes from one row to the next."""
        self.builder, self.plane, (self.first, self.stride), self.rows = builder, plane, place, rows
        self.row = _kept(builder, integer(0))

    def ask(self) -> None:
        """For one more; all at once would wait for one another. When all are asked for, again for the last."""
        builder, row = self.builder, self.builder.load(self.row)
        simd.prefetch(builder, self.plane, builder.add(self.first, builder.mul(row, self.stride)))
        more = builder.icmp_signed("<", row, integer(self.rows - 1))
        builder.store(builder.add(row, builder.zext(more, i64)), self.row)


class _Words:
    """What every byte looks up, added up: as words of two, and the higher bytes alone."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder, self.kind = builder, vector(i16, width // 2)
        self.places = [_kept(builder, constant(self.kind, 0)) for _ in range(2)]

    def add(self, tables: list[Any], indices: list[Any]) -> None:
        builder = self.builder
        found = [simd.look_up(builder, *pair) for pair in zip(tables, indices, strict=True)]
        both = builder.bitcast(builder.add(*found), self.kind)
        for place, value in zip(self.places, (both, builder.lshr(both, constant(self.kind, 8))), strict=True):
            builder.store(builder.add(builder.load(place), value), place)

    def numbers(self) -> list[Any]:
        """int32: of the even bytes, of the odd ones."""
        builder, (both, odd) = self.builder, map(self.builder.load, self.places)
        even = builder.sub(both, builder.shl(odd, constant(self.kind, 8)))
        centred = [builder.sub(words, constant(self.kind, OFFSET * GROUPS)) for words in (even, odd)]
        return [builder.sext(words, vector(i32, self.kind.count)) for words in centred]


class _Fours:
    """Sums of four bytes each."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder = builder
        self.place = _kept(builder, constant(vector(i32, width // 4), -OFFSET * GROUPS))

    def add(self, tables: list[Any], indices: list[Any]) -> None:
        builder = self.builder
        builder.store(simd.add_fours(builder, builder.load(self.place), tables, indices), self.place)

    def numbers(self) -> list[Any]:
        """int32, of four bytes each."""
        return [self.builder.load(self.place)]


def _kept(builder: Any, values: Any) -> Any:
    """Where a value is kept: this one, first."""
    place = cgutils.alloca_once(builder, values.type)
    builder.store(values, place)
    return place
