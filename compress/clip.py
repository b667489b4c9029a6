"""MSE-optimal clipping: the search that rtn.py runs, sixteen groups at a time, compiled with numba.

For a grid (scale, low) and integers v = clip(round(w / scale), low, low + qmax), the least-squares scale of those v is
sum(w v) / sum(v v), and what it explains of sum(w w) is sum(w v)**2 / sum(v v). Each group tries a ladder of ranges,
takes the one that explains most at its refitted scale (a Lloyd step), and keeps it if it beats absmax as stored.

Lane k of every array is group k, so that no sum crosses lanes: its order, hence every byte, is the same everywhere.
"""

import numpy as np

from compress.formats.compiled import jit

LANES = 16  # not 8: a loop of eight is unrolled before it is vectorized, and runs ten times slower
UNROLLED = 8  # values of a group added up before a sum goes through memory


@jit
def load_tile(source, first, count, group_size, shift, tile):  # type: ignore[no-untyped-def]
    """source: flat weight bits. tile: (group_size or more, LANES) uint32, filled with `count` groups from `first`."""
    for k in range(count):
        group = source[(first + k) * group_size : (first + k + 1) * group_size]
        for i in range(group_size):
            tile[i, k] = np.uint32(group[i]) << shift


@jit
def search(tile, lows, highs, qmax, symmetric, scales, least, work):  # type: ignore[no-untyped-def]
    """Moves scales and least (the grid's least integers, -zero) to what explains most; leaves lanes it cannot improve.

    Symmetric scales take the sign that puts the value furthest from zero at -2**(bits - 1), the longer end.
    """
    unit, middle, inverses, bottoms, wv, vv, most = work
    unit[:] = np.float32(0)
    most[:] = np.float32(0)
    for k in range(LANES):
        span = max(-lows[k], highs[k]) if symmetric else highs[k] - lows[k]
        # Far outside float32's middle the squares leave its range: there, nothing is explained and absmax stays.
        if np.float32(2.0**-40) < span < np.float32(2.0**40):
            unit[k] = np.float32(-1 if symmetric and highs[k] > -lows[k] else 1) / span
        middle[k] = (lows[k] + highs[k]) * unit[k] * np.float32(0.5)
    # From one rung to the next the cut grows by a tenth. A lone outlier of g values is best cut to n steps,
    # n = 2**(bits - 1) + g / (12 * 2**(bits - 1)); less of it to anything with more values near its maximum.
    rung = 0.4 if symmetric else 0.5
    steps = (qmax + 1) // 2 - 0.6 if symmetric else qmax - 0.5
    excess = tile.shape[0] / (6 * (qmax + 1))
    last = max(steps + 9 * rung, (qmax + 1) // 2 + excess if symmetric else qmax + 2 * excess)
    while steps < last:
        for up in range(1 if symmetric else 2):
            _propose(np.float32(steps), up, qmax, symmetric, unit, middle, inverses, bottoms)
            _explain(tile, np.float32(qmax), inverses, bottoms, wv, vv)
            for k in range(LANES):
                explained = (wv[k] * unit[k]) * (wv[k] * unit[k]) / vv[k]
                better = explained > most[k]
                _choose(better, k, most, explained)
                _choose(better, k, scales, wv[k] / vv[k])
                _choose(better, k, least, bottoms[k])
        steps += rung
        rung *= 1.1


@jit
def _propose(steps, up, qmax, symmetric, unit, middle, inverses, bottoms):  # type: ignore[no-untyped-def]
    """Symmetric: the absmax at `steps` steps; n - 0.4 to n + 0.4 recover a grid of n steps on which the weights lie.
    Asymmetric: the range at `steps` steps, cut alike at both ends, its zero rounded down or up."""
    for k in range(LANES):
        inverses[k] = unit[k] * steps
        centre = np.floor(middle[k] * steps - np.float32(0.5 * qmax)) + np.float32(up)
        bottoms[k] = np.float32(-(qmax // 2) - 1) if symmetric else min(max(centre, np.float32(-qmax)), np.float32(0))


@jit
def _explain(tile, qmax, inverses, bottoms, wv, vv):  # type: ignore[no-untyped-def]
    wv[:] = np.float32(0)
    vv[:] = np.float32(0)
    for i in range(0, tile.shape[0], UNROLLED):
        for k in range(LANES):
            products = np.float32(0)
            squares = np.float32(0)
            for j in range(UNROLLED):
                w = tile[i + j, k]
                v = min(max(np.rint(w * inverses[k]), bottoms[k]), bottoms[k] + qmax)
                products += w * v
                squares += v * v
            wv[k] += products
            vv[k] += squares


@jit
def keep_better(tile, qmax, dropped, scales, least, found, found_least, work):  # type: ignore[no-untyped-def]
    """Puts the found grid, or a neighbour in the scales' type, where its error as stored is below that of `scales`."""
    best, error, near, inverses = work[:4]
    _stored_error(tile, qmax, dropped, scales, least, inverses, best)
    # More than the sums' rounding can be wrong by, so that no group ends up worse than it was.
    margin = np.float32(1 + (tile.shape[0] + 8) * 2.0**-22)
    # Below 5 bits the neighbours hardly differ.
    neighbours = 0 if qmax < 31 else 1
    for step in range(-neighbours, neighbours + 1):
        for k in range(LANES):
            near[k] = round_scale(found[k] * np.float32(1 + step / 256), dropped)
        _stored_error(tile, qmax, dropped, near, found_least, inverses, error)
        for k in range(LANES):
            better = error[k] * margin < best[k]
            _choose(better, k, best, error[k])
            _choose(better, k, scales, near[k])
            _choose(better, k, least, found_least[k])


@jit
def _choose(better, k, kept, offered):  # type: ignore[no-untyped-def]
    """kept[k] = offered if better. Both are read first, so that this vectorizes: a branch would be guessed wrong."""
    old = kept[k]
    kept[k] = offered if better else old


@jit
def _stored_error(tile, qmax, dropped, scales, least, inverses, errors):  # type: ignore[no-untyped-def]
    """Sums of squared errors of what a decoder gets: (q - zero) * scale in float32, rounded to the type."""
    for k in range(LANES):
        inverses[k] = np.float32(1) / scales[k]
        errors[k] = np.float32(0)
    top = np.float32(qmax)
    for i in range(0, tile.shape[0], UNROLLED):
        for k in range(LANES):
            squares = np.float32(0)
            for j in range(UNROLLED):
                w = tile[i + j, k]
                v = min(max(np.rint(w * inverses[k]), least[k]), least[k] + top)
                difference = w - to_type(v * scales[k], dropped)
                squares += difference * difference
            errors[k] += squares


@jit
def to_type(value, dropped):  # type: ignore[no-untyped-def]
    """The nearest float32 value, half to even, whose mantissa is `dropped` bits shorter: 13 float16, 16 bfloat16."""
    shift = np.uint32(dropped)
    unit = np.uint32(np.uint32(1) << shift)
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(bits >> shift) & np.uint32(1)
    bits = np.uint32(bits + np.uint32((unit >> np.uint32(1)) - np.uint32(1)) + odd) & np.uint32(-unit)
    rounded = np.uint32(bits).view(np.float32) if dropped else value
    if dropped != 13:
        return rounded
    # float16's steps end at 2**-24: just below 1, float32's do too.
    small = (value + np.float32(0.75)) - np.float32(0.75)
    rounded = small if abs(value) < np.float32(2.0**-14) else rounded
    return rounded if abs(rounded) <= np.float32(65504) else rounded * np.float32(np.inf)


@jit
def round_scale(scale, dropped):  # type: ignore[no-untyped-def]
    """The nearest value of the type that has a finite float32 inverse."""
    least = np.float32(2.0**-24 if dropped == 13 else 2.0**-126)
    magnitude = max(to_type(abs(scale), dropped), least)
    return -magnitude if scale < 0 else magnitude
