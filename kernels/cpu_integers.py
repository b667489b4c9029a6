"""Products with integers of 2 to 8 bits in groups on the CPU, read as they are stored: no weight is decoded.

Codes are unpacked in registers, 16 bits each, and multiplied with activations of 16 bits (`cpu_activations`); sums are
exact up to the end of a unit of columns, and are then scaled in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils
from torch import Tensor

from compress.formats.compiled import in_threads, intrinsic, jit
from compress.kernels import simd
from compress.kernels.cpu_activations import quantize, together
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, load, splat, vector

LIMIT = 32767
MOST_UNIT = 128  # columns whose products are added before they are scaled
ROWS, COLUMNS = 16, 2048  # a part of the weight that stays in the cache for all tokens
BFLOAT16, FLOAT32, POWER = range(3)  # what scales are stored as; POWER: the byte e stands for 2**(e - 127)


class Layout(NamedTuple):
    """What a loop is compiled for. unit: columns. lanes: of 16 bits. kind: of the scales. tokens: at a time."""

    bits: int
    group_size: int
    unit: int
    lanes: int
    kind: int
    has_zeros: int
    power: int
    tokens: int


def fields(bits: int) -> int:
    """Codes in 16 bits that no shift cuts; 1 for those that straddle bytes."""
    return 16 // bits if bits in (2, 4, 8) else 1


def unit(bits: int, group_size: int) -> int | None:
    """Columns that are added as integers: whole groups, or a part of one. None where groups do not suit vectors."""
    least = fields(bits) * simd.lanes()
    if least % group_size == 0 and group_size % (2 * fields(bits)) == 0:
        return least
    return next((size for size in (MOST_UNIT, MOST_UNIT // 2, least) if group_size % size == 0 and size >= least), None)


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    power: int = 0,
) -> Tensor | None:
    """x @ W.T in float32, W = (code - zero) * scale. None where x has numbers that `quantize` does not take.

    x: (tokens, columns) bf16, fp16 or fp32. packed: (rows, bytes) uint8, `bits` bits for each column, low bits first.
    scales: (rows, groups) bf16 or fp32, finite; or uint8, whose number e stands for 2**(e - 127 - power). zeros:
    (rows, groups) uint8, or None for 2**(bits - 1). group_size: `unit` takes it; a single group may be of any size.
    """
    lanes, (rows, groups), columns = simd.lanes(), scales.shape, x.shape[1]
    group_size = group_size if groups > 1 else -(-columns // MOST_UNIT) * MOST_UNIT * fields(bits)
    size = unit(bits, group_size)
    if size is None:
        raise ValueError(f"groups of {group_size} values of {bits} bits have no kernel here")
    order = _order(columns, fields(bits), lanes, size)
    half = 1 << (bits - 1)
    found = quantize(x, order, size, LIMIT, lanes, -half if zeros is None else -1)
    if found is None:
        return None
    kind = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32, torch.uint8: POWER}[scales.dtype]
    scales = scales.contiguous()
    stored = scales.view(torch.int16).numpy().view(np.uint16) if kind == BFLOAT16 else scales.numpy()
    offsets = np.zeros((1, 1), np.uint8) if zeros is None else zeros.contiguous().numpy()
    out = np.zeros((len(found.x), rows), np.float32)
    loop = _kernel(Layout(bits, group_size, size, lanes, kind, int(zeros is not None), power, together(len(x))))
    arguments = (packed.contiguous().numpy(), stored, offsets, found.x, found.scales, found.sums, out)
    in_threads(loop, rows, rows * columns * len(x), *arguments)
    return torch.from_numpy(out[: len(x)])


@cache
def _order(columns: int, count: int, lanes: int, size: int) -> Any:
    """Field j of lane l of a vector is column count * l + j; the vectors of the fields follow one another."""
    padded = -(-columns // size) * size
    return np.arange(padded).reshape(-1, lanes, count).transpose(0, 2, 1).reshape(-1).copy()


@cache
def _kernel(layout: Layout) -> Any:
    """The loop over rows for one layout: numba compiles it when it is first called, and keeps it on disk."""
    bits, group_size, size, _, _, has_zeros, _, tokens = layout
    text = " ".join(map(str, layout))
    slack = 16 + size * bits // 8  # bytes that may be read behind a row
    more = max(1, size // group_size)  # and scales

    @jit
    def rows_of(start, stop, packed, scales, zeros, x, x_scales, x_sums, out):  # type: ignore[no-untyped-def]
        (height, width), groups, units = packed.shape, scales.shape[1], x_scales.shape[1]
        step = units if x.shape[0] == 1 else COLUMNS // size
        whole = height - (slack + width - 1) // width  # rows behind which there is enough to read
        last, last_scales = np.zeros(width + slack, np.uint8), np.zeros(groups + more, scales.dtype)
        last_zeros, found = np.zeros(groups + more, np.uint8), np.empty(tokens, np.float32)
        all_codes, all_scales, all_zeros = packed.reshape(-1), scales.reshape(-1), zeros.reshape(-1)
        inputs = (x.reshape(-1), x_scales.reshape(-1), x_sums.reshape(-1))
        for first in range(start, stop, ROWS):
            for token in range(0, x.shape[0], tokens):
                for begin in range(0, units, step):
                    for row in range(first, min(first + ROWS, stop)):
                        weights, at, group = (all_codes, all_scales, all_zeros), row * width, row * groups
                        if row >= whole:
                            last[:width], last_scales[:groups] = packed[row], scales[row]
                            if has_zeros:
                                last_zeros[:groups] = zeros[row]
                            weights, at, group = (last, last_scales, last_zeros), 0, 0
                        place = (at, group, token * units, units, begin, min(begin + step, units))
                        _row(weights, inputs, place, found, text)
                        for t in range(tokens):
                            out[token + t, row] += found[t]

    return rows_of


@intrinsic
def _row(context, weights, inputs, place, found, layout):  # type: ignore[no-untyped-def]
    """found[t] = the product of a part of a row with token t. place: where codes and groups of the row begin; of the
    tokens the first unit, and how many units each has; the first unit of the part, and the one behind it."""
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
        self.codes, self.scales, self.zeros = weights
        self.x, self.x_scales, self.x_sums = inputs
        self.at, self.group, self.token, self.units, self.begin, self.end = place
        self.words = vector(i16, layout.lanes)
        self.sums = vector(i32, layout.lanes // 2)
        self.floats = vector(f32, layout.lanes // 2)

    def product(self) -> list[Any]:
        """The sums of each token."""
        builder = self.builder
        totals = [cgutils.alloca_once_value(builder, constant(self.floats, 0.0)) for _ in range(self.layout.tokens)]
        with cgutils.for_range_slice(builder, self.begin, self.end, integer(1), inc=True) as (unit, _):
            products, scale = self._unit(unit), self._scale(unit)
            for token, place in enumerate(totals):
                factor = load(builder, self.x_scales, f32, self._times(self._input(token, unit), 4))
                factors = builder.fmul(scale, splat(builder, factor, self.floats.count))
                product = builder.sitofp(products[token], self.floats)
                builder.store(simd.fma(builder, product, factors, builder.load(place)), place)
        return [simd.total(builder, builder.load(place)) for place in totals]

    def _unit(self, unit: Any) -> list[Any]:
        """Sums of (code - zero) * x over a unit, of each token: int32."""
        builder, layout = self.builder, self.layout
        sums = [self._start(token, unit) for token in range(layout.tokens)]
        for number, codes in enumerate(self._codes(unit)):
            for token in range(layout.tokens):
                at = self._times(self._input(token, unit), 2 * layout.unit)
                x = load(builder, self.x, self.words, builder.add(at, integer(2 * layout.lanes * number)))
                sums[token] = builder.add(sums[token], simd.madd(builder, codes, x))
        return sums

    def _start(self, token: int, unit: Any) -> Any:
        """What codes that begin at zero add too much, taken away."""
        builder = self.builder
        start = load(builder, self.x_sums, self.sums, self._times(self._input(token, unit), 2 * self.layout.lanes))
        if not self.layout.has_zeros:
            return start
        return builder.mul(start, builder.zext(self._of_groups(self.zeros, i8, unit), self.sums))

    def _codes(self, unit: Any) -> list[Any]:
        """The codes of a unit, in the order that `_order` has."""
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
        while len(parts) > 1:
            parts = [_join(builder, low, high) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        starts = [bits * i for i in range(8)]
        pairs = [16 * o + byte for o in range(octets) for start in starts for byte in (start // 8, start // 8 + 1)]
        words = builder.bitcast(simd.shuffle(builder, parts[0], pairs), self.words)
        lifts = [1 << (16 - bits - start % 8) for start in starts] * octets
        return builder.lshr(builder.mul(words, constant(self.words, lifts)), constant(self.words, 16 - bits))

    def _scale(self, unit: Any) -> Any:
        """Of each lane's group."""
        builder, layout = self.builder, self.layout
        if layout.kind == FLOAT32:
            return self._of_groups(self.scales, f32, unit)
        stored = self._of_groups(self.scales, i16 if layout.kind == BFLOAT16 else i8, unit)
        words = builder.zext(stored, self.sums)
        if layout.kind == POWER:
            words = builder.sub(words, constant(self.sums, layout.power))
        shift = 16 if layout.kind == BFLOAT16 else 23
        return builder.bitcast(builder.shl(words, constant(self.sums, shift)), self.floats)

    def _of_groups(self, source: Any, kind: ir.Type, unit: Any) -> Any:
        """What `source` has for the groups of a unit, in the lanes of their columns."""
        builder, layout, count = self.builder, self.layout, self.floats.count
        size = kind.width // 8 if kind is not f32 else 4
        if layout.group_size >= layout.unit:
            group = builder.udiv(unit, integer(layout.group_size // layout.unit))
            return splat(builder, load(builder, source, kind, self._times(builder.add(self.group, group), size)), count)
        several = layout.unit // layout.group_size
        first = builder.add(self.group, self._times(unit, several))
        values = load(builder, source, vector(kind, several), self._times(first, size))
        return simd.shuffle(builder, values, [lane * several // count for lane in range(count)])

    def _input(self, token: int, unit: Any) -> Any:
        return self.builder.add(self.token, self.builder.add(self._times(self.units, token), unit))

    def _times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, integer(factor))


def _join(builder: Any, low: Any, high: Any) -> Any:
    """Two vectors, one behind the other."""
    return builder.shuffle_vector(low, high, constant(vector(i32, 2 * low.type.count), range(2 * low.type.count)))
