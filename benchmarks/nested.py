"""How good a nested codebook can be at all its widths: what no tree of cells can get below, beside what is found.

    python benchmarks/nested.py

For any weights of the widths' errors (each beside its optimum, weights adding up to 1) the least weighted mean over all
trees is a bound: the worst width of every tree is at least as bad. The least mean is found exactly, by dynamic
programming over all runs of distinct values; weights by multiplicative updates over runs of fewer, merged ones.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from compress.formats import cluster
from compress.formats.compiled import float_bits
from compress.formats.distinct import distinct, room
from compress.formats.intervals import GAUSSIAN, cut
from compress.formats.nesting import _cost, _error

MERGED, ROUNDS = 600, 40


@numba.njit
def least(sums: Any, weights: Any) -> Any:
    """The least sum of weighted errors over all trees, and the cells of one. The best splits of neighbouring runs bound
    one another (Yao, 1980), so that few are tried."""
    last, bits = sums.shape[1] - 1, len(weights) - 1
    splits = np.zeros((bits, last + 1, last + 1), np.int16)
    now = np.zeros((last + 1, last + 1))
    for i in range(last + 1):
        for j in range(i, last + 1):
            now[i, j] = weights[bits] * _cost(sums, i, j)
    for level in range(bits - 1, -1, -1):
        above, split = np.zeros((last + 1, last + 1)), splits[level]
        for i in range(last, -1, -1):
            split[i, i] = i
            for j in range(i + 1, last + 1):
                best = np.inf
                for k in range(split[i, j - 1], split[i + 1, j] + 1):
                    if now[i, k] + now[k, j] < best:
                        best, split[i, j] = now[i, k] + now[k, j], k
                above[i, j] = best + weights[level] * _cost(sums, i, j)
        now = above
    cells = np.zeros((1 << bits) + 1, np.int64)
    cells[-1] = last
    for level in range(bits):
        step = 1 << (bits - level)
        for k in range(0, 1 << bits, step):
            cells[k + step // 2] = splits[level, cells[k], cells[k + step]]
    return now[0, last], cells


def bound(row: Tensor, bits: int) -> float:
    """row: (n,) bf16. What the worst width of any tree is at least, beside its optimum."""
    source, shift = float_bits(row[None])
    items, sums, work, places, cuts = room(len(row))
    sums = sums[:, : distinct(source[0], shift, np.ones(1, np.float32), items, sums) + 1]

    def ends(clusters: int) -> Any:
        cut(sums, clusters, 2 * GAUSSIAN / clusters**3, work, places, cuts)
        return cuts[: clusters + 1].copy()

    widths = range(2, bits + 1)
    optimal = np.array([1.0, 1.0, *(_error(sums, ends(1 << width), 1 << width, 1) for width in widths)])
    merged = np.ascontiguousarray(sums[:, ends(min(MERGED, sums.shape[1] - 1))])
    weights, step, found, best = np.array([0.0, 0.0, *(1 / len(widths) for _ in widths)]), 40.0, 0.0, optimal
    for _ in range(ROUNDS):
        mean, cells = least(merged, weights / optimal)
        if mean > found:
            found, best = mean, weights.copy()
        errors = [_error(merged, cells, 1 << bits, 1 << (bits - width)) for width in widths] / optimal[2:]
        weights[2:] *= np.exp(step * (errors - errors.mean()))
        weights /= weights.sum()
        step *= 0.95
    return float(least(sums, best / optimal)[0])


def worst(row: Tensor, bits: int) -> float:
    """The same of what is found."""
    codes, books = cluster.nested(row[None], bits)
    ratios = []
    for width, book in enumerate(books, 2):
        own = cluster.codebooks(row[None], 1 << width)
        pairs = ((book, codes >> (bits - width)), (own, cluster.assign(row[None], own)))
        errors = [(levels.double().gather(1, at.long()) - row.double()).square().sum() for levels, at in pairs]
        ratios.append(float(errors[0] / errors[1]))
    return max(ratios)


def main() -> None:
    random = np.random.default_rng(0)
    drawn = {
        "normal": random.standard_normal(1 << 16),
        **{f"t, 5 degrees of freedom, {i}": random.standard_t(5, 1 << 16) for i in (1, 2, 3)},
        "t, 3 degrees of freedom": random.standard_t(3, 1 << 16),
    }
    print("| 65536 weights in bf16 | nested | worst width | of no tree below |\n|---|--:|--:|--:|")
    for name, values in drawn.items():
        row = torch.from_numpy(values).bfloat16()
        for bits in (4, 6, 8):
            print(f"| {name} | {bits} | {worst(row, bits):.4f} | {bound(row, bits):.4f} |", flush=True)


if __name__ == "__main__":
    main()
