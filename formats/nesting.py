"""Cells of which every width of codes has its own: the cells of one bit less each join two, and all are nearly optimal.

The best cells of a few bits do not join to the best of fewer, nor do these split to the best of more. The width that is
worst beside its own optimum should be as good as can be. So the error of every width has a weight, and all boundaries
move together to the best places near them, by dynamic programming over the tree of cells; what is worse than the others
weighs more in the next round (multiplicative weights, whose weighted mean no tree could get below everywhere).
"""

import numpy as np

from compress.formats.compiled import jit
from compress.formats.intervals import GAUSSIAN, cut, saved

GRID, FINE = 4, 16  # times as many cells has the optimum between whose cells boundaries lie, first and then
NEAR = 4  # places on either side of a boundary, where it may move to
ROUNDS = 16  # with each
_FIRST = 3  # bits, at least, of the optimal cut that is started from
_STEP = 40.0  # of the weights' logarithms, per excess
_LESS = 0.92  # of it is left in the next round
_MOST = 0.5  # excess that counts


@jit
def shelf(bits):  # type: ignore[no-untyped-def]
    """Room for the least errors between all places of two boundaries, and where those between are then."""
    side = 2 * NEAR + 1
    return np.empty((2, 1 << bits, side, side)), np.empty((bits + 1, 1 << bits, side, side), np.int8)


@jit
def nest(sums, bits, room, weights, shelves, best):  # type: ignore[no-untyped-def]
    """best[: 2**bits + 1]: where the cells of all bits begin and end, some perhaps where they begin.

    sums: as in `intervals.cut`. room: its work, places and cuts. weights: (bits + 1,), of the widths' errors, each
    beside its optimum, in the first round; overwritten by those in the last. shelves: from `shelf`.
    """
    work, places, cuts = room
    optimal, errors = np.ones(bits + 1), np.zeros(bits + 1)
    for width in range(2, bits + 1):
        cut(sums, 1 << width, 2 * GAUSSIAN / 8.0**width, work, places, cuts)
        optimal[width] = max(_error(sums, cuts, 1 << width, 1), 1e-12 * sums[2, -1], 1e-300)
    first = min(max(_FIRST, bits - 3), bits)
    cut(sums, 1 << first, 2 * GAUSSIAN / 8.0**first, work, places, cuts)
    for k in range((1 << first) + 1):
        best[k << (bits - first)] = cuts[k]
    least, step, found = np.inf, _STEP, np.zeros((1 << bits) + 1, np.int64)
    for attempt in range(2 * ROUNDS):
        if attempt % ROUNDS == 0:
            most = min((GRID if attempt == 0 else FINE) << bits, sums.shape[1] - 1)
            cut(sums, most, 2 * GAUSSIAN / float(most) ** 3, work, places, cuts)
            grid = cuts[: most + 1].copy()
            found[:] = np.searchsorted(grid, best[: len(found)])
        if attempt == 0:
            for width in range(first + 1, bits + 1):
                reach = 1 << (bits - width)
                for k in range(reach, 1 << bits, 2 * reach):
                    found[k] = (found[k - reach] + found[k + reach]) // 2
        _shift(sums, grid, weights / optimal, shelves, found)
        for width in range(2, bits + 1):
            errors[width] = _error(sums, grid[found], 1 << bits, 1 << (bits - width)) / optimal[width]
        if errors.max() < least:
            least, best[: len(found)] = errors.max(), grid[found]
        weights[2:] *= np.exp(step * np.clip(errors[2:] - errors[2:].mean(), -_MOST, _MOST))
        weights[2:] /= weights[2:].sum()
        step *= _LESS


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
def _near(found, k, move):  # type: ignore[no-untyped-def]
    """A place near boundary k; the first and the last stay."""
    return found[k] + move if 0 < k < len(found) - 1 else found[k]


@jit
def _shift(sums, grid, weights, shelves, found):  # type: ignore[no-untyped-def]
    """Moves all boundaries, at most NEAR places of the grid, to where the errors times `weights` are least together."""
    (costs, moves), bits = shelves, len(weights) - 1
    side, last = 2 * NEAR + 1, len(grid) - 1
    for width in range(bits, -1, -1):
        reach, halves, whole = 1 << (bits - width), costs[(width + 1) % 2], costs[width % 2]
        for k in range(1 << width):
            low, high = k * reach, (k + 1) * reach
            for a in range(side):
                start = _near(found, low, a - NEAR)
                for b in range(side):
                    stop = _near(found, high, b - NEAR)
                    if start < 0 or stop > last or start > stop:
                        least, chosen = np.inf, 0
                    elif width == bits:
                        least, chosen = 0.0, 0
                    else:
                        least, chosen = np.inf, 0
                        for m in range(side):
                            loss = halves[2 * k, a, m] + halves[2 * k + 1, m, b]
                            if loss < least:
                                least, chosen = loss, m
                    if width >= 2 and least < np.inf:
                        least += weights[width] * _cost(sums, grid[start], grid[stop])
                    whole[k, a, b], moves[width, k, a, b] = least, chosen
    taken = np.full(len(found), NEAR)
    for width in range(bits):
        reach = 1 << (bits - width)
        for k in range(0, 1 << bits, reach):
            taken[k + reach // 2] = moves[width, k // reach, taken[k], taken[k + reach]]
    for k in range(1, 1 << bits):
        found[k] += taken[k] - NEAR
