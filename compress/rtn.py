"""Round to nearest with MSE-optimal clipping: integer grids without data, compiled with numba.

A group of weights w is stored as (q - zero) * scale, q and zero unsigned integers of `bits` bits. "absmax" spans the
group's range. "mse" tries a ladder of shorter ranges, moves every scale to the least-squares fit of its integers
(sum(w v) / sum(v v), v = q - zero; a Lloyd step), and takes the best. The last comparison, absmax included, is on the
values as stored: scale and product rounded to the weight's type. Negative scales are left out: kernels assume positive.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

CLIPS = ("absmax", "mse")
# Bits by which a float32's mantissa is longer than the type's.
_DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
_THREADED_SIZE = 1 << 20  # values: below, starting threads costs more than it saves
# Grids tried at once. 16, not 8: a loop of eight is unrolled before it is vectorized, and runs ten times slower.
_LANES = 16
# Ones at every 16th, 32nd and 64th bit: times a low mask, that mask repeated.
_REPEATED = (np.uint64(0x0001000100010001), np.uint64(0x0000000100000001), np.uint64(1))


def _jit(function: Any, fastmath: Any = False) -> Any:
    try:
        return numba.njit(nogil=True, cache=True, fastmath=fastmath)(function)
    except RuntimeError:  # numba's "no locator": neither the package's directory nor the user's cache can be written
        return numba.njit(nogil=True, fastmath=fastmath)(function)


def _jit_sum(function: Any) -> Any:
    """For float64 sums of float32 errors, which may be split into lanes: their last bits decide nothing."""
    return _jit(function, {"reassoc"})


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
    source, shift = _as_bits(weight)
    packed = np.zeros((rows, -(-columns * bits // 32) * 4), np.uint8)
    scales = np.empty((rows, columns // group_size), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    options = (shift, bits, group_size, symmetric, clip == "mse", _DROPPED_BITS[weight.dtype])
    _in_threads(rows, weight.numel(), (source, packed, scales, zeros, *options))
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


def _as_bits(weight: Tensor) -> tuple[Any, int]:
    """The weight's bits as unsigned integers, and how far left they go to be a float32's."""
    weight = weight.detach().contiguous()
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(np.uint16), 16
    return weight.float().numpy().view(np.uint32), 0


def _in_threads(rows: int, size: int, arguments: tuple[Any, ...]) -> None:
    # Plain threads, not numba's: its default layer aborts when two Python threads enter it at once, and a parallel
    # kernel takes several times as long to compile. Rows are independent, so the split changes no byte.
    threads = min(numba.get_num_threads(), rows) if size > _THREADED_SIZE else 1
    if threads <= 1:
        _encode_rows(0, rows, *arguments)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(_encode_rows, *pair, *arguments) for pair in zip(bounds, bounds[1:], strict=False)]
    for job in jobs:
        job.result()


@_jit
def _encode_rows(start, stop, source, packed, scales, zeros, shift, bits, group_size, symmetric, search, dropped):  # type: ignore[no-untyped-def]
    columns = source.shape[1]
    qmax = 2**bits - 1
    # Loops over a whole row where they can be: on a short group a loop spends its time starting and ending.
    values = np.zeros(columns, np.float32)
    rounded = np.zeros(columns, np.float32)
    codes = np.zeros(-(-columns // 8) * 8, np.uint8)
    lanes = (np.ones(_LANES, np.float32), np.zeros(_LANES, np.float32))
    sums = (np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32))
    for row in range(start, stop):
        _load(source[row], shift, values.view(np.uint32))
        for g in range(columns // group_size):
            group = values[g * group_size : (g + 1) * group_size]
            integers = rounded[g * group_size : (g + 1) * group_size]
            low, high = _range(group, sums[0], sums[1])
            scale, zero = _spanning(low, high, qmax, symmetric, dropped)
            # Far outside float32's middle the sums leave its range; with an infinity nothing is to gain.
            if search and 2.0**-60 < high - low < 2.0**60:
                if symmetric:
                    found, found_zero = _search_symmetric(group, max(-low, high), qmax, lanes, sums)
                else:
                    found, found_zero = _search_asymmetric(group, low, high, qmax, lanes, sums)
                scale, zero = _least_error(group, integers, scale, zero, found, found_zero, qmax, dropped)
            scales[row, g] = scale
            zeros[row, g] = zero
            _quantize(group, scale, zero, qmax, np.float32(zero), integers)
        for i in range(columns):
            codes[i] = np.uint8(np.int32(rounded[i]))
        _pack_row(codes.view(np.uint64), bits, packed[row])


@_jit
def _load(source, shift, values):  # type: ignore[no-untyped-def]
    for i in range(source.shape[0]):
        values[i] = np.uint32(source[i]) << shift


@_jit
def _range(group, lows, highs):  # type: ignore[no-untyped-def]
    """The least and the greatest of the group and zero, lane by lane: NumPy's order of floats does not vectorize."""
    lows[:] = np.float32(0)
    highs[:] = np.float32(0)
    whole = group.shape[0] // _LANES * _LANES
    for i in range(0, whole, _LANES):
        for k in range(_LANES):
            lows[k] = min(lows[k], group[i + k])
            highs[k] = max(highs[k], group[i + k])
    low = np.float32(0)
    high = np.float32(0)
    for k in range(_LANES):
        low = min(low, lows[k])
        high = max(high, highs[k])
    for i in range(whole, group.shape[0]):
        low = min(low, group[i])
        high = max(high, group[i])
    return low, high


@_jit
def _quantize(group, scale, zero, qmax, shift, integers):  # type: ignore[no-untyped-def]
    inverse = np.float32(1) / scale
    low = np.float32(-zero)
    high = np.float32(qmax - zero)
    for i in range(group.shape[0]):
        integers[i] = min(max(np.rint(group[i] * inverse), low), high) + shift


@_jit
def _spanning(low, high, qmax, symmetric, dropped):  # type: ignore[no-untyped-def]
    """The absmax grid. Symmetric: absmax / 7.5 for 4 bits, as llm-compressor does: steps 7 % finer than absmax / 7,
    and still no value is off by more than half a step."""
    if low == high:
        return np.float32(1), (qmax + 1) // 2 if symmetric else 0
    if symmetric:
        return _round_scale(max(-low, high) / np.float32(qmax * 0.5), dropped), (qmax + 1) // 2
    # Two quotients, because high - low may overflow.
    scale = _round_scale(high / np.float32(qmax) - low / np.float32(qmax), dropped)
    return scale, max(0, min(qmax, int(np.rint(-low / scale))))


@_jit
def _search_symmetric(group, absmax, qmax, lanes, sums):  # type: ignore[no-untyped-def]
    """Scales absmax / n, n from 2**(bits - 1) - 1 up. Whole n recover a grid that the weights already lie on."""
    scales, lows = lanes
    step = np.float32(0.25 if qmax < 15 else 0.5)
    for k in range(_LANES):
        scales[k] = absmax / (np.float32(qmax // 2) + np.float32(k) * step)
        lows[k] = np.float32(-(qmax // 2) - 1)
    found, low = _best(group, absmax, qmax, lanes, sums)
    return found, int(-low)


@_jit
def _search_asymmetric(group, low, high, qmax, lanes, sums):  # type: ignore[no-untyped-def]
    """Eight ranges, each cut alike at both ends or only at its longer one; then the neighbours of the best."""
    scales, lows = lanes
    step = np.float32(0.5 if qmax == 3 else 1 if qmax == 7 else 2)
    for k in range(_LANES):
        scale = (high - low) / (np.float32(qmax - 1) + np.float32(k // 2) * step)
        centre = (low + high) / scale * np.float32(0.5) - np.float32(qmax * 0.5)
        longer = low / scale if high > -low else high / scale - np.float32(qmax)
        scales[k] = scale
        lows[k] = _as_low(longer if k % 2 else centre, qmax)
    found, found_low = _best(group, high - low, qmax, lanes, sums)
    for k in range(_LANES):
        scales[k] = found * (np.float32(1) + np.float32(k // 4 - 2) * np.float32(0.5 / (qmax + 1)))
        lows[k] = _as_low(found_low + np.float32(k % 4 - 1), qmax)
    found, found_low = _best(group, high - low, qmax, lanes, sums)
    return found, int(-found_low)


@_jit
def _as_low(value, qmax):  # type: ignore[no-untyped-def]
    """The least integer of a grid, -zero: whole, and zero among its integers."""
    return min(max(np.rint(value), np.float32(-qmax)), np.float32(0))


@_jit
def _best(group, span, qmax, lanes, sums):  # type: ignore[no-untyped-def]
    """The lane whose integers v explain most, the greatest sum(w v)**2 / sum(v v), with its scale refitted to them."""
    scales, lows = lanes
    wv, vv, inverses = sums
    for k in range(_LANES):
        inverses[k] = np.float32(1) / scales[k]
        wv[k] = np.float32(0)
        vv[k] = np.float32(1e-30)
    _add_up(group, np.float32(qmax), inverses, lows, wv, vv)
    best = 0
    most = np.float32(-1)
    for k in range(_LANES):
        explained = (wv[k] / span) * (wv[k] / span) / vv[k]
        if explained > most:
            best = k
            most = explained
    return wv[best] / vv[best] if wv[best] > 0 else scales[best], lows[best]


@_jit
def _add_up(group, qmax, inverses, lows, wv, vv):  # type: ignore[no-untyped-def]
    count = group.shape[0]
    nothing = np.float32(0)
    for i in range(0, count, 4):
        a = group[i]
        b = group[i + 1] if i + 1 < count else nothing
        c = group[i + 2] if i + 2 < count else nothing
        d = group[i + 3] if i + 3 < count else nothing
        for k in range(_LANES):
            low = lows[k]
            high = low + qmax
            p = min(max(np.rint(a * inverses[k]), low), high)
            q = min(max(np.rint(b * inverses[k]), low), high)
            r = min(max(np.rint(c * inverses[k]), low), high)
            s = min(max(np.rint(d * inverses[k]), low), high)
            wv[k] += (a * p + b * q) + (c * r + d * s)
            vv[k] += (p * p + q * q) + (r * r + s * s)


@_jit
def _least_error(group, stored, scale, zero, found, found_zero, qmax, dropped):  # type: ignore[no-untyped-def]
    """The grid with the least error as stored: (scale, zero), or `found` and its neighbours in the scales' type."""
    least = _error(group, stored, scale, zero, qmax, dropped)
    # Below 5 bits the neighbours hardly differ.
    neighbours = 0 if qmax < 31 else 1
    for k in range(-neighbours, neighbours + 1):
        near = _round_scale(found * np.float32(1 + k / 256), dropped)
        error = _error(group, stored, near, found_zero, qmax, dropped)
        if error < least:
            least = error
            scale = near
            zero = found_zero
    return scale, zero


@_jit_sum
def _error(group, stored, scale, zero, qmax, dropped):  # type: ignore[no-untyped-def]
    """Sum of squared errors of what a decoder gets: (q - zero) * scale in float32, rounded to the type."""
    _quantize(group, scale, zero, qmax, np.float32(0), stored)
    total = 0.0
    if dropped == 16:
        for i in range(group.shape[0]):
            difference = np.float64(group[i]) - np.float64(_round(stored[i] * scale, 16))
            total += difference * difference
        return total
    for i in range(group.shape[0]):
        difference = np.float64(group[i]) - np.float64(_round(stored[i] * scale, dropped))
        total += difference * difference
    return total


@_jit
def _round(value, dropped):  # type: ignore[no-untyped-def]
    """The nearest float32 value, half to even, whose mantissa is `dropped` bits shorter: 13 float16, 16 bfloat16."""
    bits = np.float32(value).view(np.uint32)
    if dropped == 16:
        bits = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return np.uint32(bits).view(np.float32)
    if dropped == 13:
        # float16's steps end at 2**-24: just below 1, float32's do too.
        if abs(value) < np.float32(2.0**-14):
            return (value + np.float32(0.75)) - np.float32(0.75)
        bits = np.uint32(bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
        rounded = np.uint32(bits).view(np.float32)
        return rounded if abs(rounded) <= np.float32(65504) else rounded * np.float32(np.inf)
    return value


@_jit
def _round_scale(scale, dropped):  # type: ignore[no-untyped-def]
    """The nearest value of the type that is positive and has a finite float32 inverse."""
    return max(_round(scale, dropped), np.float32(2.0**-24 if dropped == 13 else 2.0**-126))


@_jit
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
