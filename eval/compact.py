"""Next-token distributions in a compact form, and what is measured on them: the original's are kept, others compared.

Of each row those tokens are kept that hold all of the probability but at most a millionth; the rest becomes one more
outcome. A logarithm of a probability is a multiple of 2**-11 nats below the row's largest, in 16 bits. For the
divergence both distributions are rounded to that grid, so that equal logits have a divergence of exactly zero. What
this adds to a mean divergence is below 1e-4 nats: of the rounding, 2e-8 (half of twice its variance, 2**-22 / 12) and
its covariance with the difference, which has either sign; of the tail, a millionth of the divergence within it.
Likelihoods and ranks are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.formats.compiled import jit
from compress.formats.threads import in_threads

TOP = 5
TAIL = 1e-6
_STEPS = 2048  # of the grid in a nat
_CODES = 2**16  # 32 nats
_BIN = 512  # codes of one bin of the histogram that finds the tail, 0.25 nats
_FARTHEST = 1000.0  # nats below the largest; exp() of it is zero
_TABLE = np.exp(-np.arange(_CODES) / _STEPS)
_BITS = np.array([code.bit_count() for code in range(256)], np.uint8)  # set in a byte
_CHUNK_BYTES = 32 * 2**20

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Rows:
    """What is kept of some rows of logits; on the CPU.

    mask: (rows, ceil(vocabulary / 8)) uint8, a bit for each token that is kept, the first in the highest bit.
    codes: (kept,) uint16, row by row. tail: (rows,) float64, what the others hold together, the largest being 1.
    nll: (rows,) float64, nats. top: (rows, 5) int32, the likeliest tokens, of equal ones the first; -1 for none.
    """

    mask: Tensor
    codes: Tensor
    tail: Tensor
    nll: Tensor
    top: Tensor


@dataclass(frozen=True)
class Scores:
    """nll: (rows,) float64, nats. top: (rows, 5) int32. kl: (rows,) float64, nats, None without a reference."""

    nll: Tensor
    top: Tensor
    kl: Tensor | None


def encode(logits: Tensor, targets: Tensor) -> Rows:
    """logits: (rows, vocabulary), finite, any dtype and device. targets: (rows,) int64, the tokens that came next."""
    parts = [_encode(logits[part], targets[part]) for part in _chunks(logits)]
    return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in Rows.__dataclass_fields__))


def score(logits: Tensor, targets: Tensor, reference: Rows | None) -> Scores:
    """logits, targets: as for `encode`. reference: of the same rows of the original, for KL(original || logits)."""
    rows, vocabulary = logits.shape
    nll, top, kl = np.empty(rows), np.empty((rows, TOP), np.int32), np.empty(rows)
    if reference is None:
        kept: tuple[Array, ...] = (
            np.empty((rows, 0), np.uint8),
            np.empty(0, np.uint16),
            np.empty(0),
            np.zeros(rows, np.int64),
        )
    else:
        mask = reference.mask.numpy()
        starts = np.concatenate([[0], np.cumsum(_BITS[mask].sum(1, dtype=np.int64))])
        kept = (mask, reference.codes.numpy(), reference.tail.numpy(), starts)
    for part in _chunks(logits):
        found = (nll[part], top[part], kl[part])
        mask, codes, tail, starts = kept
        arguments = (_plain(logits[part]), targets[part].cpu().numpy(), _TABLE)
        size = len(found[0]) * vocabulary
        of_reference = (mask[part], codes, tail[part], starts[part])
        in_threads(_score_rows, len(found[0]), size, *arguments, *of_reference, *found)
    result = [torch.from_numpy(values) for values in (nll, top, kl)]
    return Scores(result[0], result[1], None if reference is None else result[2])


def _encode(logits: Tensor, targets: Tensor) -> Rows:
    rows, vocabulary = logits.shape
    mask = np.zeros((rows, -(-vocabulary // 8)), np.uint8)
    codes, counts = np.empty((rows, vocabulary), np.uint16), np.empty(rows, np.int64)
    tail, nll, top = np.empty(rows), np.empty(rows), np.empty((rows, TOP), np.int32)
    arguments = (_plain(logits), targets.cpu().numpy(), _TABLE)
    in_threads(_encode_rows, rows, logits.numel(), *arguments, mask, codes, counts, tail, nll, top)
    kept = np.concatenate([row[:count] for row, count in zip(codes, counts, strict=True)])
    return Rows(*map(torch.from_numpy, (mask, kept, tail, nll, top)))


def _plain(logits: Tensor) -> Array:
    """As float32 on the CPU, which holds the values of every dtype that a model emits."""
    plain: Array = logits.detach().cpu().float().contiguous().numpy()
    return plain


def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


@jit
def _largest(row, top):  # type: ignore[no-untyped-def]
    """Fills `top` and returns the largest value."""
    top[:] = -1
    count = min(TOP, row.size)
    least = -np.inf
    filled = 0
    for token in range(row.size):
        value = row[token]
        if filled == count and value <= least:
            continue
        place = filled if filled < count else count - 1
        while place > 0 and row[top[place - 1]] < value:
            top[place] = top[place - 1]
            place -= 1
        top[place] = token
        filled = min(filled + 1, count)
        least = row[top[filled - 1]] if filled == count else -np.inf
    return np.float64(row[top[0]])


@jit
def _code(depth):  # type: ignore[no-untyped-def]
    return np.int64(depth * _STEPS + 0.5)


@jit
def _mass(depth, code, table):  # type: ignore[no-untyped-def]
    """exp(-depth), from the nearest multiple of the step, beyond which a cubic is exact to a double's last bit."""
    if code >= _CODES:
        return math.exp(-depth)
    rest = depth - code / _STEPS
    return table[code] * (1.0 - rest * (1.0 - rest * (0.5 - rest / 6.0)))


@jit
def _encode_rows(start, stop, logits, targets, table, mask, codes, counts, tail, nll, top):  # type: ignore[no-untyped-def]
    histogram = np.empty(_CODES // _BIN, np.int64)
    for i in range(start, stop):
        row, line = logits[i], codes[i]
        largest = _largest(row, top[i])
        histogram[:] = 0
        total = 0.0
        for token in range(row.size):
            depth = min(largest - row[token], _FARTHEST)
            code = _code(depth)
            total += _mass(depth, code, table)
            line[token] = min(code, _CODES - 1)
            histogram[line[token] // _BIN] += 1
        nll[i] = math.log(total) + largest - row[targets[i]]
        cut, held = histogram.size, 0.0
        while cut > 1:
            held += histogram[cut - 1] * table[(cut - 1) * _BIN]  # at most
            if held > TAIL:
                break
            cut -= 1
        count, rest = 0, 0.0
        for token in range(row.size):
            code = line[token]
            if code < cut * _BIN:
                mask[i, token // 8] |= 128 >> (token % 8)
                line[count] = code
                count += 1
            else:
                rest += table[code]
        counts[i], tail[i] = count, rest


@jit
def _score_rows(start, stop, logits, targets, table, mask, codes, tail, starts, nll, top, kl):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        row = logits[i]
        largest = _largest(row, top[i])
        at = starts[i]
        total, theirs, ours, rest, cross = 0.0, 0.0, 0.0, 0.0, 0.0
        for token in range(row.size):
            depth = min(largest - row[token], _FARTHEST)
            code = _code(depth)
            total += _mass(depth, code, table)
            if mask.shape[1] and mask[i, token // 8] & (128 >> (token % 8)):
                p = table[codes[at]]
                cross += p * (code - np.int64(codes[at]))
                theirs += p
                ours += table[code] if code < _CODES else math.exp(-code / _STEPS)
                at += 1
            else:
                rest += table[min(code, _CODES - 1)]
        nll[i] = math.log(total) + largest - row[targets[i]]
        if mask.shape[1]:
            cross /= _STEPS
            if tail[i] > 0:
                cross += tail[i] * (math.log(tail[i]) - math.log(rest))
            # the same sum of the same terms where the logits are equal
            kl[i] = max(0.0, cross / (theirs + tail[i]) + math.log((ours + rest) / (theirs + tail[i])))
