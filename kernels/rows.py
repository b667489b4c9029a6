"""Rows of a weight that a compiled loop decodes: into memory, or into a core's cache, where they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba.core import cgutils
from torch import Tensor

from compress.formats.compiled import empty, intrinsic, jit
from compress.formats.threads import call, entry, in_threads
from compress.kernels import simd
from compress.kernels.simd import constant, f32, i32, integer, load, vector

BFLOAT16_DROPPED = 16  # bits of a float32 that bfloat16 has not
TILE = (6, 4)  # rows and tokens whose sums are in registers
TOGETHER = 48  # rows, whole tiles, that lie in a core's second cache while all tokens are multiplied with them
PAIRS = 32  # bfloat16 numbers in a vector


@dataclass(frozen=True)
class Rows:
    """A weight on the CPU and what decodes it: loop(start, stop, first, columns, out, dropped, *arguments).

    That fills out[row, :columns] with row `first + row`, for rows from start to stop: the bits of `made`, uint16 or
    uint32; dropped is 16 for bfloat16, else 0. arguments: as `in_threads` takes them. dtype: of the weight. near: what
    decodes it sooner, with other roundings on the way, for products.
    """

    loop: Any
    shape: tuple[int, int]
    dtype: torch.dtype
    made: torch.dtype
    arguments: tuple[Any, ...]
    near: Rows | None = None

    @property
    def name(self) -> str:
        """Of what takes the same time for each weight."""
        return str(self.loop.__name__).strip("_")

    @property
    def whole(self) -> Tensor:
        return self(slice(0, self.shape[0]))

    def __call__(self, rows: slice) -> Tensor:
        """Those rows of the weight: (rows, columns)."""
        start, stop, _ = rows.indices(self.shape[0])
        shape, narrow = (max(0, stop - start), self.shape[1]), self.made.itemsize == 2
        out = empty(shape, torch.int16 if narrow else torch.int32)
        words = out.numpy().view(np.uint16 if narrow else np.uint32)
        in_threads(self.loop, shape[0], out.numel(), start, shape[1], words, self._dropped, *self.arguments)
        return out.view(self.made).to(self.dtype)

    def takes(self, x: Tensor) -> bool:
        """Whether `product` multiplies x with it: both are bfloat16, and so are the processor's products."""
        return x.dtype == self.made == self.dtype == torch.bfloat16 and simd.has_dots() and self.shape[1] > 0

    def product(self, x: Tensor) -> Tensor:
        """x @ W.T in float32, (tokens, rows), of an x that it `takes`: (tokens, columns). Each core decodes a few rows
        and multiplies all tokens with these; subnormal numbers count as zero."""
        (height, columns), (_, tokens) = self.shape, TILE
        missing = (0, -columns % PAIRS, 0, -len(x) % tokens)
        inputs = (F.pad(x.detach(), missing) if any(missing) else x.detach().contiguous()).view(torch.int16)
        out = np.empty((len(inputs), height), np.float32)
        rows = self.near or self
        example = (0, columns, np.empty((1, 1), np.uint16), self._dropped, *rows.arguments)
        work = (entry(rows.loop, example), rows.arguments, columns, inputs.numpy().view(np.uint16), out)
        in_threads(_product_rows(*TILE), -(-height // TOGETHER), out.size * columns, *work)
        return torch.from_numpy(out[: len(x)])

    @property
    def _dropped(self) -> int:
        return BFLOAT16_DROPPED if self.made == torch.bfloat16 else 0


@cache
def _product_rows(height: int, width: int) -> Any:
    """The loop of `Rows.product`, over so many rows at a time: `TOGETHER`. height, width: of a tile."""
    text = f"{height} {width}"

    @jit
    def rows_of(start, stop, decode, arguments, columns, x, out):  # type: ignore[no-untyped-def]
        tokens, padded = x.shape
        block = np.zeros((TOGETHER, padded), np.uint16)
        found = np.empty((width, height), np.float32)
        codes, inputs, size = block.reshape(-1).view(np.uint8), x.reshape(-1).view(np.uint8), 2 * padded
        for part in range(start, stop):
            first = part * TOGETHER
            count = min(TOGETHER, out.shape[1] - first)
            call(decode, 0, count, (first, columns, block, BFLOAT16_DROPPED) + arguments)
            for token in range(0, tokens, width):
                for row in range(0, count, height):
                    _tile((codes, inputs, found), (row * size, token * size, size), text)
                    for i in range(width):
                        for j in range(min(height, count - row)):
                            out[token + i, first + row + j] = found[i, j]

    return rows_of


@intrinsic
def _tile(context, arrays, place, form):  # type: ignore[no-untyped-def]
    """found[t, r] = row r times token t, for a tile of them. arrays: the bytes of rows of bfloat16 and of tokens, and
    found, float32. place: where in these the first row and the first token begin, and the bytes of each."""
    height, width = map(int, form.literal_value.split())

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pairs = zip(cgutils.unpack_tuple(builder, arguments[0]), signature.args[0], strict=True)
        rows, tokens, found = (simd.data(context, builder, *pair) for pair in pairs)
        at, first, size = cgutils.unpack_tuple(builder, arguments[1])
        floats, words = vector(f32, 16), vector(i32, 16)

        def starts(begin: Any, count: int) -> list[Any]:
            return [builder.add(begin, builder.mul(size, integer(i))) for i in range(count)]

        zeros = constant(floats, 0.0)
        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(height)] for _ in range(width)]
        row_starts, token_starts = starts(at, height), starts(first, width)
        with cgutils.for_range_slice(builder, integer(0), size, integer(2 * PAIRS), inc=True) as (offset, _):
            weights = [load(builder, rows, words, builder.add(start, offset)) for start in row_starts]
            for start, line in zip(token_starts, sums, strict=True):
                values = load(builder, tokens, words, builder.add(start, offset))
                for weight, total in zip(weights, line, strict=True):
                    builder.store(simd.dot(builder, builder.load(total), weight, values), total)
        for number, total in enumerate(total for line in sums for total in line):
            place = builder.gep(builder.bitcast(found, f32.as_pointer()), [integer(number)])
            builder.store(simd.total(builder, builder.load(total)), place)
        return context.get_dummy_value()

    return numba.void(arrays, place, form), generate
