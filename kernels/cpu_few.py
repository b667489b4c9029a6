"""A few tokens with packed weights on the CPU in one compiled call: inputs, threads, sums and rounding.

Every step in Python takes about as long as multiplying with a small weight does, and for each token a model multiplies
with a hundred and more.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from torch import Tensor
from torch.nn import Parameter

from compress.formats import threads
from compress.formats.compiled import intrinsic, jit, lines
from compress.kernels.cpu_activations import TOKENS, quantize_rows

MOST = TOKENS - 1  # tokens: more are quantized on several threads, and share what they read
DTYPES = (torch.bfloat16, torch.float32)
_PLAIN = (Tensor, Parameter)  # others may have no memory of their own


class Few:
    """x @ W.T for at most MOST tokens."""

    def __init__(self, loop: Any, weights: tuple[Any, ...], height: int, inputs: tuple[Any, ...], lanes: int) -> None:
        """loop: over rows, of `cpu_codes`, for one token. weights: its arguments before the inputs. height: rows.
        inputs: order, unit, limit and factor, as `cpu_activations.quantize` takes them. lanes: of 16 bits.
        """
        order, unit, limit, factor = inputs
        self._loop, self._weights, self._height, self._size = loop, weights, height, len(order) * height
        self._rest = (order, unit, np.float32(limit), np.int32(factor), lanes // 2, height, *weights)

    @cached_property
    def _entry(self) -> int:
        kinds = ((np.int16, 2), (np.float32, 2), (np.int32, 3), (np.float32, 2))  # of what _multiply makes
        made = (np.empty((1,) * dimensions, dtype) for dtype, dimensions in kinds)
        return threads.entry(self._loop, (*self._weights, *made))

    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether x is few tokens in plain memory, and threads can be woken from compiled code."""
        known = len(x) <= MOST and x.dtype in DTYPES and dtype in DTYPES
        return known and type(x) in _PLAIN and not x.is_neg() and threads.has_openmp()

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """x: (tokens, columns), one that it `takes`. Returns (tokens, rows) of `dtype`; None where x has numbers that
        `quantize` does not take, or there is no memory to write to."""
        x, (tokens, columns), height = x.contiguous(), x.shape, self._height
        y = torch.empty(tokens, height, dtype=dtype, device="cpu")
        if type(y) is not Tensor:  # where torch only pretends
            return None
        place = (x.data_ptr(), y.data_ptr(), x.dtype is torch.bfloat16, dtype is torch.bfloat16, tokens, columns)
        state = _multiply(*threads.team(height, tokens * self._size), self._entry, *place, *self._rest)
        if state == _FAILED:
            raise RuntimeError(threads.FAILED)
        return y if state == _DONE else None


_DONE, _UNKNOWN, _FAILED = range(3)


@jit
def _multiply(  # type: ignore[no-untyped-def]
    start, team, parts, entry, x_at, y_at, x_is_narrow, y_is_narrow, tokens, columns,
    order, unit, limit, factor, half, height, packed, steps, others, share, other_share,
):  # fmt: skip
    source = np.empty((tokens, columns), np.float32)
    bits = source.reshape(-1).view(np.uint32)
    if x_is_narrow:
        words = carray(_pointer(x_at, 16), bits.shape[0])
        for i in range(bits.shape[0]):
            bits[i] = np.uint32(words[i]) << np.uint32(16)
    else:
        bits[:] = carray(_pointer(x_at, 32), bits.shape[0])
    units = order.shape[0] // unit
    x, scales = lines(2 * tokens * order.shape[0]).view(np.int16), np.empty((tokens, units), np.float32)
    x, parts_of_sums = x.reshape(tokens, order.shape[0]), units if factor else 0
    sums = lines(4 * tokens * parts_of_sums * half).view(np.int32).reshape(tokens, parts_of_sums, half)
    quantize_rows(0, tokens, source, order, unit, limit, factor, x, scales, sums)
    for token in range(tokens):
        for u in range(units):
            if np.isnan(scales[token, u]):
                return _UNKNOWN
    out = np.zeros((tokens, height), np.float32)
    arguments = (packed, steps, others, share, other_share, x, scales, sums, out)
    if threads.run_parts(start, entry, team, parts, height, arguments):
        return _FAILED
    found = out.reshape(-1).view(np.uint32)
    if y_is_narrow:
        narrow = carray(_pointer(y_at, 16), found.shape[0])
        for i in range(found.shape[0]):  # to nearest, ties to even; numbers alone, as there is no NaN
            narrow[i] = (found[i] + np.uint32(0x7FFF) + ((found[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        carray(_pointer(y_at, 32), found.shape[0])[:] = found
    return _DONE


@intrinsic
def _pointer(context, address, bits):  # type: ignore[no-untyped-def]
    """To words of so many bits at an address."""
    kind = {16: types.uint16, 32: types.uint32}[bits.literal_value]

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], ir.IntType(bits.literal_value).as_pointer())

    return types.CPointer(kind)(types.int64, bits), generate
