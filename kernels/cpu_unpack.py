"""Rows of packed codes as bytes: compiled, many of them at a time."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from compress.formats.compiled import LINE, intrinsic, jit, load64
from compress.kernels import simd
from compress.kernels.simd import constant, i1, i8, i32, integer, splat, vector

TOGETHER = 64  # codes that are unpacked at a time, where the processor does that; room for so many is needed


@jit
def unpack_row(packed, bits, high_first, codes):  # type: ignore[no-untyped-def]
    """packed: bytes of one row; of each 8 * n codes the first lies in the lowest of n * bits bytes. high_first: of each
    two codes of 4 bits the first lies in the higher half of a byte. codes: bytes, a multiple of TOGETHER, at least as
    many as there are codes; those behind them are overwritten too."""
    flipped = 4 if high_first else 0
    if _fields((packed, codes), (packed.shape[0], codes.shape[0] // TOGETHER, bits, flipped)):
        return
    if bits == 8:
        for i in range(packed.shape[0]):
            codes[i] = packed[i]
        return
    if bits == 4:
        low, high = np.uint8(flipped), np.uint8(4 - flipped)
        for i in range(packed.shape[0]):
            codes[2 * i] = packed[i] >> low & np.uint8(15)
            codes[2 * i + 1] = packed[i] >> high & np.uint8(15)
        return
    # The upper half of eight codes moves up to bit 32, then of each four to bit 16, and of each two to bit 8.
    one, two, four = np.uint64(bits), np.uint64(2 * bits), np.uint64(4 * bits)
    ones, twos, fours = _ones(one, 16), _ones(two, 32), _ones(four, 64)
    octets, words = codes.shape[0] // 8, codes.view(np.uint64)
    whole = min(octets, max(0, packed.shape[0] - 8 + bits) // bits)  # of which 8 bytes lie in the row
    for octet in range(whole):
        lane = load64(packed, octet * bits)
        lane = (lane & fours) | ((lane >> four & fours) << np.uint64(32))
        lane = (lane & twos) | ((lane >> two & twos) << np.uint64(16))
        words[octet] = (lane & ones) | ((lane >> one & ones) << np.uint64(8))
    for octet in range(whole, -(-packed.shape[0] // bits)):
        lane = np.uint64(0)
        for i in range(min(bits, packed.shape[0] - octet * bits)):
            lane |= np.uint64(packed[octet * bits + i]) << np.uint64(8 * i)
        for i in range(8):
            codes[8 * octet + i] = np.uint8((lane >> np.uint64(bits * i)) & ((np.uint64(1) << one) - np.uint64(1)))


@intrinsic
def ask_for(context, row):  # type: ignore[no-untyped-def]
    """Asks for the bytes of a row that are soon needed."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        with cgutils.for_range_slice(builder, integer(0), array.nitems, integer(LINE), inc=True) as (at, _):
            simd.prefetch(builder, array.data, at)
        return context.get_dummy_value()

    return numba.void(row), generate


@jit
def _ones(count, every):  # type: ignore[no-untyped-def]
    """64 bits, of which in every so many the lowest `count` are set."""
    found = np.uint64(0)
    for place in range(0, 64, every):
        found |= ((np.uint64(1) << count) - np.uint64(1)) << np.uint64(place)
    return found


@intrinsic
def _fields(context, arrays, sizes):  # type: ignore[no-untyped-def]
    """`unpack_row` of so many vectors of codes. arrays: the packed bytes, and the codes. sizes: how many bytes there
    are, how many vectors, the bits of a code, and what is added to where each begins, without a carry. Returns whether
    that is done, and not where the processor has nothing for it."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if not simd.has_bit_fields():
            return ir.Constant(i1, 0)
        pairs = zip(cgutils.unpack_tuple(builder, arguments[0]), signature.args[0], strict=True)
        packed, codes = (simd.data(context, builder, *pair) for pair in pairs)
        length, vectors, bits, flipped = cgutils.unpack_tuple(builder, arguments[1])
        bytes_ = vector(i8, TOGETHER)

        def every(value: Any) -> Any:
            return splat(builder, builder.trunc(value, i8), TOGETHER)

        def times(numbers: list[int]) -> Any:
            return builder.mul(every(bits), constant(bytes_, numbers))

        lanes = range(TOGETHER)
        octets = builder.add(times([lane // 8 for lane in lanes]), constant(bytes_, [lane % 8 for lane in lanes]))
        begins = builder.xor(times([lane % 8 for lane in lanes]), every(flipped))
        kept = every(builder.sub(builder.shl(integer(1), bits), integer(1)))
        size = builder.mul(bits, integer(TOGETHER // 8))
        with cgutils.for_range_slice(builder, integer(0), vectors, integer(1), inc=True) as (number, _):
            at = builder.mul(number, size)
            simd.prefetch(builder, packed, builder.add(at, integer(simd.AHEAD)))
            found = simd.look_up_bytes(builder, _load(builder, packed, at, builder.sub(length, at)), octets)
            found = builder.and_(simd.bit_fields(builder, found, begins), kept)
            place = builder.gep(builder.bitcast(codes, i8.as_pointer()), [builder.mul(number, integer(TOGETHER))])
            builder.store(found, builder.bitcast(place, bytes_.as_pointer()), align=1)
        return ir.Constant(i1, 1)

    return numba.boolean(arrays, sizes), generate


def _load(builder: Any, base: Any, at: Any, left: Any) -> Any:
    """64 bytes from `at` on, of which there are only `left`: zeros behind these."""
    kind, known = vector(i8, TOGETHER), vector(i1, TOGETHER)
    most = builder.select(builder.icmp_signed("<", left, integer(TOGETHER)), left, integer(TOGETHER))
    ones = builder.lshr(integer(-1), builder.sub(integer(TOGETHER), most))
    mask = builder.select(builder.icmp_signed(">", left, integer(0)), ones, integer(0))
    place = builder.bitcast(builder.gep(builder.bitcast(base, i8.as_pointer()), [at]), kind.as_pointer())
    masked = ir.FunctionType(kind, [place.type, i32, known, kind])
    function = cgutils.get_or_insert_function(builder.module, masked, f"llvm.masked.load.v{TOGETHER}i8.p0")
    return builder.call(function, [place, ir.Constant(i32, 1), builder.bitcast(mask, known), constant(kind, 0)])
