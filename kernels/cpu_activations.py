"""Inputs as the compiled products on the CPU take them: integers of 16 bits with a scale for every few columns.

The largest of a unit of columns becomes `limit`; the others are rounded, on average by 2e-5 of the root mean square of
Gaussian ones, where bfloat16 rounds each number by 1e-3 of itself. Sums of products of integers are exact then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import empty, jit
from compress.formats.threads import in_threads

TOKENS = 4
_LEAST = np.float32(1e-30)  # a largest magnitude below has no reciprocal in float32 that is large enough


class Activations(NamedTuple):
    """x: (tokens, columns) int16, units of columns in the order that a kernel wants. scales: (tokens, units) float32.

    sums: (tokens, units, lanes / 2) int32, of what falls into each lane of 32 bits, times `factor`; nothing with 0.
    """

    x: Any
    scales: Any
    sums: Any


def together(tokens: int) -> int:
    """Tokens that share codes in registers."""
    return TOKENS if tokens >= TOKENS else 1


def quantize(x: Tensor, order: Any, unit: int, limit: int, lanes: int, factor: int = 0) -> Activations | None:
    """x: (tokens, columns) bf16, fp16 or fp32. order: (padded columns,) int64, from where in x each of them comes.

    Tokens of zeros make up a multiple of `together`. None where a number is not finite, or all of a unit are next to
    nothing.
    """
    tokens, padded = x.shape[0], len(order)
    room = tokens + -tokens % together(tokens)
    source = x.detach().float().contiguous().numpy()
    found = Activations(
        empty((room, padded), torch.int16).numpy(),
        empty((room, padded // unit), torch.float32).numpy(),
        empty((room, padded // unit if factor else 0, lanes // 2), torch.int32).numpy(),
    )
    for array in found:
        array[tokens:] = 0
    arguments = (source, order, unit, np.float32(limit), np.int32(factor), found.x, found.scales, found.sums)
    in_threads(quantize_rows, tokens, tokens * padded, *arguments)
    most = found.scales.max(initial=0)
    return found if most == most else None


@jit
def quantize_rows(start, stop, source, order, unit, limit, factor, x, scales, sums):  # type: ignore[no-untyped-def]
    columns, padded, lanes = source.shape[1], x.shape[1], sums.shape[2]
    values = np.zeros(padded, np.float32)
    for token in range(start, stop):
        values[:columns] = source[token]
        for u in range(padded // unit):
            part = values[u * unit : (u + 1) * unit]
            largest = np.uint32(0)
            bits = part.view(np.uint32)
            for i in range(unit):  # as integers: NaN is larger than any number
                largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
            most = np.uint32(largest).view(np.float32)
            known = largest < np.uint32(0x7F800000) and (most > _LEAST or largest == 0)
            scales[token, u] = most / limit if known else np.float32(np.nan)
            inverse = limit / most if known and largest else np.float32(0)
            for i in range(unit):
                value = part[i] * inverse if known else np.float32(0)
                part[i] = np.rint(min(max(value, -limit), limit))
        row = x[token]
        for i in range(padded):
            row[i] = np.int16(np.int32(values[order[i]]))
        for u in range(sums.shape[1]):
            found = sums[token, u]
            found[:] = 0
            for vector in range(unit // (2 * lanes)):
                part16 = row[u * unit + vector * 2 * lanes : u * unit + (vector + 1) * 2 * lanes]
                for lane in range(lanes):
                    found[lane] += np.int32(part16[2 * lane]) + np.int32(part16[2 * lane + 1])
            for lane in range(lanes):
                found[lane] *= factor
