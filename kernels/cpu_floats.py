"""Products with 8-bit floats on the CPU, read as they are stored, and with rows that others have put into its cache.

E4M3 becomes float16 by moving bits (256 times too small), and the processor makes float32 of that. Everything is
float32 then, also the activations.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.core import cgutils
from torch import Tensor

from compress.formats.compiled import intrinsic, jit
from compress.formats.threads import in_threads
from compress.kernels import simd
from compress.kernels.cpu_activations import together
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, load, splat, vector

UNIT = 128  # columns, where groups are not smaller
E4M3_FACTOR = 256.0  # what float16's exponent of the same bits is less
BFLOAT16, E4M3, FLOAT32 = range(3)
ROWS = 16  # that are multiplied with all tokens while they are in the cache


class Layout(NamedTuple):
    """What a loop is compiled for. unit: columns that a scale is for, or that are multiplied at a time."""

    kind: int  # BFLOAT16, E4M3 or FLOAT32
    is_scaled: int  # by a number for each unit: 1 float32, 2 a byte e for 2**(e - 127); 0 not at all
    unit: int
    lanes: int
    tokens: int


def can_run(group_size: int) -> bool:
    """Whether this processor converts float16 by itself, and groups are made of whole vectors."""
    known = simd.features()
    return ("f16c" in known or "fp16" in known or "neon" in known) and group_size % 32 == 0


def e4m3(x: Tensor, codes: Tensor, scales: Tensor | None, group_size: int, rows: int = 1) -> Tensor:
    """x @ W.T in float32, W = code * scale. None of the codes may be NaN.

    x: (tokens, columns) bf16, fp16 or fp32. codes: (height, columns) uint8. scales: (n, groups) float32, or uint8 e for
    2**(e - 127), for `rows` rows each and `group_size` columns, a multiple of 32; None for 1.
    """
    size = min(group_size, UNIT) if scales is not None else UNIT
    kind = 0 if scales is None else 1 + (scales.dtype == torch.uint8)
    layout = Layout(E4M3, kind, size, simd.lanes(), together(len(x)))
    steps = np.zeros((1, 1), np.float32) if scales is None else scales.contiguous().numpy()
    height, columns = codes.shape
    inputs = inputs_of(x, size, layout.tokens)
    out = np.zeros((len(inputs), height), np.float32)
    arguments = (codes.contiguous().numpy(), steps, rows, max(1, group_size // size), inputs, out)
    in_threads(_e4m3_rows(layout), height, height * columns * len(x), *arguments)
    return torch.from_numpy(out[: len(x)]).mul_(E4M3_FACTOR)


def inputs_of(x: Tensor, size: int, tokens: int) -> Any:
    """In float32, with zeros behind the last column and the last token."""
    missing, wide = (0, -x.shape[1] % size, 0, -len(x) % tokens), x.detach().float()
    return (F.pad(wide, missing) if any(missing) else wide).contiguous().numpy()


@cache
def _e4m3_rows(layout: Layout) -> Any:
    text, size, tokens, slack = " ".join(map(str, layout)), layout.unit, layout.tokens, layout.unit + 64
    is_scaled, are_powers = layout.is_scaled > 0, layout.is_scaled == 2

    @jit
    def rows_of(start, stop, codes, scales, share, units_of_group, x, out):  # type: ignore[no-untyped-def]
        (height, width), groups, padded = codes.shape, scales.shape[1], x.shape[1]
        whole = height - (slack + width - 1) // width  # rows behind which there is enough to read
        last, found = np.zeros(width + slack, np.uint8), np.empty(tokens, np.float32)
        steps = np.zeros(max(padded // size, groups * units_of_group) + 1, np.float32)
        inputs, everything = x.reshape(-1), codes.reshape(-1)
        for first in range(start, stop, ROWS):
            for token in range(0, x.shape[0], tokens):
                for row in range(first, min(first + ROWS, stop)):
                    source, at = everything, row * width
                    if row >= whole:
                        last[:width] = codes[row]
                        source, at = last, 0
                    if is_scaled:
                        for group in range(groups):
                            step = scales[row // share, group]
                            factor = np.uint32(np.uint32(step) << np.uint32(23)).view(np.float32)
                            if not are_powers:
                                factor = np.float32(step)
                            for i in range(units_of_group):
                                steps[group * units_of_group + i] = factor
                    float_row((source, steps, inputs), (at, token * padded, padded), found, text)
                    for t in range(tokens):
                        out[token + t, row] = found[t]

    return rows_of


@intrinsic
def float_row(context, arrays, place, found, layout):  # type: ignore[no-untyped-def]
    """found[t] = a row times token t. arrays: codes uint8, a scale for each unit, x. place: where row and tokens begin,
    and the columns of a token."""
    chosen = Layout(*map(int, layout.literal_value.split()))

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        values = cgutils.unpack_tuple(builder, arguments[0])
        pairs = zip(values, signature.args[0], strict=True)
        codes, scales, x = (simd.data(context, builder, *pair) for pair in pairs)
        at, first, columns = cgutils.unpack_tuple(builder, arguments[1])
        floats, lanes = vector(f32, chosen.lanes), chosen.lanes
        totals = [cgutils.alloca_once_value(builder, constant(floats, 0.0)) for _ in range(chosen.tokens)]

        def times(value: Any, factor: int) -> Any:
            return builder.mul(value, integer(factor))

        units = builder.udiv(columns, integer(chosen.unit))
        with cgutils.for_range_slice(builder, integer(0), units, integer(1), inc=True) as (unit, _):
            sums = [constant(floats, 0.0) if chosen.is_scaled else builder.load(place) for place in totals]
            column = times(unit, chosen.unit)
            for number in range(chosen.unit // lanes):
                here = builder.add(column, integer(number * lanes))
                weights = _weights(builder, chosen, codes, at, here)
                for token in range(chosen.tokens):
                    offset = builder.add(first, builder.add(times(columns, token), here))
                    sums[token] = simd.fma(builder, weights, load(builder, x, floats, times(offset, 4)), sums[token])
            scale = splat(builder, load(builder, scales, f32, times(unit, 4)), lanes) if chosen.is_scaled else None
            for place, value in zip(totals, sums, strict=True):
                builder.store(value if scale is None else simd.fma(builder, value, scale, builder.load(place)), place)
        result = simd.data(context, builder, arguments[2], signature.args[2])
        for token, place in enumerate(totals):
            builder.store(simd.total(builder, builder.load(place)), builder.gep(result, [integer(token)]))
        return context.get_dummy_value()

    return numba.void(arrays, place, found, layout), generate


def _weights(builder: Any, layout: Layout, codes: Any, at: Any, column: Any) -> Any:
    """The weights of as many columns as there are lanes, float32."""
    lanes, floats = layout.lanes, vector(f32, layout.lanes)
    if layout.kind == FLOAT32:
        return load(builder, codes, floats, builder.add(at, builder.mul(column, integer(4))))
    if layout.kind == BFLOAT16:
        offset = builder.add(at, builder.mul(column, integer(2)))
        words = builder.zext(load(builder, codes, vector(i16, lanes), offset), vector(i32, lanes))
        return builder.bitcast(builder.shl(words, constant(words.type, 16)), floats)
    offset = builder.add(at, column)
    simd.prefetch(builder, codes, builder.add(offset, integer(simd.AHEAD)))
    return _halves(builder, codes, offset, lanes)


def _halves(builder: Any, codes: Any, at: Any, count: int) -> Any:
    """E4M3 as float32, 256 times too small; NaN as a number."""
    words = builder.sext(load(builder, codes, vector(i8, count), at), vector(i16, count))
    halves = builder.and_(builder.shl(words, constant(words.type, 7)), constant(words.type, 0xBFFF))
    return builder.fpext(builder.bitcast(halves, vector(ir.HalfType(), count)), vector(f32, count))


@intrinsic
def widen(context, codes, values, count):  # type: ignore[no-untyped-def]
    """values[i] = codes[i], E4M3 as float32, NaN too, for whole vectors. Returns how many codes these are."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, target = (simd.data(context, builder, arguments[i], signature.args[i]) for i in range(2))
        lanes = simd.lanes() // 2
        wide = vector(i32, lanes)

        def of(value: int) -> Any:
            return constant(wide, value)

        end = builder.and_(arguments[2], integer(-lanes))
        with cgutils.for_range_slice(builder, integer(0), end, integer(lanes), inc=True) as (at, _):
            words = builder.zext(load(builder, source, vector(i8, lanes), at), wide)
            size, sign = builder.and_(words, of(0x7F)), builder.shl(builder.and_(words, of(0x80)), of(24))
            normal = builder.add(builder.shl(size, of(20)), of(120 << 23))  # its exponent is 120 less than float32's
            small = builder.fmul(builder.uitofp(size, vector(f32, lanes)), constant(vector(f32, lanes), 2.0**-9))
            found = builder.select(builder.icmp_unsigned("<", size, of(8)), builder.bitcast(small, wide), normal)
            found = builder.select(builder.icmp_unsigned("==", size, of(0x7F)), of(0x7FC00000), found)
            place = builder.gep(builder.bitcast(target, i32.as_pointer()), [at])
            builder.store(builder.or_(found, sign), builder.bitcast(place, wide.as_pointer()), align=1)
        return end

    return numba.int64(codes, values, count), generate


@jit
def widen_groups(codes, scales, group_size, out):  # type: ignore[no-untyped-def]
    """out[i] = codes[i] * scale in float32, E4M3 and NaN too, as words of bfloat16, of as many whole groups as that can
    be done for in vectors: their number. scales: float32, of each group."""
    if group_size % 32:
        return 0
    for i in range(scales.shape[0]):
        size = abs(scales[i])
        if not (np.float32(2.0**-80) <= size <= np.float32(2.0**100)) and size != 0:
            return 0  # products may be subnormal
    return _widen_groups((codes, scales, out), (min(scales.shape[0], out.shape[0] // group_size), group_size))


@intrinsic
def _widen_groups(context, arrays, sizes):  # type: ignore[no-untyped-def]
    """`widen_groups` of so many groups of such a size. Returns their number, 0 where the processor cannot round so."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if not simd.has_dots():
            return integer(0)
        pairs = zip(cgutils.unpack_tuple(builder, arguments[0]), signature.args[0], strict=True)
        codes, scales, out = (simd.data(context, builder, *pair) for pair in pairs)
        groups, size = cgutils.unpack_tuple(builder, arguments[1])
        bytes_, words, nan = vector(i8, 32), vector(i16, 32), 0x7F
        with cgutils.for_range_slice(builder, integer(0), groups, integer(1), inc=True) as (group, _):
            scale = splat(builder, load(builder, scales, f32, builder.mul(group, integer(4))), 16)
            scale = builder.fmul(scale, constant(scale.type, E4M3_FACTOR))
            start = builder.mul(group, size)
            end = builder.add(start, size)
            with cgutils.for_range_slice(builder, start, end, integer(32), inc=True) as (at, _):
                parts = [_halves(builder, codes, builder.add(at, integer(i)), 16) for i in (0, 16)]
                found = simd.bfloat16(builder, [builder.fmul(part, scale) for part in parts])
                sizes = builder.and_(load(builder, codes, bytes_, at), constant(bytes_, nan))
                is_nan = builder.icmp_unsigned("==", sizes, constant(bytes_, nan))
                found = builder.select(is_nan, constant(words, 0x7FC0), found)
                place = builder.gep(builder.bitcast(out, i16.as_pointer()), [at])
                builder.store(found, builder.bitcast(place, words.as_pointer()), align=1)
        return groups

    return numba.int64(arrays, sizes), generate
