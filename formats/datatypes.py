"""Fixed codebooks in blocks: a scale for each, and of several codebooks the one that fits it best.

nf: quantiles of a normal distribution (QLoRA [2305.14314], appendix E). bitmod3, bitmod4: BitMoD [2411.11745], small
floats whose second zero is one of four other values, a finer step or a further end.
"""

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import float_bits, jit
from compress.formats.threads import in_threads

_FLOATS = {"bitmod3": (1.0, 2.0, 4.0), "bitmod4": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)}
_SPECIAL = {"bitmod3": (3.0, 6.0), "bitmod4": (5.0, 8.0)}
WIDTHS = {"bitmod3": 3, "bitmod4": 4}  # in bits, of those that have only one
_STEPS = np.linspace(0.5, 1.25, 16)  # scales that are tried, of the one that spans the block


def levels(name: str, bits: int) -> Tensor:
    """(codebooks, 2**bits) float32, each ascending."""
    if name == "nf":
        return _normal(bits)[None]
    magnitudes = _FLOATS[name]
    ends = [sign * special for special in _SPECIAL[name] for sign in (-1, 1)]
    return torch.tensor([sorted([0.0, *magnitudes, *(-m for m in magnitudes), end]) for end in ends])


def _normal(bits: int) -> Tensor:
    """As many quantiles below zero as above, one more above, and zero; the furthest are -1 and 1."""
    count = 1 << bits
    tail = 0.5 * (1 / 32 + 1 / 30)  # bitsandbytes' end of the quantiles, for every width
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(1 - tail, 0.5, count // 2 + 1, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(1 - tail, 0.5, max(count // 2, 2), dtype=torch.float64)[:-1])
    found = torch.cat([above, below, torch.zeros(1)])[: count + 1].sort().values[-count:]
    return (found / found.abs().max()).float()


def search(weight: Tensor, tables: Tensor, block: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each block of a row, and the number of its codebook, that leave the least weighted squared error.

    weight: (rows, columns) bf16, fp16 or fp32, on the CPU, finite. tables: (codebooks, K) float32. block: columns, of
    which the last may have fewer. importance: (1 or rows, columns) positive. Returns (rows, blocks) float32, positive,
    and uint8.
    """
    rows, blocks = len(weight), -(-weight.shape[1] // block)
    scales, numbers = torch.ones(rows, blocks), torch.zeros(rows, blocks, dtype=torch.uint8)
    source, shift = float_bits(weight)
    weights, known = importance.float().contiguous().numpy(), tables.contiguous().numpy()
    in_threads(
        _search_rows, rows, weight.numel(), source, shift, known, block, weights, scales.numpy(), numbers.numpy()
    )
    return scales, numbers


@jit
def _search_rows(start, stop, source, shift, tables, block, importance, scales, numbers):  # type: ignore[no-untyped-def]
    values = np.empty(source.shape[1], np.float32)
    for row in range(start, stop):
        for i in range(values.shape[0]):
            values[i] = np.uint32(np.uint32(source[row, i]) << shift).view(np.float32)
        for b in range(scales.shape[1]):
            part = values[b * block : (b + 1) * block]
            weights = importance[min(row, importance.shape[0] - 1), b * block : (b + 1) * block]
            most = 0.0
            for t in range(tables.shape[0]):
                scale, explained = _fit_scale(part, weights, tables[t])
                if explained > most:
                    most = explained
                    scales[row, b] = scale
                    numbers[row, b] = t


@jit
def _fit_scale(values, weights, table):  # type: ignore[no-untyped-def]
    """The least-squares scale of the best codes that were tried, and what it explains of the sum of squares."""
    span = np.float64(max(values.min() / table[0], values.max() / table[-1]))
    best, most = 1.0, 0.0
    bounds = (table[1:] + table[:-1]) * np.float32(0.5)
    for step in _STEPS:
        if not span > 0:
            break
        inverse = np.float32(1 / (span * step))
        wv, vv = 0.0, 0.0
        for i in range(values.shape[0]):
            x = values[i] * inverse
            code = 0
            for bound in bounds:
                code += x > bound
            v = np.float64(table[code])
            wv += np.float64(weights[i]) * values[i] * v
            vv += np.float64(weights[i]) * v * v
        if vv > 0 and wv > 0 and wv * wv / vv > most:
            most = wv * wv / vv
            best = wv / vv
    return best, most
