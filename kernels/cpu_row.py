"""The code of a row of `cpu_codes`: packed weights in, sums of products with a few tokens out, all in registers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import intrinsic
from compress.kernels import cpu_tables, simd
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, load, splat, vector

BFLOAT16, FLOAT32, POWER, E4M3 = range(4)  # what scales are stored as; POWER: the byte e stands for 2**(e - 127)
INTEGERS, WITH_ZEROS, TABLES = range(3)  # what codes are


class Layout(NamedTuple):
    """What a loop is compiled for. unit: columns. lanes: of 16 bits. scales, codes: as above. tokens: at a time."""

    bits: int
    group_size: int
    unit: int
    lanes: int
    scales: int
    codes: int
    power: int
    tokens: int


def fields(bits: int) -> int:
    """Codes in 16 bits that no shift cuts; 1 for those that straddle bytes."""
    return 16 // bits if bits in (2, 4, 8) else 1


@intrinsic
def row_product(context, weights, inputs, place, found, layout):  # type: ignore[no-untyped-def]
    """found[t] = the product of a part of a row with token t.

    weights: codes uint8, scales, zeros or tables uint8. inputs: those of `cpu_activations`, flat. place: where the
    codes, scales and the third of the row begin; of the tokens the first unit, and how many units each has; the first
    unit of the part, and the one behind it. layout: numbers as text, which the compiler knows.
    """
    chosen = Layout(*map(int, layout.literal_value.split()))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        def pointers(values, kinds):  # type: ignore[no-untyped-def]
            return [simd.data(context, builder, *pair) for pair in zip(values, kinds, strict=True)]

        weights, inputs, place = (cgutils.unpack_tuple(builder, argument) for argument in arguments[:3])
        weights, inputs = pointers(weights, signature.args[0]), pointers(inputs, signature.args[1])
        sums = _Row(builder, chosen, weights, inputs, place).product()
        result = simd.data(context, builder, arguments[3], signature.args[3])
        for token, value in enumerate(sums):
            builder.store(value, builder.gep(result, [integer(token)]))
        return context.get_dummy_value()

    return numba.void(weights, inputs, place, found, layout), generate


class _Row:
    """The code for a part of one row; every value is one that the machine will have."""

    def __init__(self, builder: Any, layout: Layout, weights: Any, inputs: Any, place: Any) -> None:
        self.builder, self.layout = builder, layout
        self.codes, self.scales, self.others = weights
        self.x, self.x_scales, self.x_sums = inputs
        self.at, self.group, self.other, self.token, self.units, self.begin, self.end = place
        self.words = vector(i16, layout.lanes)
        self.sums = vector(i32, layout.lanes // 2)
        self.floats = vector(f32, layout.lanes // 2)
        self.tables: list[list[Any]] = []
        if layout.codes == TABLES:
            self.tables = cpu_tables.tables(builder, self.others, self.other, layout.bits, layout.lanes)

    def product(self) -> list[Any]:
        """The sums of each token."""
        builder = self.builder
        totals = [cgutils.alloca_once_value(builder, constant(self.floats, 0.0)) for _ in range(self.layout.tokens)]
        with cgutils.for_range_slice(builder, self.begin, self.end, integer(1), inc=True) as (unit, _):
            for products, scale in self._unit(unit):
                for token, place in enumerate(totals):
                    factor = load(builder, self.x_scales, f32, self._times(self._input(token, unit), 4))
                    factors = builder.fmul(scale, splat(builder, factor, self.floats.count))
                    product = builder.sitofp(products[token], self.floats)
                    builder.store(simd.fma(builder, product, factors, builder.load(place)), place)
        return [simd.total(builder, builder.load(place)) for place in totals]

    def _unit(self, unit: Any) -> list[tuple[list[Any], Any]]:
        """Sums of (code - zero) * x over a unit, of each token, int32; and the scale of each lane.

        Twice where the groups of even and odd lots of 16 columns differ.
        """
        vectors = list(enumerate(self._looked_up(unit) if self.tables else self._codes(unit)))
        if self.layout.codes != TABLES or self.layout.group_size != 16:
            return [(self._sums(vectors, unit), self._scale(unit))]
        return [(self._sums(vectors[odd::2], unit), self._scale(unit, odd)) for odd in (0, 1)]

    def _sums(self, vectors: list[tuple[int, Any]], unit: Any) -> list[Any]:
        builder, layout = self.builder, self.layout
        sums = [self._start(token, unit) for token in range(layout.tokens)]
        for number, codes in vectors:
            for token in range(layout.tokens):
                at = self._times(self._input(token, unit), 2 * layout.unit)
                x = load(builder, self.x, self.words, builder.add(at, integer(2 * layout.lanes * number)))
                sums[token] = builder.add(sums[token], simd.madd(builder, codes, x))
        return sums

    def _start(self, token: int, unit: Any) -> Any:
        """What codes that begin at zero add too much, taken away."""
        builder, codes = self.builder, self.layout.codes
        if codes == TABLES:
            return constant(self.sums, 0)
        start = load(builder, self.x_sums, self.sums, self._times(self._input(token, unit), 2 * self.layout.lanes))
        if codes == INTEGERS:
            return start
        return builder.mul(start, builder.zext(self._of_groups(self.others, self.other, i8, unit), self.sums))

    def _looked_up(self, unit: Any) -> list[Any]:
        """What the codes of a unit stand for, in the order that `cpu_tables` has."""
        builder, layout = self.builder, self.layout
        at = builder.add(self.at, self._times(unit, layout.unit * layout.bits // 8))
        return cpu_tables.looked_up(builder, self.tables, self.codes, at, layout.bits, layout.lanes)

    def _codes(self, unit: Any) -> list[Any]:
        """The codes of a unit, in the order that `cpu_codes` has."""
        builder, layout = self.builder, self.layout
        count, bits = fields(layout.bits), layout.bits
        base, found = builder.add(self.at, self._times(unit, layout.unit * bits // 8)), []
        for number in range(layout.unit // (count * layout.lanes)):
            at = builder.add(base, integer(number * count * layout.lanes * bits // 8))
            if number * count * layout.lanes * bits // 8 % 64 == 0:
                simd.prefetch(builder, self.codes, builder.add(at, integer(simd.AHEAD)))
            if count == 1:
                found.append(self._straddling(at))
                continue
            words, mask = load(builder, self.codes, self.words, at), constant(self.words, (1 << bits) - 1)
            for field in range(count):
                shifted = builder.lshr(words, constant(self.words, bits * field)) if field else words
                found.append(builder.and_(shifted, mask) if field < count - 1 else shifted)
        return found

    def _straddling(self, at: Any) -> Any:
        """As many codes as there are lanes, where eight of them fill `bits` bytes: each code's two bytes, shifted."""
        builder, bits, octets = self.builder, self.layout.bits, self.layout.lanes // 8
        parts = [load(builder, self.codes, vector(i8, 16), builder.add(at, integer(bits * i))) for i in range(octets)]
        starts = [bits * i for i in range(8)]
        pairs = [16 * o + byte for o in range(octets) for start in starts for byte in (start // 8, start // 8 + 1)]
        words = builder.bitcast(simd.shuffle(builder, simd.join(builder, parts), pairs), self.words)
        lifts = [1 << (16 - bits - start % 8) for start in starts] * octets
        return builder.lshr(builder.mul(words, constant(self.words, lifts)), constant(self.words, 16 - bits))

    def _scale(self, unit: Any, odd: int = 0) -> Any:
        """Of each lane's group."""
        builder, layout = self.builder, self.layout
        if layout.scales == FLOAT32:
            return self._of_groups(self.scales, self.group, f32, unit, odd)
        stored = self._of_groups(self.scales, self.group, i16 if layout.scales == BFLOAT16 else i8, unit, odd)
        words = builder.zext(stored, self.sums)
        if layout.scales == E4M3:  # its exponent is read as one of float32, 120 too small
            words = builder.shl(words, constant(self.sums, 20))
            return builder.fmul(builder.bitcast(words, self.floats), constant(self.floats, 2.0**120))
        if layout.scales == POWER:
            words = builder.sub(words, constant(self.sums, layout.power))
        shift = 16 if layout.scales == BFLOAT16 else 23
        return builder.bitcast(builder.shl(words, constant(self.sums, shift)), self.floats)

    def _of_groups(self, source: Any, start: Any, kind: ir.Type, unit: Any, odd: int = 0) -> Any:
        """What `source` has for the groups of a unit, in the lanes of their columns."""
        builder, layout, count = self.builder, self.layout, self.floats.count
        size = kind.width // 8 if kind is not f32 else 4
        if layout.group_size >= layout.unit:
            group = builder.udiv(unit, integer(layout.group_size // layout.unit))
            return splat(builder, load(builder, source, kind, self._times(builder.add(start, group), size)), count)
        several = layout.unit // layout.group_size
        first = builder.add(start, self._times(unit, several))
        values = load(builder, source, vector(kind, several), self._times(first, size))
        groups = [lane * several // count for lane in range(count)]
        if layout.codes == TABLES and layout.group_size == 16:
            groups = [group // 2 * 2 + odd for group in groups]
        return simd.shuffle(builder, values, groups)

    def _input(self, token: int, unit: Any) -> Any:
        return self.builder.add(self.token, self.builder.add(self._times(self.units, token), unit))

    def _times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, integer(factor))
