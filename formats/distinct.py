"""The distinct values of a row in ascending order, and sums over them: what `intervals.py` cuts."""

import numpy as np

from compress.formats.compiled import jit

BINS = 1 << 16  # of longer rows a histogram is made, by the upper half of the values' float32 bits


@jit
def room(columns):  # type: ignore[no-untyped-def]
    """For the items, sums, work, places and cuts of a row; the last for 256 intervals at least."""
    size = min(columns, BINS)
    return (
        np.empty((2, columns if columns <= BINS else 0), np.uint64),
        np.zeros((3, size + 1)),
        np.empty((2, size + 1)),
        np.empty((3, size + 1), np.int64),
        np.empty(max(size, 256) + 1, np.int64),
    )


@jit
def distinct(source, shift, importance, items, sums):  # type: ignore[no-untyped-def]
    """Sums over the distinct values in ascending order: of the importance, times the value, times its square.

    source: the bits of a row, to be shifted left by `shift` for a float32's. importance: (n,), of the columns modulo n.
    items: room for two copies of the row. Returns how many there are; sums[:, i] is over the first i.
    """
    if len(source) <= BINS:
        return _sort(source, shift, importance, items, sums)
    return _histogram(source, shift, importance, sums)


@jit
def _key(bits, shift):  # type: ignore[no-untyped-def]
    """Unsigned integers in the order of the floats; one for both zeros."""
    word = np.uint32(np.uint32(bits) << shift)
    if word == np.uint32(0x80000000):
        word = np.uint32(0)
    return np.uint32(word ^ (np.uint32(0xFFFFFFFF) if word >> np.uint32(31) else np.uint32(0x80000000)))


@jit
def _value(key):  # type: ignore[no-untyped-def]
    word = key ^ (np.uint32(0x80000000) if key >> np.uint32(31) else np.uint32(0xFFFFFFFF))
    return np.float64(np.uint32(word).view(np.float32))


@jit
def _sort(source, shift, importance, items, sums):  # type: ignore[no-untyped-def]
    a, b = items[0], items[1]
    for i in range(a.shape[0]):
        a[i] = np.uint64(_key(source[i], shift)) << np.uint64(32) | np.uint64(i)
    for digit in range(6 if shift == 16 else 4, 8):
        places = np.zeros(257, np.int64)
        place = np.uint64(8 * digit)
        for item in a:
            places[((item >> place) & np.uint64(255)) + np.uint64(1)] += 1
        for i in range(256):
            places[i + 1] += places[i]
        for item in a:
            bucket = (item >> place) & np.uint64(255)
            b[places[bucket]] = item
            places[bucket] += 1
        a, b = b, a
    count, period = 0, np.uint32(importance.shape[0])
    last = np.uint32(0)
    for item in a:
        key = np.uint32(item >> np.uint64(32))
        at = np.uint32(item)
        if key != last or not count:
            count += 1
            sums[:, count] = sums[:, count - 1]
            last = key
        _add(sums, count, _value(key), importance[at if at < period else at % period])
    return count


@jit
def _histogram(source, shift, importance, sums):  # type: ignore[no-untyped-def]
    """As `_sort`, over the values by the upper half of their bits."""
    sums[:] = 0
    column = 0
    for bits in source:
        key = _key(bits, shift)
        _add(sums, (key >> np.uint32(16)) + np.uint32(1), _value(key), importance[column])
        column = column + 1 if column + 1 < importance.shape[0] else 0
    count = 0
    for i in range(1, BINS + 1):
        if sums[0, i] > 0:
            count += 1
            sums[:, count] = sums[:, count - 1] + sums[:, i]
    return count


@jit
def _add(sums, i, value, importance):  # type: ignore[no-untyped-def]
    weight = np.float64(importance)
    sums[0, i] += weight
    sums[1, i] += weight * value
    sums[2, i] += weight * value * value
