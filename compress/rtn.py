"""Round to nearest with MSE-optimal clipping: integer grids without data, compiled with numba.

A group of weights w is stored as (q - zero) * scale, q and zero unsigned integers of `bits` bits. "absmax" spans the
group's range with a positive scale. "mse" searches shorter ranges (clip.py), and symmetric grids may then have a
negative scale: integers reach one further below zero than above, and the longer end goes to the larger weight, as in
ggml and AutoRound. "mse" is never worse than "absmax" in any group, on the values as stored.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.clip import LANES, UNROLLED, keep_better, load_tile, round_scale, search
from compress.formats.compiled import float_bits, jit
from compress.formats.threads import in_threads

CLIPS = ("absmax", "mse")
# Bits by which a float32's mantissa is longer than the type's.
_DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
# Ones at every 16th, 32nd and 64th bit: times a low mask, that mask repeated.
_REPEATED = (np.uint64(0x0001000100010001), np.uint64(0x0000000100000001), np.uint64(1))


@dataclass(frozen=True)
class Grid:
    """packed: (out_features, ceil(in_features * bits / 32)) int32, as formats.bitpack lays it out.

    scales: (out_features, in_features / group_size), the weight's dtype. zeros: the same shape, uint8; None stands
    for 2**(bits - 1) everywhere.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool, clip: str = "mse") -> Grid:
    """weight: (out_features, in_features), bf16, fp16 or fp32, on the CPU."""
    _check(weight, bits, group_size, clip)
    rows, columns = weight.shape
    source, shift = float_bits(weight)
    packed = np.zeros((rows, -(-columns * bits // 32) * 4), np.uint8)
    scales = np.empty((rows, columns // group_size), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    options = (shift, bits, group_size, symmetric, clip == "mse", _DROPPED_BITS[weight.dtype])
    in_threads(_encode_rows, rows, weight.numel(), source.ravel(), packed, scales.ravel(), zeros.ravel(), options)
    return Grid(
        torch.from_numpy(packed.view(np.int32)),
        torch.from_numpy(scales).to(weight.dtype),
        None if symmetric else torch.from_numpy(zeros),
    )


def _check(weight: Tensor, bits: int, group_size: int, clip: str) -> None:
    if weight.ndim != 2 or weight.dtype not in _DROPPED_BITS:
        raise ValueError(f"weight: a 2-D bf16, fp16 or fp32 tensor is needed, not {weight.ndim}-D {weight.dtype}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits} is not in 2..8")
    if clip not in CLIPS:
        raise ValueError(f"clip: {clip!r} is not one of {', '.join(CLIPS)}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"weight: in_features {weight.shape[1]} is not a multiple of group_size {group_size}")


@jit
def _encode_rows(first_row, stop_row, source, packed, scales, zeros, options):  # type: ignore[no-untyped-def]
    """source: the weight's bits, flat. packed: (rows, bytes). scales, zeros: flat. options: `quantize` lists them."""
    shift, bits, group_size = options[:3]
    groups = scales.shape[0] // max(1, packed.shape[0])
    columns = groups * group_size
    tile = np.zeros((-(-group_size // UNROLLED) * UNROLLED, LANES), np.float32)
    lanes = _lane_arrays()
    work = _lane_arrays()
    steps, least = lanes[:2]
    # So many rows at a time that they make whole tiles of groups.
    height = max(1, LANES // max(1, groups & -groups))
    codes = np.zeros((height, -(-columns // 8) * 8), np.uint8)
    for row in range(first_row, stop_row, height):
        rows = min(height, stop_row - row)
        line = 0
        column = 0
        for first in range(row * groups, (row + rows) * groups, LANES):
            count = min(LANES, (row + rows) * groups - first)
            _fit_tile(source, first, count, options, tile, lanes, work)
            for k in range(count):
                scales[first + k] = steps[k]
                zeros[first + k] = np.uint8(-least[k])
                group = source[(first + k) * group_size : (first + k + 1) * group_size]
                integers = codes[line, column : column + group_size]
                _quantize(group, shift, steps[k], least[k], np.float32(2**bits - 1), integers)
                column += group_size
                if column == columns:
                    column = 0
                    line += 1
        for r in range(rows):
            _pack_row(codes[r].view(np.uint64), bits, packed[row + r])


@jit
def _fit_tile(source, first, count, options, tile, lanes, work):  # type: ignore[no-untyped-def]
    """The grids of `count` groups from `first` on, into two lane arrays: scales, and least integers (-zero)."""
    shift, bits, group_size, symmetric, searched, dropped = options
    steps, least, lows, highs, found, found_least = lanes[:6]
    qmax = 2**bits - 1
    for k in range(count):
        start = (first + k) * group_size
        lows[k], highs[k] = _range(source[start : start + group_size], shift)
        steps[k], least[k] = _spanning(lows[k], highs[k], qmax, symmetric, dropped)
    if not searched:
        return
    load_tile(source, first, count, group_size, shift, tile.view(np.uint32))
    found[:] = steps
    found_least[:] = least
    search(tile, lows, highs, qmax, symmetric, found, found_least, work)
    keep_better(tile, qmax, dropped, steps, least, found, found_least, work)


@jit
def _lane_arrays():  # type: ignore[no-untyped-def]
    zeros = np.zeros(LANES, np.float32)
    # Not rows of one array, which LLVM takes for one another's neighbours and leaves unvectorized.
    return (zeros, zeros.copy(), zeros.copy(), zeros.copy(), zeros.copy(), zeros.copy(), zeros.copy())


@jit
def _range(source, shift):  # type: ignore[no-untyped-def]
    """The least and the greatest of the group and zero. As integers, negative ones reversed: those vectorize."""
    low = np.int32(0)
    high = np.int32(0)
    for i in range(source.shape[0]):
        bits = np.int32(np.uint32(source[i]) << shift)
        key = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low = min(low, key)
        high = max(high, key)
    bits = np.int32(low ^ np.int32(np.int32(low >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return np.int32(bits).view(np.float32), np.int32(high).view(np.float32)


@jit
def _spanning(low, high, qmax, symmetric, dropped):  # type: ignore[no-untyped-def]
    """The absmax grid: scale and least integer. Symmetric: absmax / 7.5 for 4 bits, as llm-compressor does: steps 7 %
    finer than absmax / 7, and still no value is off by more than half a step."""
    if low == high:
        return np.float32(1), np.float32(-(qmax // 2) - 1 if symmetric else 0)
    if symmetric:
        return round_scale(max(-low, high) / np.float32(qmax * 0.5), dropped), np.float32(-(qmax // 2) - 1)
    # Two quotients, because high - low may overflow.
    scale = round_scale(high / np.float32(qmax) - low / np.float32(qmax), dropped)
    return scale, max(np.float32(-qmax), min(np.float32(0), np.rint(low / scale)))


@jit
def _quantize(source, shift, scale, least, qmax, codes):  # type: ignore[no-untyped-def]
    inverse = np.float32(1) / scale
    for i in range(source.shape[0]):
        w = np.uint32(np.uint32(source[i]) << shift).view(np.float32)
        codes[i] = np.uint8(np.int32(min(max(np.rint(w * inverse), least), least + qmax) - least))


@jit
def _pack_row(lanes, bits, packed):  # type: ignore[no-untyped-def]
    """lanes: eight codes each, uint64, overwritten. packed: the row's bytes; formats.bitpack has the layout."""
    for i in range(lanes.shape[0]):
        lane = lanes[i]
        for j in range(3):
            width = np.uint64(8 << j)
            kept = np.uint64(bits << j)
            low = ((np.uint64(1) << kept) - np.uint64(1)) * _REPEATED[j]
            lane = (lane & low) | ((lane >> (width - kept)) & (low << kept))
        lanes[i] = lane
    if bits == 4 and packed.shape[0] == 4 * lanes.shape[0]:
        words = packed.view(np.uint32)
        for i in range(words.shape[0]):
            words[i] = np.uint32(lanes[i])
        return
    for i in range(lanes.shape[0]):
        for j in range(min(bits, packed.shape[0] - i * bits)):
            packed[i * bits + j] = np.uint8(lanes[i] >> np.uint64(8 * j))
