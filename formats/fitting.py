"""The loops of `ganq.py` for the CPU: codes of a block of columns one after the other, and sums over pairs of codes."""

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import jit
from compress.formats.threads import in_threads

_ACROSS, _DOWN = 128, 1024  # of the Hessian, at once: half a megabyte, which stays near a core
_LANE, _ROWS = 32, 8  # columns that are moved at once, and rows: one need not wait for the other


def choose(
    wanted: Tensor,
    base: Tensor,
    reach: Tensor,
    tables: tuple[Tensor, Tensor],
    columns: Tensor,
    found: tuple[Tensor, ...],
) -> None:
    """The nearest levels to a block of columns, each of which moves later ones: wanted[:, j] += change * reach[i, j].

    wanted: (rows, n) float32, overwritten by the changes, what is stored less base. base: the same shape, or `wanted`
    itself. reach: (n, n) float32. tables: levels (blocks, rows, K) float32, K a power of two, and for all columns of
    the weight which block is theirs, int64. columns: (n,) int64, their numbers in the weight. found: codes uint8 and
    what is stored float32, (rows, in_features), both to be filled, and perhaps a bool of what is stored as wanted.
    """
    levels, blocks = tables
    codes, stored, *kept = found
    bounds = (levels[..., 1:] + levels[..., :-1]) / 2
    exact = kept[0] if kept else torch.zeros(0, 0, dtype=torch.bool)
    arrays = (
        wanted,
        base,
        reach.triu(1),
        levels.contiguous(),
        bounds,
        blocks[columns],
        columns,
        exact,
        codes,
        stored,
    )
    in_threads(_choose_rows, len(wanted), codes.numel(), *(array.numpy() for array in arrays))


def pairs(codes: Tensor, pulled: Tensor, hessian: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sums over a symmetric Hessian by the codes of both its columns, and over `pulled` by those of its columns.

    codes: (rows, n) uint8. pulled: (rows, n) float32. hessian: (n, n) float32. Returns (rows, clusters, clusters) and
    (rows, clusters) float64.
    """
    matrices, vectors = torch.zeros(len(codes), clusters, clusters).double(), torch.zeros(len(codes), clusters).double()
    arrays = (codes.contiguous(), pulled.contiguous(), hessian.contiguous(), matrices, vectors)
    in_threads(_pair_rows, len(codes), codes.numel(), *(array.numpy() for array in arrays))
    return matrices + matrices.transpose(1, 2), vectors


@jit
def _choose_rows(start, stop, wanted, base, reach, levels, bounds, blocks, columns, kept, codes, stored):  # type: ignore[no-untyped-def]
    half = levels.shape[2] // 2
    for head in range(start, stop, _ROWS):
        for i in range(len(columns)):
            column, block, first = columns[i], blocks[i], i // _LANE * _LANE
            pull = reach[i, first:]
            for row in range(head, min(head + _ROWS, stop)):
                value, bound = wanted[row, i], bounds[block, row]
                code, step = 0, half
                while step:
                    code += step * (value > bound[code + step - 1])
                    step //= 2
                chosen = levels[block, row, code]
                if len(kept) and kept[row, column]:
                    chosen = value
                codes[row, column], stored[row, column] = code, chosen
                change = chosen - base[row, i]
                wanted[row, i] = change
                if change != 0:
                    later = wanted[row, first:]
                    for j in range(len(pull)):
                        later[j] += change * pull[j]


@jit
def _pair_rows(start, stop, codes, pulled, hessian, matrices, vectors):  # type: ignore[no-untyped-def]
    """Of the matrices what is to be added to its transpose: of tiles on the diagonal half, and those below it."""
    count, clusters = len(hessian), matrices.shape[1]
    tile, sums = np.zeros((_DOWN, _ACROSS), np.float32), np.empty((clusters, _ACROSS), np.float32)
    for row in range(start, stop):
        for i in range(count):
            vectors[row, codes[row, i]] += pulled[row, i]
    for first in range(0, count, _ACROSS):
        width = min(_ACROSS, count - first)
        for top in range(first, count, _DOWN):
            height = min(_DOWN, count - top)
            for j in range(height):
                scale = np.float32(0.5 if top + j < first + width else 1)
                for i in range(width):
                    tile[j, i] = scale * hessian[top + j, first + i]
            for row in range(start, stop):
                sums[:] = 0
                for j in range(height):
                    into, line = sums[codes[row, top + j]], tile[j]
                    for i in range(_ACROSS):
                        into[i] += line[i]
                across = codes[row, first : first + width]
                for k in range(clusters):
                    total, line = matrices[row, k], sums[k]
                    for i in range(width):
                        total[across[i]] += line[i]
