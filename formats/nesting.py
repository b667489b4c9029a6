"""Cells of which every width of codes has its own: the cells of one bit less each join two, and all are nearly optimal.

The best cells of a few bits do not join to the best of fewer, nor do these split to the best of more. So a cut that is
optimal somewhere between is joined and split, and then every boundary moves to where the errors of all widths to which
it belongs are least together; the furthest from its own optimum counts most.
"""

import numpy as np

from compress.formats.compiled import jit
from compress.formats.intervals import GAUSSIAN, cut, saved

_SWEEPS = 12
_EMPHASIS = 30  # the power of an error beside its optimum that it is weighted by
_FIRST, _LAST = 3, 7  # bits, of optimal cuts that are started from


@jit
def nest(sums, bits, work, places, cuts, best):  # type: ignore[no-untyped-def]
    """best[: 2**bits + 1]: where the cells of all bits begin and end, some perhaps where they begin.

    sums, work, places, cuts: as in `intervals.cut`.
    """
    optimal = np.zeros(bits + 1)
    for width in range(2, bits + 1):
        cut(sums, 1 << width, 2 * GAUSSIAN / 8.0**width, work, places, cuts)
        optimal[width] = _error(sums, cuts, 1 << width, 1)
    least = np.inf
    found, errors, weights = np.zeros((1 << bits) + 1, np.int64), np.zeros(bits + 1), np.zeros(bits + 1)
    for first in range(min(max(_FIRST, bits - 2), bits), min(bits, _LAST) + 1):
        cut(sums, 1 << first, 2 * GAUSSIAN / 8.0**first, work, places, cuts)
        for k in range((1 << first) + 1):
            found[k << (bits - first)] = cuts[k]
        for width in range(first, bits + 1):
            step = 1 << (bits - width)
            if width > first:
                for k in range(step, 1 << bits, 2 * step):
                    found[k] = _halved(sums, found[k - step], found[k + step])
            for sweep in range(_SWEEPS):
                worst = _weigh(sums, found, bits, width, optimal, errors, weights)
                if width == bits and worst < least:
                    least = worst
                    best[: len(found)] = found
                if sweep < _SWEEPS - 1:
                    _move(sums, found, bits, width, weights)


@jit
def _cost(sums, i, j):  # type: ignore[no-untyped-def]
    return max(sums[2, j] - sums[2, i] - saved(sums, i, j), 0.0) if i < j else 0.0


@jit
def _error(sums, cells, last, step):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(0, last, step):
        total += _cost(sums, cells[k], cells[k + step])
    return total


@jit
def _halved(sums, i, j):  # type: ignore[no-untyped-def]
    """Where the second half of a cell begins; of one value, nowhere."""
    most, chosen = -1.0, j
    for middle in range(i + 1, j):
        gain = saved(sums, i, middle) + saved(sums, middle, j)
        if gain > most:
            most, chosen = gain, middle
    return chosen


@jit
def _weigh(sums, cells, bits, last, optimal, errors, weights):  # type: ignore[no-untyped-def]
    """What the errors of widths up to `last` count. Returns the largest, each beside its optimum."""
    little, worst = 1e-12 * sums[2, -1], 0.0
    for width in range(2, last + 1):
        errors[width] = _error(sums, cells, 1 << bits, 1 << (bits - width))
        weights[width] = 0.0
        if optimal[width] > little:
            ratio = errors[width] / optimal[width]
            weights[width] = ratio**_EMPHASIS / optimal[width]
            worst = max(worst, ratio)
    return worst


@jit
def _move(sums, cells, bits, last, weights):  # type: ignore[no-untyped-def]
    """Each boundary of the cells of `last` bits to the best place between its neighbours."""
    step = 1 << (bits - last)
    for k in range(step, 1 << bits, step):
        widest = last
        while widest > 2 and k % (1 << (bits - widest + 1)) == 0:
            widest -= 1
        least, chosen = np.inf, cells[k]
        for place in range(cells[k - step], cells[k + step] + 1):
            loss = 0.0
            for width in range(widest, last + 1):
                reach = 1 << (bits - width)
                loss += weights[width] * (_cost(sums, cells[k - reach], place) + _cost(sums, place, cells[k + reach]))
            if loss < least:
                least, chosen = loss, place
        cells[k] = chosen
