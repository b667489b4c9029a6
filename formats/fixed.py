"""Fixed-length codes of 16-bit words: three bits for one of eight consecutive symbols, and a list of all other words.

The idea of ZipServ (arXiv:2603.17435), laid out so that any word is found at once: two bits and one bit of its code
lie in planes of 64 and 32 bytes for each block of 256 words, next to those of its neighbours. Words with another
symbol, the escapes, have code 0 and are written over afterwards. Symbol and rest as in `formats.huffman`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.formats.compiled import jit
from compress.formats.huffman import CHUNK, are_stored
from compress.formats.threads import in_threads

BLOCK = 256  # words; the position of an escape in its block is a byte
WINDOW = 8
BLOCK_BYTES = BLOCK * 3 // 8


def window(counts: Any) -> int:
    """counts: (256,), how often each symbol occurs. Returns the first of the eight that cover the most words."""
    covered = np.convolve(counts, np.ones(WINDOW, np.int64), "valid")
    return int(covered.argmax())


def encode(words: Any, base: int, rest: Any) -> tuple[Any, Any, Any]:
    """words: (n,) uint16. rest: (n,) uint8, to be filled.

    Returns codes (blocks, 96) uint8, the number of escapes in each block (blocks,) uint16, and the escapes, uint16:
    position in the block << 8 | symbol.
    """
    blocks = -(-words.size // BLOCK)
    counts = np.zeros(blocks, np.uint16)
    in_threads(_count_escapes, blocks, words.size, words, np.uint8(base), counts)
    offsets = _offsets(counts)
    codes, escapes = np.empty((blocks, BLOCK_BYTES), np.uint8), np.empty(offsets[-1], np.uint16)
    in_threads(_encode_blocks, blocks, words.size, words, np.uint8(base), offsets, codes, escapes, rest)
    return codes, counts, escapes


def decode(
    base: int,
    codes: Any,
    counts: Any,
    escapes: Any,
    rest: Any,
    out: Any,
    count: int | None = None,
    chunks: Any = None,
    loop: Any = None,
) -> None:
    """The inverse of `encode`: fills out, (n,) uint16. count and chunks as in `huffman.decode`. loop: over chunks, one
    that takes and does what `_decode_chunks` here does.

    Raises ValueError where the tensors do not fit together.
    """
    total = out.size if count is None else count
    blocks = -(-total // BLOCK)
    fits = codes.shape == (blocks, BLOCK_BYTES) and counts.shape == (blocks,) and rest.shape == (total,)
    stored = are_stored(np.uint8, codes, rest) and are_stored(np.uint16, counts, escapes)
    if not (fits and stored and 0 <= base <= 256 - WINDOW):
        raise ValueError("the codes are cut off or damaged; download the checkpoint again")
    offsets = _offsets(counts)
    if escapes.shape != (offsets[-1],):
        raise ValueError("the codes are cut off or damaged; download the checkpoint again")
    which = np.arange(-(-total // CHUNK)) if chunks is None else chunks
    arguments = (np.uint8(base), codes, offsets, escapes, rest, which, total, out)
    in_threads(loop or _decode_chunks, len(which), out.size, *arguments)


def _offsets(counts: Any) -> Any:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


@jit
def _codes_of(words, base, out):  # type: ignore[no-untyped-def]
    """out: symbol - base of each word, modulo 256; 8 and above are escapes."""
    for i in range(words.size):
        out[i] = np.uint8(np.uint8(words[i] >> np.uint16(7)) - base)


@jit
def _count_escapes(start, stop, words, base, counts):  # type: ignore[no-untyped-def]
    codes = np.empty(BLOCK, np.uint8)
    for block in range(start, stop):
        part = words[block * BLOCK : (block + 1) * BLOCK]
        _codes_of(part, base, codes)
        number = np.uint16(0)
        for i in range(part.size):
            number += np.uint16(codes[i] >= WINDOW)
        counts[block] = number


@jit
def _encode_blocks(start, stop, words, base, offsets, packed, escapes, rest):  # type: ignore[no-untyped-def]
    codes = np.empty(BLOCK, np.uint8)
    for block in range(start, stop):
        part = words[block * BLOCK : (block + 1) * BLOCK]
        low = rest[block * BLOCK : (block + 1) * BLOCK]
        codes[:] = 0
        _codes_of(part, base, codes)
        for i in range(part.size):
            word = np.uint32(part[i])
            low[i] = np.uint8(((word >> np.uint32(8)) & np.uint32(0x80)) | (word & np.uint32(0x7F)))
        position = offsets[block]
        if offsets[block + 1] > position:
            for i in range(part.size):
                if codes[i] >= WINDOW:
                    escapes[position] = np.uint16(i << 8) | np.uint16(np.uint8(codes[i] + base))
                    codes[i] = 0
                    position += 1
        _pack(codes, packed[block])


@jit
def _pack(codes, packed):  # type: ignore[no-untyped-def]
    three, one, four = np.uint8(3), np.uint8(1), np.uint8(4)
    for i in range(64):
        packed[i] = (
            (codes[i] & three)
            | ((codes[i + 64] & three) << np.uint8(2))
            | ((codes[i + 128] & three) << np.uint8(4))
            | ((codes[i + 192] & three) << np.uint8(6))
        )
    high = packed[64:]
    high[:] = 0
    for j in range(8):
        part = codes[32 * j : 32 * j + 32]
        for i in range(32):
            high[i] |= ((part[i] & four) >> np.uint8(2) & one) << np.uint8(j)


@jit
def _unpack(packed, codes):  # type: ignore[no-untyped-def]
    high = packed[64:]
    for j in range(4):
        part, shift = codes[64 * j : 64 * j + 64], np.uint8(2 * j)
        for i in range(64):
            part[i] = (packed[i] >> shift) & np.uint8(3)
    for j in range(8):
        part, shift = codes[32 * j : 32 * j + 32], np.uint8(j)
        for i in range(32):
            part[i] |= ((high[i] >> shift) & np.uint8(1)) << np.uint8(2)


@jit
def _decode_chunks(start, stop, base, packed, offsets, escapes, rest, which, total, out):  # type: ignore[no-untyped-def]
    for slot in range(start, stop):
        first = which[slot] * CHUNK // BLOCK
        for block in range(first, min(first + CHUNK // BLOCK, packed.shape[0])):
            place = slot * CHUNK + (block - first) * BLOCK
            low = rest[block * BLOCK : min((block + 1) * BLOCK, total)]
            found = escapes[offsets[block] : offsets[block + 1]]
            _decode_block(base, packed[block], found, low, out[place : place + low.size])


@jit
def _decode_block(base, packed, escapes, low, words):  # type: ignore[no-untyped-def]
    codes = np.empty(BLOCK, np.uint8)
    _unpack(packed, codes)
    for i in range(words.size):
        bits = np.uint32(low[i])
        symbol = np.uint32(codes[i]) + np.uint32(base)
        words[i] = ((bits & np.uint32(0x80)) << np.uint32(8)) | (symbol << np.uint32(7)) | (bits & np.uint32(0x7F))
    for escape in escapes:
        i = np.int64(escape >> np.uint16(8))
        if i < words.size:  # always, but in a damaged file
            words[i] = (words[i] & np.uint16(0x807F)) | ((escape & np.uint16(255)) << np.uint16(7))
