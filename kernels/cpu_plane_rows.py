"""The code of a few rows of `cpu_planes`: bit planes in, weights or their sums with a token out, all in registers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import intrinsic
from compress.kernels import simd
from compress.kernels.simd import constant, f32, i8, i32, i64, integer, load, splat, vector

ROWS = 4  # that share the factor of the columns in registers
MOST_CHOSEN = 3  # bits of a code whose level is chosen in registers; of longer ones it is looked up
MOST_IN_TABLES = 8  # where that is in registers too
WEIGHTS, WORDS, SUMS = range(3)
EXACT, FUSED, PAIRED = range(3)  # how a scale is summed up: as every machine does; unrounded; two factors at a time


class Form(NamedTuple):
    """What a loop is compiled for."""

    planes: int
    lanes: int
    sums: int  # EXACT, FUSED or PAIRED
    gives: int  # WEIGHTS in float32; WORDS of bfloat16, rounded by the processor; or their SUMS with a token


@intrinsic
def plane_rows(context, limits, arrays, place, form):  # type: ignore[no-untyped-def]
    """Fills the last of `arrays` with ROWS rows, or with their products with a token. Those behind the last row are
    that row.

    limits: the floor and the largest weight. arrays: addresses, u of these rows and v in float32 or as pairs of
    bfloat16, levels, the token laid out as v is, and what is filled, all flat. place: the first row, the one behind the
    last, the factors or their pairs, and the columns.
    """
    chosen = Form(*map(int, form.literal_value.split()))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        values = cgutils.unpack_tuple(builder, arguments[1])
        pointers = [simd.data(context, builder, *pair) for pair in zip(values, signature.args[1], strict=True)]
        limits, place = (cgutils.unpack_tuple(builder, arguments[i]) for i in (0, 2))
        _Rows(builder, chosen, limits, pointers, place).fill()
        return context.get_dummy_value()

    return numba.void(limits, arrays, place, form), generate


class _Rows:
    """The code for a few rows; every value is one that the machine will have."""

    def __init__(self, builder: Any, form: Form, limits: Any, pointers: Any, place: Any) -> None:
        self.builder, self.form = builder, form
        self.addresses, self.u, self.v, self.levels, self.x, self.out = pointers
        first, stop, self.rank, self.columns = place
        self.floats, self.words = vector(f32, form.lanes), vector(i32, form.lanes)
        self.factor = i32 if form.sums == PAIRED else f32
        self.floor, self.largest = (splat(builder, limit, form.lanes) for limit in limits)
        last = builder.sub(stop, integer(1))
        rows = [builder.add(first, integer(r)) for r in range(ROWS)]
        self.rows = [builder.select(builder.icmp_signed("<", row, last), row, last) for row in rows]

    def fill(self) -> None:
        builder, step = self.builder, self.form.lanes // 8
        width = builder.udiv(self.columns, integer(8))
        count = builder.udiv(builder.add(width, integer(step - 1)), integer(step))
        end = builder.sub(width, integer(step))
        sums = [cgutils.alloca_once_value(builder, constant(self.floats, 0.0)) for _ in range(ROWS)]
        with cgutils.for_range_slice(builder, integer(0), count, integer(1), inc=True) as (number, _):
            byte = builder.mul(number, integer(step))
            byte = builder.select(builder.icmp_signed("<", byte, end), byte, end)  # the last vector overlaps
            column = builder.mul(byte, integer(8))
            for r, scale in enumerate(self._scales(number)):
                source = builder.add(builder.mul(self.rows[r], width), byte)
                weights = self._weights(scale, [self._bits(plane, source) for plane in self._planes()])
                if self.form.gives == SUMS:
                    x = load(builder, self.x, self.floats, builder.mul(number, integer(4 * self.form.lanes)))
                    builder.store(simd.fma(builder, weights, x, builder.load(sums[r])), sums[r])
                else:
                    self._store(weights, builder.add(builder.mul(integer(r), self.columns), column))
        for r, place in enumerate(sums if self.form.gives == SUMS else ()):
            builder.store(simd.total(builder, builder.load(place)), builder.gep(self.out, [integer(r)]))

    def _store(self, weights: Any, at: Any) -> None:
        builder = self.builder
        if self.form.gives == WORDS:
            halves = [simd.shuffle(builder, weights, range(i, i + 16)) for i in range(0, self.form.lanes, 16)]
            weights = simd.bfloat16(builder, halves)
        target = builder.gep(builder.bitcast(self.out, weights.type.element.as_pointer()), [at])
        builder.store(weights, builder.bitcast(target, weights.type.as_pointer()), align=1)

    def _scales(self, number: Any) -> list[Any]:
        """max(u @ v, floor * u0 * v0) of each row, summed in the order of the factors."""
        builder = self.builder
        firsts = [self._first(self._left(row, integer(0)), self._right(integer(0), number)) for row in range(ROWS)]
        sums = [cgutils.alloca_once_value(builder, first) for first, _ in firsts]
        for place, (_, begun) in zip(sums, firsts, strict=True):
            builder.store(begun, place)
        with cgutils.for_range_slice(builder, integer(1), self.rank, integer(1), inc=True) as (factor, _):
            right = self._right(factor, number)
            for row, place in enumerate(sums):
                left, so_far = self._left(row, factor), builder.load(place)
                if self.form.sums == PAIRED:
                    value = self._dot(so_far, left, right)
                elif self.form.sums == FUSED:
                    value = simd.fma(builder, left, right, so_far)
                else:
                    value = builder.fadd(so_far, builder.fmul(left, right))
                builder.store(value, place)
        pairs = [(builder.load(place), builder.fmul(f, self.floor)) for place, (f, _) in zip(sums, firsts, strict=True)]
        return [builder.select(builder.fcmp_ordered(">", *pair), *pair) for pair in pairs]

    def _first(self, left: Any, right: Any) -> tuple[Any, Any]:
        """The product of the first factors, and the sum that begins with it."""
        if self.form.sums != PAIRED:
            product = self.builder.fmul(left, right)
            return product, product
        nothing = constant(self.floats, 0.0)
        alone = self.builder.and_(left, constant(self.words, 0xFFFF))
        return self._dot(nothing, alone, right), self._dot(nothing, left, right)

    def _dot(self, total: Any, left: Any, right: Any) -> Any:
        builder, halves = self.builder, [range(i, i + 16) for i in range(0, self.form.lanes, 16)]
        parts = [[simd.shuffle(builder, value, half) for value in (total, left, right)] for half in halves]
        return simd.join(builder, [simd.dot(builder, *part) for part in parts])

    def _left(self, row: int, factor: Any) -> Any:
        builder = self.builder
        at = builder.mul(builder.add(builder.mul(integer(row), self.rank), factor), integer(4))
        return splat(builder, load(builder, self.u, self.factor, at), self.form.lanes)

    def _right(self, factor: Any, number: Any) -> Any:
        builder = self.builder
        at = builder.add(builder.mul(number, self.rank), factor)
        kind = vector(self.factor, self.form.lanes)
        return load(builder, self.v, kind, builder.mul(at, integer(4 * self.form.lanes)))

    def _planes(self) -> list[Any]:
        """Where each plane lies."""
        places = [load(self.builder, self.addresses, i64, integer(8 * plane)) for plane in range(self.form.planes)]
        return [self.builder.inttoptr(place, i8.as_pointer()) for place in places]

    def _bits(self, plane: Any, at: Any) -> Any:
        """The bits of a plane for a vector of columns, one in each lane."""
        lanes = self.form.lanes
        return self.builder.bitcast(load(self.builder, plane, ir.IntType(lanes), at), vector(ir.IntType(1), lanes))

    def _weights(self, scale: Any, bits: list[Any]) -> Any:
        builder = self.builder
        size = builder.fmul(scale, self._chosen(bits[1:]))
        size = builder.select(builder.fcmp_ordered("<", size, self.largest), size, self.largest)
        size = builder.bitcast(size, self.words)
        turned = builder.xor(size, constant(self.words, 1 << 31))
        return builder.bitcast(builder.select(bits[0], turned, size), self.floats)

    def _chosen(self, bits: list[Any]) -> Any:
        """The level of the code whose bits these are, the highest first."""
        builder, lanes = self.builder, self.form.lanes
        if len(bits) <= MOST_CHOSEN:
            numbers = [load(builder, self.levels, f32, integer(4 * i)) for i in range(1 << len(bits))]
            known = [splat(builder, number, lanes) for number in numbers]
            for bit in reversed(bits):
                known = [builder.select(bit, high, low) for low, high in zip(known[::2], known[1::2], strict=True)]
            return known[0]
        if len(bits) <= MOST_IN_TABLES and simd.has_float_tables():
            return self._looked_up(bits)
        codes = constant(self.words, 0)
        for bit in bits:
            codes = builder.or_(builder.shl(codes, constant(self.words, 1)), builder.zext(bit, self.words))
        found = ir.Constant(self.floats, ir.Undefined)
        for lane in (ir.Constant(i32, i) for i in range(lanes)):
            at = builder.zext(builder.extract_element(codes, lane), i64)
            found = builder.insert_element(found, load(builder, self.levels, f32, builder.mul(at, integer(4))), lane)
        return found

    def _looked_up(self, bits: list[Any]) -> Any:
        """`_chosen` of 4 bits and more, 16 lanes at a time."""
        builder, floats, words = self.builder, vector(f32, 16), vector(i32, 16)
        tables = [load(builder, self.levels, floats, integer(64 * i)) for i in range(1 << (len(bits) - 4))]
        found = []
        for start in range(0, self.form.lanes, 16):
            code = constant(words, 0)
            for place, bit in enumerate(reversed(bits)):
                chosen = simd.shuffle(builder, bit, range(start, start + 16))
                code = builder.select(chosen, builder.or_(code, constant(words, 1 << place)), code)
            found.append(simd.look_up_floats(builder, tables, code))
        return simd.join(builder, found)
