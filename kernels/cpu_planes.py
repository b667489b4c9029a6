"""Rows of bit planes on a low-rank scale on the CPU: decoded a few at a time, into the cache nearest to the processor.

Where they go from there is the caller's matter: `kernels.bitstack` has the format, a dense weight and a product.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import in_threads, intrinsic, jit
from compress.kernels import simd
from compress.kernels.cpu_floats import FLOAT32, Layout, float_row
from compress.kernels.decode import store
from compress.kernels.simd import constant, f32, i8, i32, i64, integer, load, splat, vector

ROWS = 4  # that share the factor of the columns in registers
MOST_CHOSEN = 3  # bits of a code whose level is chosen in registers; of longer ones it is looked up


class Form(NamedTuple):
    """What a loop is compiled for. fused: products are added unrounded, and not as every machine gives it."""

    planes: int
    lanes: int
    fused: int


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


def decode(addresses: Any, u: Any, v: Any, floor: float, levels: Any, largest: float, out: Any, dropped: int) -> None:
    """Fills out, (rows, columns) uint16 (dropped 16) or uint32, with the bits of the weights, as every machine does.

    addresses: (planes,) int64, of the planes, each (rows, ceil(columns / 8)) uint8. u: (rows, k) uint16, the bits of
    bfloat16. v: as `interleaved` gives it. levels: (2**(planes - 1),) float32.
    """
    loop = _dense_rows(Form(len(addresses), simd.lanes(), 0))
    numbers = (np.float32(floor), np.float32(largest))
    in_threads(loop, len(out), out.size, addresses, u, v, levels, *numbers, out, dropped)


def product(addresses: Any, u: Any, v: Any, floor: float, levels: Any, largest: float, x: Any, columns: int) -> Any:
    """(tokens, rows) float32. x: (tokens, 128 * n) float32, zeros behind W's columns. The others as in `decode`."""
    out = np.empty((len(x), len(u)), np.float32)
    loop = _product_rows(Form(len(addresses), simd.lanes(), 1), Layout(FLOAT32, 0, 128, simd.lanes(), 1))
    numbers = (np.float32(floor), np.float32(largest))
    width = -(-columns // 8) * 8
    in_threads(loop, len(u), len(u) * width, addresses, u, v, levels, *numbers, x, width, out)
    return out


@cache
def _dense_rows(form: Form) -> Any:
    text = " ".join(map(str, form))

    @jit
    def rows_of(start, stop, addresses, u, v, levels, floor, largest, out, dropped):  # type: ignore[no-untyped-def]
        columns, width = out.shape[1], (out.shape[1] + 7) // 8 * 8
        found = np.empty((ROWS, width), np.float32)
        left = np.empty(ROWS * u.shape[1], np.float32)
        factors = (addresses, left, v.reshape(-1), levels, found.reshape(-1))
        for row in range(start, stop, ROWS):
            _widen(u, row, stop, left)
            plane_rows((floor, largest), factors, (row, stop, u.shape[1], width), text)
            for r in range(min(ROWS, stop - row)):
                store(found[r, :columns], out[row + r], dropped)

    return rows_of


@cache
def _product_rows(form: Form, layout: Layout) -> Any:
    text, how = " ".join(map(str, form)), " ".join(map(str, layout))

    @jit
    def rows_of(start, stop, addresses, u, v, levels, floor, largest, x, width, out):  # type: ignore[no-untyped-def]
        padded = x.shape[1]
        rows = np.zeros(ROWS * width + padded, np.float32)
        left, inputs = np.empty(ROWS * u.shape[1], np.float32), x.reshape(-1)
        factors = (addresses, left, v.reshape(-1), levels, rows)
        codes, steps, found = rows.view(np.uint8), np.zeros(1, np.float32), np.empty(1, np.float32)
        for row in range(start, stop, ROWS):
            _widen(u, row, stop, left)
            plane_rows((floor, largest), factors, (row, stop, u.shape[1], width), text)
            for token in range(x.shape[0]):
                for r in range(min(ROWS, stop - row)):
                    float_row((codes, steps, inputs), (4 * r * width, token * padded, padded), found, how)
                    out[token, row + r] = found[0]

    return rows_of


@jit
def _widen(u, row, stop, left):  # type: ignore[no-untyped-def]
    """The factors of a few rows in float32."""
    rank = u.shape[1]
    for r in range(ROWS):
        source = u[min(row + r, stop - 1)]
        for k in range(rank):
            left[r * rank + k] = np.uint32(np.uint32(source[k]) << np.uint32(16)).view(np.float32)


@intrinsic
def plane_rows(context, limits, arrays, place, form):  # type: ignore[no-untyped-def]
    """Fills the last of `arrays` with ROWS rows, in float32; those behind the last row are that row.

    limits: the floor and the largest weight. arrays: addresses, u of these rows in float32, v,
    levels, and what is filled, all flat. place: the
    first row, the one behind the last, k, and the columns of
    what is filled.
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
        self.addresses, self.u, self.v, self.levels, self.out = pointers
        first, stop, self.rank, self.columns = place
        self.floats, self.words = vector(f32, form.lanes), vector(i32, form.lanes)
        self.floor, self.largest = (splat(builder, limit, form.lanes) for limit in limits)
        last = builder.sub(stop, integer(1))
        rows = [builder.add(first, integer(r)) for r in range(ROWS)]
        self.rows = [builder.select(builder.icmp_signed("<", row, last), row, last) for row in rows]

    def fill(self) -> None:
        builder, step = self.builder, self.form.lanes // 8
        width = builder.udiv(self.columns, integer(8))
        count = builder.udiv(builder.add(width, integer(step - 1)), integer(step))
        end = builder.sub(width, integer(step))
        with cgutils.for_range_slice(builder, integer(0), count, integer(1), inc=True) as (number, _):
            byte = builder.mul(number, integer(step))
            byte = builder.select(builder.icmp_signed("<", byte, end), byte, end)  # the last vector overlaps
            column = builder.mul(byte, integer(8))
            for r, scale in enumerate(self._scales(number)):
                source = builder.add(builder.mul(self.rows[r], width), byte)
                bits = [self._bits(plane, source) for plane in self._planes()]
                weights = self._weights(scale, bits)
                at = builder.mul(builder.add(builder.mul(integer(r), self.columns), column), integer(4))
                target = builder.gep(builder.bitcast(self.out, i8.as_pointer()), [at])
                builder.store(weights, builder.bitcast(target, weights.type.as_pointer()), align=4)

    def _scales(self, number: Any) -> list[Any]:
        """max(u @ v, floor * u0 * v0) of each row, summed in the order of the factors."""
        builder = self.builder
        firsts = [builder.fmul(self._left(row, integer(0)), self._right(integer(0), number)) for row in range(ROWS)]
        sums = [cgutils.alloca_once_value(builder, first) for first in firsts]
        for place, first in zip(sums, firsts, strict=True):
            builder.store(first, place)
        with cgutils.for_range_slice(builder, integer(1), self.rank, integer(1), inc=True) as (factor, _):
            right = self._right(factor, number)
            for row, place in enumerate(sums):
                left, so_far = self._left(row, factor), builder.load(place)
                if self.form.fused:
                    value = simd.fma(builder, left, right, so_far)
                else:
                    value = builder.fadd(so_far, builder.fmul(left, right))
                builder.store(value, place)
        pairs = [(builder.load(place), builder.fmul(f, self.floor)) for place, f in zip(sums, firsts, strict=True)]
        return [builder.select(builder.fcmp_ordered(">", *pair), *pair) for pair in pairs]

    def _left(self, row: int, factor: Any) -> Any:
        builder = self.builder
        at = builder.mul(builder.add(builder.mul(integer(row), self.rank), factor), integer(4))
        return splat(builder, load(builder, self.u, f32, at), self.form.lanes)

    def _right(self, factor: Any, number: Any) -> Any:
        builder = self.builder
        at = builder.add(builder.mul(number, self.rank), factor)
        return load(builder, self.v, self.floats, builder.mul(at, integer(4 * self.form.lanes)))

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
        sign = builder.shl(builder.zext(bits[0], self.words), constant(self.words, 31))
        return builder.bitcast(builder.xor(builder.bitcast(size, self.words), sign), self.floats)

    def _chosen(self, bits: list[Any]) -> Any:
        """The level of the code whose bits these are, the highest first."""
        builder, lanes = self.builder, self.form.lanes
        if len(bits) <= MOST_CHOSEN:
            numbers = [load(builder, self.levels, f32, integer(4 * i)) for i in range(1 << len(bits))]
            known = [splat(builder, number, lanes) for number in numbers]
            for bit in reversed(bits):
                known = [builder.select(bit, high, low) for low, high in zip(known[::2], known[1::2], strict=True)]
            return known[0]
        codes = constant(self.words, 0)
        for bit in bits:
            codes = builder.or_(builder.shl(codes, constant(self.words, 1)), builder.zext(bit, self.words))
        found = ir.Constant(self.floats, ir.Undefined)
        for lane in (ir.Constant(i32, i) for i in range(lanes)):
            at = builder.zext(builder.extract_element(codes, lane), i64)
            found = builder.insert_element(found, load(builder, self.levels, f32, builder.mul(at, integer(4))), lane)
        return found
