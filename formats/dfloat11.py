"""The streams of DFloat11's published checkpoints (arXiv:2504.11651): Huffman codes of exponents, decoded by block.

A code's first bit is the highest. `luts` are tables of 256 for eight bits of a code: an entry is an exponent, or from
240 on leads to table 256 - entry for the next eight; the last row has the lengths. A thread of theirs decodes the codes
that start in its 64 bits, the first of them `gaps` bits in; `output_positions` count the values before each block of
threads. So every block decodes by itself, and has to end where the next one starts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import jit
from compress.formats.threads import in_threads

THREAD_BYTES, GAP_BITS, LONGEST, POINTERS = 8, 5, 32, 240
_8, _32, _56, _BYTE = (np.uint64(n) for n in (8, 32, 56, 255))


def tables(luts: Any) -> Any:
    """luts: (tables + 1, 256) uint8. Returns (tables, 256) uint16: symbol with its length from bit 8, or the number of
    the next table, or 0 for what no code leads to.

    Such entries exist: their writer fills up a table with what came last, also in the table before.
    """
    values, lengths = luts[:-1], luts[-1].astype(np.uint16)
    if lengths[POINTERS:].any() or lengths.max() > LONGEST:
        raise ValueError("luts has a code for exponents from 240 on, which the format cannot hold, or one over 32 bits")
    further = 256 - values.astype(np.uint16)
    known = np.where(lengths[values] > 0, lengths[values] << 8 | values, 0)
    return np.where(values < POINTERS, known, np.where(further < len(values), further, 0)).astype(np.uint16)


def decode(tensors: dict[str, Tensor], threads: int, start: int, stop: int) -> Tensor:
    """Values `start` to `stop` of a unit: (stop - start,) bfloat16. threads: how many a block has.

    Raises ValueError where the tensors do not fit together.
    """
    codes, rest, gaps = (tensors[local].numpy().reshape(-1) for local in ("encoded_exponent", "sign_mantissa", "gaps"))
    counts = tensors["output_positions"].numpy().reshape(-1).view("<u4").astype(np.int64)
    if counts[0] != 0 or counts[-1] != rest.size or (np.diff(counts) < 0).any():
        raise ValueError(f"output_positions do not ascend from 0 to {rest.size}")
    blocks = np.arange(len(counts) - 1)
    # A block's first gap starts a byte: there are eight, or a multiple, of five bits for each block.
    starts = THREAD_BYTES * threads * 8 * blocks + (gaps[GAP_BITS * threads // 8 * blocks] >> 3)
    first, last = np.searchsorted(counts, start, "right") - 1, np.searchsorted(counts, stop)
    out, ends = np.empty(stop - start, np.uint16), np.empty(max(0, last - first), np.int64)
    inputs = (codes, rest, tables(tensors["luts"].numpy()), counts[first:], starts[first:])
    in_threads(_decode_blocks, len(ends), out.size, *inputs, start, out, ends)
    wanted = starts[first + 1 : last + 1]
    if not np.array_equal(ends[: len(wanted)], wanted):
        raise ValueError("encoded_exponent, luts, gaps and output_positions do not fit together")
    if len(ends) > len(wanted) and not 8 * codes.size - 8 < ends[-1] <= 8 * codes.size:  # the last byte is filled up
        raise ValueError("encoded_exponent is cut off or too long")
    return torch.from_numpy(out).view(torch.bfloat16)


@jit
def _decode_blocks(begin, end, codes, rest, tables, counts, starts, offset, out, ends):  # type: ignore[no-untyped-def]
    """out: the values from `offset` on. ends: the bit after each block's last code, -1 where bits are no code."""
    first = tables[0]
    for block in range(begin, end):
        byte = starts[block] >> 3
        skipped = starts[block] & 7
        buffer = _next_bits(codes, byte) << (_32 + np.uint64(skipped))
        byte, have = byte + 4, 32 - skipped  # where to go on, and how many of the 64 bits are of the stream
        ends[block] = 0
        for i in range(counts[block], counts[block + 1]):
            if have < 32:
                buffer |= _next_bits(codes, byte) << np.uint64(32 - have)
                byte, have = byte + 4, have + 32
            entry = np.int64(first[buffer >> _56])
            if entry < 256:
                entry = _look_further(tables, entry, buffer)
                if entry == 0:
                    ends[block] = -1
                    break
            buffer <<= np.uint64(entry >> 8)
            have -= entry >> 8
            place = i - offset
            if 0 <= place < out.size:
                low = np.uint32(rest[i])
                high = ((low & np.uint32(0x80)) << np.uint32(8)) | (np.uint32(entry & 255) << np.uint32(7))
                out[place] = high | (low & np.uint32(0x7F))
        if ends[block] == 0:
            ends[block] = 8 * byte - have


@jit
def _look_further(tables, entry, buffer):  # type: ignore[no-untyped-def]
    """The entry that the tables after the first lead to for the code that buffer starts with, 0 where there is none."""
    for level in range(1, 4):
        if entry == 0 or entry >= 256:
            break
        entry = np.int64(tables[entry, (buffer >> np.uint64(56 - 8 * level)) & _BYTE])
        if 8 * level < entry >> 8 <= 8 * level + 8:
            return entry
    return np.int64(0)


@jit
def _next_bits(codes, byte):  # type: ignore[no-untyped-def]
    """The 32 bits from `byte` on, the first one highest, with zeros after the end."""
    bits = np.uint64(0)
    for i in range(byte, byte + 4):
        bits = (bits << _8) | np.uint64(codes[i] if i < codes.size else 0)
    return bits
