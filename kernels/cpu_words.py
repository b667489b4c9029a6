"""Products with losslessly coded bfloat16 on the CPU.

Where rows are whole blocks, words are decoded in registers, 32 at a time, and multiplied there, with inputs in bfloat16
as they are where the processor does that (it takes subnormal numbers for zero). All escapes have code 0 then: the
differences that they make are added behind. Other rows, and those of many escapes (zeros, for which nothing may remain
of two large sums), are decoded into the cache nearest to the processor, and multiplied from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, reduce
from typing import Any

import numba
import numpy as np
import torch
from numba.core import cgutils
from torch import Tensor

from compress.formats import fixed
from compress.formats.compiled import intrinsic, jit
from compress.formats.huffman import CHUNK
from compress.formats.threads import in_threads
from compress.kernels import simd
from compress.kernels.cpu_activations import together
from compress.kernels.cpu_floats import BFLOAT16, UNIT, Layout, float_row, inputs_of
from compress.kernels.simd import constant, f32, i8, i16, i32, integer, load, splat, vector

STEP = 32  # words that are decoded at a time: the bytes of a vector
FEW = 8  # escapes, more than most blocks have
MOST_ESCAPES = 1 / 8  # of a row that is multiplied as it is decoded
MOST_BASE = 192  # of such words, so that no sum overflows which is taken away again


def product(
    base: int, codes: Tensor, counts: Tensor, starts: Tensor, escapes: Tensor, rest: Tensor
) -> Callable[[Tensor], Tensor | None]:
    """What multiplies with the bfloat16 words that `formats.fixed` coded, W, bit for bit: escapes have code 0.

    rest: (height, columns) uint8. starts: (height,) int64, how many escapes are before the block that each row begins
    in. The others as `fixed.decode` takes them. Returned is a function of x, (tokens, columns) bf16, fp16 or fp32: it
    gives x @ W.T in float32, or None where x is not finite, as infinity less infinity is no number.
    """
    height, columns = rest.shape
    arrays = [array.contiguous().numpy() for array in (codes.view(-1, fixed.BLOCK_BYTES), counts, starts, escapes)]
    stored = (np.uint8(base), *arrays, rest.contiguous().view(-1).numpy())

    def run(x: Tensor) -> Tensor | None:
        layout = Layout(BFLOAT16, 0, UNIT, simd.lanes(), together(len(x)))
        inputs = inputs_of(x, UNIT, layout.tokens)
        dots = x.dtype == torch.bfloat16 and simd.has_dots()
        ordered = np.empty(inputs.shape, np.uint16 if dots else np.float32)
        if not (_words if dots else _mix)(inputs.reshape(-1), ordered.reshape(-1)):
            return None
        out = np.zeros((len(inputs), height), np.float32)
        in_threads(_fixed_rows(layout, dots), height, height * columns * len(x), columns, *stored, inputs, ordered, out)
        return torch.from_numpy(out[: len(x)])

    return run


@jit
def _mix(x, mixed):  # type: ignore[no-untyped-def]
    """Puts numbers into the order of `_floats`; whether all of them are finite."""
    for first in range(0, x.shape[0], STEP):
        for half in range(2):
            for q in range(4):
                for i in range(4):
                    mixed[first + 8 * q + 4 * half + i] = x[first + 16 * half + 4 * q + i]
    return _is_finite(x)


@jit
def _words(x, words):  # type: ignore[no-untyped-def]
    """The bits of numbers that are bfloat16; whether all of them are finite."""
    bits = x.view(np.uint32)
    for i in range(words.shape[0]):
        words[i] = bits[i] >> np.uint32(16)
    return _is_finite(x)


@jit
def _is_finite(x):  # type: ignore[no-untyped-def]
    largest = np.uint32(0)
    bits = x.view(np.uint32)
    for i in range(bits.shape[0]):  # as integers: what is not finite is larger than any number
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return largest < 0x7F800000


@cache
def _fixed_rows(layout: Layout, dots: bool) -> Any:
    text, tokens, form = " ".join(map(str, layout)), layout.tokens, f"{layout.tokens} {int(dots)}"

    @jit
    def rows_of(start, stop, columns, base, packed, counts, starts, escapes, rest, x, ordered, out):  # type: ignore[no-untyped-def]
        padded, total, codes = x.shape[1], rest.shape[0], packed.reshape(-1)
        words = np.zeros(columns + padded + 2 * fixed.BLOCK, np.uint16)
        found, steps, inputs = np.empty(tokens, np.float32), np.zeros(1, np.float32), x.reshape(-1)
        in_order, is_whole = ordered.reshape(-1), columns % fixed.BLOCK == 0 and base < MOST_BASE
        blocks, begins = columns // fixed.BLOCK, np.empty(columns + FEW, np.int64)
        for row in range(start, stop):
            block, position = row * columns // fixed.BLOCK, starts[row]
            if is_whole:
                few = 0
                for number in range(block, block + blocks):
                    few += counts[number]
                if few <= columns * MOST_ESCAPES:
                    first = row * columns
                    for token in range(0, x.shape[0], tokens):
                        spot = (block * fixed.BLOCK_BYTES, first, blocks, token * padded, padded)
                        _whole_row((codes, rest, in_order), spot, base, found, form)
                        for t in range(tokens):
                            out[token + t, row] = found[t]
                    _columns(counts, block, blocks, begins)
                    part, low = escapes[position : position + few], rest[first : first + columns]
                    for token in range(x.shape[0]):
                        out[token, row] += _escaped(base, part, low, begins, x[token])
                    continue
            at = row * columns - block * fixed.BLOCK
            for place in range(0, at + columns, fixed.BLOCK):
                behind = position + counts[block]
                if (block + 1) * fixed.BLOCK <= total:
                    _block(words, place, codes, block * fixed.BLOCK_BYTES, rest, block * fixed.BLOCK, base)
                    _put(escapes[position:behind], words[place : place + fixed.BLOCK])
                else:
                    low = rest[block * fixed.BLOCK :]
                    part = words[place : place + low.shape[0]]
                    fixed._decode_block(base, packed[block], escapes[position:behind], low, part)
                block, position = block + 1, behind
            words[at + columns :] = 0  # NaN among what follows would not vanish with an input of zero
            for token in range(0, x.shape[0], tokens):
                float_row((words.view(np.uint8), steps, inputs), (2 * at, token * padded, padded), found, text)
                for t in range(tokens):
                    out[token + t, row] = found[t]

    return rows_of


@jit
def decode_chunks(start, stop, base, packed, offsets, escapes, rest, which, total, out):  # type: ignore[no-untyped-def]
    """For `fixed.decode`: whole blocks in registers."""
    codes, last = packed.reshape(-1), packed.shape[0]
    for slot in range(start, stop):
        first = which[slot] * CHUNK // fixed.BLOCK
        for block in range(first, min(first + CHUNK // fixed.BLOCK, last)):
            place, begin = slot * CHUNK + (block - first) * fixed.BLOCK, block * fixed.BLOCK
            found = escapes[offsets[block] : offsets[block + 1]]
            low = rest[begin : min(begin + fixed.BLOCK, total)]
            words = out[place : place + low.size]
            if low.size == fixed.BLOCK:
                _block(out, place, codes, block * fixed.BLOCK_BYTES, rest, begin, base)
                _put(found, words)
            else:
                fixed._decode_block(base, packed[block], found, low, words)


@jit
def _put(escapes, words):  # type: ignore[no-untyped-def]
    """Writes their symbols over the words of a whole block."""
    for escape in escapes:
        i = np.int64(escape >> np.uint16(8))
        words[i] = (words[i] & np.uint16(0x807F)) | ((escape & np.uint16(255)) << np.uint16(7))


@jit
def _columns(counts, block, blocks, columns):  # type: ignore[no-untyped-def]
    """Fills columns, (columns + FEW,) int64, with where the block of each escape of a row begins: how many there are.

    Without branches, which would be guessed wrong: some too many, until the next block.
    """
    few = 0
    for number in range(blocks):
        for i in range(FEW):
            columns[few + i] = number * fixed.BLOCK
        count = np.int64(counts[block + number])
        for i in range(FEW, count):
            columns[few + i] = number * fixed.BLOCK
        few += count
    return few


@jit
def _escaped(base, escapes, rest, columns, x):  # type: ignore[no-untyped-def]
    """By how much the products of a row's escapes are more than those of words with code 0. rest: of the row."""
    a = b = c = d = np.float32(0)  # sums that do not wait for one another
    count, bottom = escapes.shape[0], np.uint32(base) << np.uint32(23)
    for i in range(0, count - 3, 4):
        a += _more(i, bottom, escapes, rest, columns, x)
        b += _more(i + 1, bottom, escapes, rest, columns, x)
        c += _more(i + 2, bottom, escapes, rest, columns, x)
        d += _more(i + 3, bottom, escapes, rest, columns, x)
    for i in range(count // 4 * 4, count):
        a += _more(i, bottom, escapes, rest, columns, x)
    return (a + b) + (c + d)


@jit
def _more(i, bottom, escapes, rest, columns, x):  # type: ignore[no-untyped-def]
    escape = np.uint32(escapes[i])
    column = columns[i] + np.int64(escape >> np.uint32(8))
    low = np.uint32(rest[column])
    bits = ((low & np.uint32(0x80)) << np.uint32(24)) | ((low & np.uint32(0x7F)) << np.uint32(16))
    right = np.uint32(bits | ((escape & np.uint32(255)) << np.uint32(23))).view(np.float32)
    return (right - np.uint32(bits | bottom).view(np.float32)) * x[column]


@intrinsic
def _whole_row(context, arrays, place, base, found, form):  # type: ignore[no-untyped-def]
    """found[t] = a row of whole blocks times token t, escapes aside. arrays: codes, the other bits, inputs: float32 in
    the order of `_floats`, or words of bfloat16. place: where codes and bits of the row begin, its blocks, the first
    token, the columns of a token. form: tokens, and whether inputs are words, as text."""
    count, dots = map(int, form.literal_value.split())

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pairs = zip(cgutils.unpack_tuple(builder, arguments[0]), signature.args[0], strict=True)
        packed, rest, x = (simd.data(context, builder, *pair) for pair in pairs)
        code, low, blocks, token, padded = cgutils.unpack_tuple(builder, arguments[1])
        chains = 4 if count == 1 else 1  # sums that do not wait for one another
        floats, wide, size = vector(f32, STEP // (2 if dots else 4)), vector(i32, STEP // 2), 2 if dots else 4
        totals = [
            [cgutils.alloca_once_value(builder, constant(floats, 0.0)) for _ in range(chains)] for _ in range(count)
        ]

        def added(sums: Any, weights: Any, values: Any) -> Any:
            return simd.dot(builder, sums, weights, values) if dots else simd.fma(builder, weights, values, sums)

        with cgutils.for_range_slice(builder, integer(0), blocks, integer(1), inc=True) as (block, _):
            words = builder.mul(block, integer(fixed.BLOCK))
            codes = builder.gep(packed, [builder.add(code, builder.mul(block, integer(fixed.BLOCK_BYTES)))])
            lows = builder.gep(rest, [builder.add(low, words)])
            for number, (lower, upper) in enumerate(_bytes(builder, codes, lows, arguments[2])):
                joined = [builder.bitcast(_joined(builder, lower, upper), wide)] if dots else None
                for q, weights in enumerate(joined or _floats(builder, lower, upper)):
                    for t, sums in enumerate(totals):
                        column = builder.add(words, integer(STEP * number + STEP // 4 * q))
                        at = builder.add(builder.add(token, builder.mul(padded, integer(t))), column)
                        values = load(builder, x, weights.type, builder.mul(at, integer(size)))
                        chain = sums[(number if dots else q) % chains]
                        builder.store(added(builder.load(chain), weights, values), chain)
        result = simd.data(context, builder, arguments[3], signature.args[3])
        for t, sums in enumerate(totals):
            whole = reduce(builder.fadd, map(builder.load, sums))
            builder.store(simd.total(builder, whole), builder.gep(result, [integer(t)]))
        return context.get_dummy_value()

    return numba.void(arrays, place, base, found, form), generate


@intrinsic
def _block(context, words, place, packed, code, rest, low, base):  # type: ignore[no-untyped-def]
    """Decodes a whole block into words[place:], escapes aside: `fixed._decode_block` in vectors of bytes.

    Its codes are packed[code:], and its other bits rest[low:].
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kinds = signature.args
        pairs = [(simd.data(context, builder, arguments[i], kinds[i]), arguments[i + 1]) for i in (0, 2, 4)]
        start, codes, lows = (builder.gep(base, [offset]) for base, offset in pairs)
        for number, (lower, upper) in enumerate(_bytes(builder, codes, lows, arguments[6])):
            both = _joined(builder, lower, upper)
            at = builder.gep(start, [integer(STEP * number)])
            builder.store(both, builder.bitcast(at, both.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return numba.void(words, place, packed, code, rest, low, base), generate


def _bytes(builder: Any, codes: Any, lows: Any, base: Any) -> Iterator[tuple[Any, Any]]:
    """The lower and the upper bytes of the words of a block, 32 at a time, escapes aside."""
    bytes_, halves = vector(i8, STEP), vector(i16, STEP // 2)

    def moved(value: Any, by: int, mask: int) -> Any:
        """The bits of every byte moved up, or down where negative; of these the ones in the mask."""
        wide = builder.bitcast(value, halves)
        if by:
            wide = (builder.shl if by > 0 else builder.lshr)(wide, constant(halves, abs(by)))
        return builder.and_(builder.bitcast(wide, bytes_), constant(bytes_, mask))

    first = splat(builder, base, STEP)
    high = load(builder, codes, bytes_, integer(64))
    for line in range(0, fixed.BLOCK, 64):
        simd.prefetch(builder, lows, integer(line + simd.AHEAD))
    for line in range(0, fixed.BLOCK_BYTES, 64):
        simd.prefetch(builder, codes, integer(line + simd.AHEAD * fixed.BLOCK_BYTES // fixed.BLOCK))
    for number in range(fixed.BLOCK // STEP):
        two = load(builder, codes, bytes_, integer(STEP * number % 64))
        code = builder.or_(moved(two, -2 * (number // 2), 3), moved(high, 2 - number, 4))
        symbol = builder.add(code, first)
        rest_bits = load(builder, lows, bytes_, integer(STEP * number))
        lower = builder.or_(moved(rest_bits, 0, 0x7F), moved(symbol, 7, 0x80))
        upper = builder.or_(moved(rest_bits, 0, 0x80), moved(symbol, -1, 0x7F))
        yield lower, upper


def _joined(builder: Any, lower: Any, upper: Any) -> Any:
    """The bytes of words in their order."""
    order = constant(vector(i32, 2 * STEP), [i + source for i in range(STEP) for source in (0, STEP)])
    return builder.shuffle_vector(lower, upper, order)


def _floats(builder: Any, lower: Any, upper: Any) -> Iterator[Any]:
    """Words of those bytes in float32: 4 q to 4 q + 3 and 16 + 4 q to 19 + 4 q, for q from 0 to 3."""
    for first in (0, 1):
        words = builder.bitcast(_interleaved(builder, lower, upper, first), vector(i16, STEP // 2))
        for second in (0, 1):
            whole = _interleaved(builder, constant(words.type, 0), words, second)
            yield builder.bitcast(whole, vector(f32, STEP // 4))


def _interleaved(builder: Any, low: Any, high: Any, half: int) -> Any:
    """Elements of two vectors of 32 bytes in turn, of one half of each 16 bytes: what processors do at once."""
    count = low.type.count
    places = [lane * count // 2 + half * count // 4 + i for lane in (0, 1) for i in range(count // 4)]
    return builder.shuffle_vector(low, high, constant(vector(i32, count), [i + v for i in places for v in (0, count)]))
