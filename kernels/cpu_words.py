"""Products with losslessly coded bfloat16 on the CPU: a row at a time is decoded, into the cache nearest to it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from compress.formats import fixed
from compress.formats.compiled import intrinsic, jit
from compress.formats.threads import in_threads
from compress.kernels import simd
from compress.kernels.cpu_activations import together
from compress.kernels.cpu_floats import BFLOAT16, UNIT, Layout, float_row, inputs_of
from compress.kernels.simd import constant, i8, i16, i32, integer, load, splat, vector

STEP = 32  # words that are decoded at a time: the bytes of a vector


def linear(
    x: Tensor, base: int, codes: Tensor, counts: Tensor, starts: Tensor, escapes: Tensor, rest: Tensor
) -> Tensor:
    """x @ W.T in float32, W the bfloat16 words that `formats.fixed` coded; bit for bit.

    x: (tokens, columns) bf16, fp16 or fp32. rest: (height, columns) uint8. starts: (height,) int64, how many escapes
    are before the block that each row begins in. The others as `fixed.decode` takes them.
    """
    height, columns = rest.shape
    layout = Layout(BFLOAT16, 0, UNIT, simd.lanes(), together(len(x)))
    inputs = inputs_of(x, UNIT, layout.tokens)
    out = np.zeros((len(inputs), height), np.float32)
    arrays = [array.contiguous().numpy() for array in (codes.view(-1, fixed.BLOCK_BYTES), counts, starts, escapes)]
    arguments = (np.uint8(base), *arrays, rest.contiguous().view(-1).numpy(), inputs, out)
    in_threads(_fixed_rows(layout), height, height * columns * len(x), columns, *arguments)
    return torch.from_numpy(out[: len(x)])


@cache
def _fixed_rows(layout: Layout) -> Any:
    text, tokens = " ".join(map(str, layout)), layout.tokens

    @jit
    def rows_of(start, stop, columns, base, packed, counts, starts, escapes, rest, x, out):  # type: ignore[no-untyped-def]
        padded, total, codes = x.shape[1], rest.shape[0], packed.reshape(-1)
        words = np.zeros(columns + padded + 2 * fixed.BLOCK, np.uint16)
        found, steps, inputs = np.empty(tokens, np.float32), np.zeros(1, np.float32), x.reshape(-1)
        for row in range(start, stop):
            block, position = row * columns // fixed.BLOCK, starts[row]
            at = row * columns - block * fixed.BLOCK
            for place in range(0, at + columns, fixed.BLOCK):
                behind = position + counts[block]
                if (block + 1) * fixed.BLOCK <= total:
                    _block(words, place, codes, block * fixed.BLOCK_BYTES, rest, block * fixed.BLOCK, base)
                    for number in range(position, behind):
                        escape = escapes[number]
                        i = place + np.int64(escape >> np.uint16(8))
                        words[i] = (words[i] & np.uint16(0x807F)) | ((escape & np.uint16(255)) << np.uint16(7))
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


@intrinsic
def _block(context, words, place, packed, code, rest, low, base):  # type: ignore[no-untyped-def]
    """Decodes a whole block into words[place:], escapes aside: `fixed._decode_block` in vectors of bytes.

    Its codes are packed[code:], and its other bits rest[low:].
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        kinds = signature.args
        pairs = [(simd.data(context, builder, arguments[i], kinds[i]), arguments[i + 1]) for i in (0, 2, 4)]
        start, codes, lows = (builder.gep(base, [offset]) for base, offset in pairs)
        bytes_, halves = vector(i8, STEP), vector(i16, STEP // 2)

        def moved(value: Any, by: int, mask: int) -> Any:
            """The bits of every byte moved up, or down where negative; of these the ones in the mask."""
            wide = builder.bitcast(value, halves)
            if by:
                wide = (builder.shl if by > 0 else builder.lshr)(wide, constant(halves, abs(by)))
            return builder.and_(builder.bitcast(wide, bytes_), constant(bytes_, mask))

        first = splat(builder, arguments[6], STEP)
        high = load(builder, codes, bytes_, integer(64))
        order = [i + source for i in range(STEP) for source in (0, STEP)]
        for line in range(0, fixed.BLOCK, 64):
            simd.prefetch(builder, lows, integer(line + simd.AHEAD))
        for number in range(fixed.BLOCK // STEP):
            two = load(builder, codes, bytes_, integer(STEP * number % 64))
            code = builder.or_(moved(two, -2 * (number // 2), 3), moved(high, 2 - number, 4))
            symbol = builder.add(code, first)
            rest_bits = load(builder, lows, bytes_, integer(STEP * number))
            lower = builder.or_(moved(rest_bits, 0, 0x7F), moved(symbol, 7, 0x80))
            upper = builder.or_(moved(rest_bits, 0, 0x80), moved(symbol, -1, 0x7F))
            both = builder.shuffle_vector(lower, upper, constant(vector(i32, 2 * STEP), order))
            at = builder.gep(start, [integer(STEP * number)])
            builder.store(both, builder.bitcast(at, both.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return numba.void(words, place, packed, code, rest, low, base), generate
