"""Length-limited canonical Huffman codes of bytes, in chunks that decode independently.

Code lengths by package-merge (Larmore and Hirschberg, 1990). A code's first bit is the lowest of the stream, so that
one 64-bit load and a table look-up give several symbols at once; four chunks are decoded side by side, because each
look-up waits for the one before it.

The symbol of a 16-bit word is its bits 7 to 14 (the exponent of a bfloat16); the other eight lie apart as `rest`. The
symbol of an 8-bit word is the word, and there is no rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.formats.compiled import jit, load64, store64
from compress.formats.threads import in_threads

CHUNK = 1 << 14  # symbols
LIMIT = 12  # bits of the longest code: the decoder's table of 2**12 entries stays in a core's first two caches
PADDING = 8  # bytes at least after the last code, so that 64 bits can be loaded at any of them
_AT_ONCE = 6  # symbols that one look-up gives at most
_STRIDE = CHUNK + 32  # of the four chunks in the decoder's scratch; 8 bytes are stored where fewer count
_MASK = np.uint64((1 << LIMIT) - 1)
_1, _3, _7, _8, _16, _24, _32, _48, _56, _63 = (np.uint64(n) for n in (1, 3, 7, 8, 16, 24, 32, 48, 56, 63))
_LOW16, _LOW24 = np.uint64(0xFFFF), np.uint64(0xFFFFFF)


def histogram(words: Any) -> Any:
    """words: (n,) uint16 or uint8. Returns (chunks, 256) uint32: how often each chunk has each symbol."""
    counts = np.zeros((-(-words.size // CHUNK), 256), np.uint32)
    in_threads(_count, len(counts), words.size, words, counts)
    return counts


def code_table(counts: Any) -> Any:
    """counts: (256,) integers, how often each symbol occurs. Returns (k, 2) uint8: the symbols that occur with the
    lengths of their codes, by length and symbol. The sum of length * count is the least for lengths of at most 12.

    One symbol alone has length 0.
    """
    symbols = np.flatnonzero(counts)
    ranked = symbols[np.argsort(counts[symbols], kind="stable")]
    lengths = package_merge(np.asarray(counts)[ranked].astype(np.int64), LIMIT)
    order = np.lexsort((ranked, lengths))
    return np.stack([ranked[order], lengths[order]], axis=1).astype(np.uint8)


@jit
def package_merge(weights, limit):  # type: ignore[no-untyped-def]
    """The lengths, (n,) int64 of at most `limit`, of an optimal prefix code for `weights`, which are (n,) int64 and
    ascend; n is at most 2**limit."""
    lengths = np.zeros(weights.size, np.int64)
    if weights.size < 2:
        return lengths
    # Each row merges the weights with pairs of the row before; what counts is only which of its items are weights.
    are_weights = np.zeros((limit, 2 * weights.size), np.bool_)
    items = np.empty(2 * weights.size, np.int64)
    packages = items[:0].copy()
    for row in range(limit):
        i = j = 0
        while i < weights.size or j < packages.size:
            is_weight = j == packages.size or (i < weights.size and weights[i] <= packages[j])
            are_weights[row, i + j] = is_weight
            items[i + j] = weights[i] if is_weight else packages[j]
            i, j = i + is_weight, j + (not is_weight)
        packages = items[: (i + j) // 2 * 2 : 2] + items[1 : i + j : 2]
    taken = 2 * weights.size - 2
    for row in range(limit - 1, -1, -1):
        leaves = are_weights[row, :taken].sum()
        lengths[:leaves] += 1  # the lightest ones, as in every row
        taken = 2 * (taken - leaves)
    return lengths


def check_table(table: Any) -> None:
    """Raises ValueError for a table that is not that of a complete canonical code."""
    if table.ndim != 2 or table.shape[1] != 2 or not are_stored(np.uint8, table) or not _is_complete(table):
        raise ValueError("the table of code lengths is damaged; download the checkpoint again")


@jit
def _is_complete(table):  # type: ignore[no-untyped-def]
    """Whether the rows ascend by length and symbol, no symbol is there twice, and no code is left over."""
    if table.shape[0] == 1:
        return table[0, 1] == 0
    seen = np.zeros(256, np.bool_)
    used = 0
    for i in range(table.shape[0]):
        symbol, length = np.int64(table[i, 0]), np.int64(table[i, 1])
        if seen[symbol] or not 1 <= length <= LIMIT:
            return False
        if i and (np.int64(table[i - 1, 1]), np.int64(table[i - 1, 0])) >= (length, symbol):
            return False
        seen[symbol] = True
        used += 1 << (LIMIT - length)
    return used == 1 << LIMIT


def chunk_bytes(counts: Any, table: Any) -> Any:
    """counts: (chunks, 256), as `histogram` gives. Returns (chunks,) int64: the bytes of each chunk's codes."""
    lengths = np.zeros(256, np.int64)
    lengths[table[:, 0]] = table[:, 1]
    return (counts @ lengths + 7) // 8


def padded(size: int) -> int:
    """Bytes that are stored for `size` bytes of codes: whole words of 64 bits, which a GPU reads as they lie."""
    return -(-int(size) // 8) * 8 + PADDING


def encode(words: Any, table: Any, sizes: Any, rest: Any) -> Any:
    """words: (n,) uint16 or uint8. sizes: (chunks,), as `chunk_bytes` gives. rest: (n,) uint8 to be filled, or of size
    0 for 8-bit words. Returns the codes, (`padded(sum of sizes)`,) uint8.
    """
    offsets = _offsets(sizes)
    codes = np.zeros(padded(offsets[-1]), np.uint8)
    pairs = np.zeros(1 << 16, np.uint32)  # no bits for a symbol that was not counted
    _fill_pairs(table[:, 0], _code_words(table), pairs)
    in_threads(_encode_chunks, len(sizes), words.size, words, pairs, offsets, codes, rest)
    return codes


def decode(
    table: Any, sizes: Any, codes: Any, rest: Any, out: Any, count: int | None = None, chunks: Any = None
) -> None:
    """The inverse of `encode`: fills out, (n,) uint16 with rest (n,) uint8, or uint8 with a rest of size 0.

    sizes: uint16, as stored. chunks: only these of the chunks of `count` words, in ascending order, at every 16384th
    place of out; the very last one may be short.
    Raises ValueError where table, sizes, codes and rest do not fit together.
    """
    check_table(table)
    total = out.size if count is None else count
    fits = rest.shape == (total if out.itemsize == 2 else 0,) and sizes.shape == (-(-total // CHUNK),)
    if not (fits and codes.ndim == 1 and are_stored(np.uint8, codes, rest) and are_stored(np.uint16, sizes)):
        raise ValueError("the codes are cut off or damaged; download the checkpoint again")
    offsets = _offsets(sizes)
    if codes.size != padded(offsets[-1]):
        raise ValueError("the codes are cut off or damaged; download the checkpoint again")
    which = np.arange(len(sizes)) if chunks is None else chunks
    single = np.empty(1 << LIMIT, np.uint16)
    several = np.empty(1 << LIMIT, np.uint64)
    _fill_tables(table, _code_words(table), single, several)
    damaged = np.zeros(-(-len(which) // 4), np.uint8)
    tables = (single, several)
    in_threads(_decode_groups, len(damaged), out.size, codes, offsets, tables, rest, which, total, out, damaged)
    if damaged.any():
        raise ValueError("the codes are damaged; download the checkpoint again")


def are_stored(dtype: Any, *arrays: Any) -> bool:
    """Whether the arrays have the dtype they are stored with and no gaps: compiled loops check neither, and where all
    sizes are uint16, none is negative and their sums do not overflow."""
    return all(array.dtype == dtype and array.flags.c_contiguous for array in arrays)


def _offsets(sizes: Any) -> Any:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


@jit
def _code_words(table):  # type: ignore[no-untyped-def]
    """(k,) uint32: the canonical code of each row of the table, its first bit lowest, and its length from bit 16."""
    words = np.zeros(table.shape[0], np.uint32)
    code = previous = 0
    for i in range(table.shape[0]):
        length = np.int64(table[i, 1])
        code <<= length - previous
        previous = length
        word = length << 16
        for bit in range(length):
            word |= ((code >> bit) & 1) << (length - 1 - bit)
        words[i] = word
        code += 1
    return words


@jit
def _split(words, symbols, rest):  # type: ignore[no-untyped-def]
    if words.itemsize == 1:
        for i in range(words.size):
            symbols[i] = np.uint8(words[i])
        return
    for i in range(words.size):
        word = np.uint32(words[i])
        symbols[i] = np.uint8(word >> np.uint32(7))
        rest[i] = np.uint8(((word >> np.uint32(8)) & np.uint32(0x80)) | (word & np.uint32(0x7F)))


@jit
def _join(symbols, rest, words):  # type: ignore[no-untyped-def]
    if words.itemsize == 1:
        for i in range(words.size):
            words[i] = symbols[i]
        return
    for i in range(words.size):
        low = np.uint32(rest[i])
        high = ((low & np.uint32(0x80)) << np.uint32(8)) | (np.uint32(symbols[i]) << np.uint32(7))
        words[i] = high | (low & np.uint32(0x7F))


@jit
def _count(start, stop, words, counts):  # type: ignore[no-untyped-def]
    # Four histograms: the same symbol twice in a row would wait for its own count.
    parts = np.empty((4, 256), np.uint32)
    shift = np.uint32(7 if words.itemsize == 2 else 0)
    low = np.uint32(255)
    for chunk in range(start, stop):
        part = words[chunk * CHUNK : (chunk + 1) * CHUNK]
        parts[:] = 0
        for i in range(part.size // 4):
            parts[0, (np.uint32(part[4 * i]) >> shift) & low] += np.uint32(1)
            parts[1, (np.uint32(part[4 * i + 1]) >> shift) & low] += np.uint32(1)
            parts[2, (np.uint32(part[4 * i + 2]) >> shift) & low] += np.uint32(1)
            parts[3, (np.uint32(part[4 * i + 3]) >> shift) & low] += np.uint32(1)
        for i in range(part.size // 4 * 4, part.size):
            parts[0, (np.uint32(part[i]) >> shift) & low] += np.uint32(1)
        for symbol in range(256):
            counts[chunk, symbol] = parts[0, symbol] + parts[1, symbol] + parts[2, symbol] + parts[3, symbol]


@jit
def _fill_pairs(symbols, code_words, pairs):  # type: ignore[no-untyped-def]
    """pairs[first | second << 8]: both codes, and the sum of their lengths from bit 24."""
    for i in range(symbols.size):
        length = code_words[i] >> np.uint32(16)
        code = code_words[i] & np.uint32(0xFFFF)
        for j in range(symbols.size):
            both = code | ((code_words[j] & np.uint32(0xFFFF)) << length)
            total = length + (code_words[j] >> np.uint32(16))
            pairs[np.uint64(symbols[i]) | (np.uint64(symbols[j]) << _8)] = both | (total << np.uint32(24))


@jit
def _encode_chunks(start, stop, words, pairs, offsets, codes, rest):  # type: ignore[no-untyped-def]
    symbols = np.empty(CHUNK, np.uint8)
    room = np.zeros(CHUNK * LIMIT // 8 + 16, np.uint8)
    for chunk in range(start, stop):
        part = words[chunk * CHUNK : (chunk + 1) * CHUNK]
        _split(part, symbols, rest[chunk * CHUNK : (chunk + 1) * CHUNK])
        size = _encode_chunk(symbols, part.size, pairs, room)
        codes[offsets[chunk] : offsets[chunk] + size] = room[:size]


@jit
def _encode_chunk(symbols, count, pairs, room):  # type: ignore[no-untyped-def]
    """Returns how many bytes of room are filled."""
    position = np.int64(0)
    bits, used = np.uint64(0), np.uint64(0)  # what is not stored yet: less than 8 bits before every four symbols
    for i in range(count // 8):
        eight = load64(symbols, 8 * i)
        for _ in range(2):
            first = np.uint64(pairs[eight & _LOW16])
            second = np.uint64(pairs[(eight >> _16) & _LOW16])
            length = first >> _24
            bits |= ((first & _LOW24) | ((second & _LOW24) << length)) << used
            used += length + (second >> _24)
            store64(room, position, bits)
            position += np.int64(used >> _3)
            bits >>= used & _56
            used &= _7
            eight >>= _32
    for i in range(count // 8 * 8, count):
        alone = np.uint64(pairs[np.uint64(symbols[i]) | (np.uint64(symbols[i]) << _8)])
        length = alone >> np.uint64(25)  # twice the same code
        bits |= (alone & ((_1 << length) - _1)) << used
        used += length
        store64(room, position, bits)
        position += np.int64(used >> _3)
        bits >>= used & _56
        used &= _7
    return position + (1 if used else 0)


@jit
def _fill_tables(table, code_words, single, several):  # type: ignore[no-untyped-def]
    """Both by the next 12 bits. single: symbol, and length from bit 8. several: length of all, up to six symbols from
    bit 8, their number from bit 56."""
    for row in range(table.shape[0]):
        length = np.int64(table[row, 1])
        for i in range(np.int64(code_words[row] & np.uint32(0xFFFF)), 1 << LIMIT, 1 << length):
            single[i] = np.uint16(table[row, 0]) | np.uint16(length << 8)
    for i in range(1 << LIMIT):
        used = number = 0
        entry = np.uint64(0)
        while number < _AT_ONCE:
            known = single[i >> used]
            if used + np.int64(known >> 8) > LIMIT:
                break
            entry |= np.uint64(known & 255) << np.uint64(8 + 8 * number)
            used += np.int64(known >> 8)
            number += 1
        several[i] = entry | np.uint64(used) | (np.uint64(number) << _56)


@jit
def _decode_groups(start, stop, codes, offsets, tables, rest, which, total, out, damaged):  # type: ignore[no-untyped-def]
    """Groups of four of the chunks `which`."""
    single, several = tables
    scratch = np.empty(4 * _STRIDE, np.uint8)
    for group in range(start, stop):
        chunks = which[4 * group : 4 * group + 4]
        filled, bits = np.zeros(4, np.int64), np.zeros(4, np.int64)
        for k in range(chunks.size):
            bits[k] = 8 * offsets[chunks[k]]
        if chunks.size == 4 and (chunks[3] + 1) * CHUNK <= total:
            _decode_four(codes, several, scratch, filled, bits)
        for k in range(chunks.size):
            low = rest[chunks[k] * CHUNK : min((chunks[k] + 1) * CHUNK, total)]
            count = min(CHUNK, total - chunks[k] * CHUNK)
            end = _decode_rest(codes, single, scratch, k * _STRIDE, filled[k], count, bits[k])
            if (end + 7) // 8 != offsets[chunks[k] + 1]:
                damaged[group] = 1
            place = (4 * group + k) * CHUNK
            _join(scratch[k * _STRIDE : k * _STRIDE + count], low, out[place : place + count])


@jit
def _decode_rest(codes, single, scratch, start, filled, count, bit):  # type: ignore[no-untyped-def]
    """Symbol by symbol from the one at `filled`, to the end of a chunk. Returns the bit where that is."""
    last = 8 * (codes.size - PADDING)
    for i in range(filled, count):
        if bit > last:
            return np.int64(-8)
        known = single[(load64(codes, bit >> 3) >> np.uint64(bit & 7)) & _MASK]
        scratch[start + i] = np.uint8(known & 255)
        bit += np.int64(known >> 8)
    return bit


@jit
def _decode_four(codes, several, scratch, filled, bits):  # type: ignore[no-untyped-def]
    """Most of four whole chunks. filled, bits: (4,) int64, the symbols that each has and the bit where it stands."""
    n0, n1, n2, n3 = 0, _STRIDE, 2 * _STRIDE, 3 * _STRIDE
    b0, b1, b2, b3 = bits[0], bits[1], bits[2], bits[3]
    room = CHUNK - 4 * _AT_ONCE  # a round gives at most so many symbols of each
    r0, r1, r2, r3 = room, room + _STRIDE, room + 2 * _STRIDE, room + 3 * _STRIDE
    last = 8 * (codes.size - PADDING)
    while n0 <= r0 and n1 <= r1 and n2 <= r2 and n3 <= r3 and max(max(b0, b1), max(b2, b3)) <= last:
        w0 = load64(codes, b0 >> 3) >> np.uint64(b0 & 7)
        w1 = load64(codes, b1 >> 3) >> np.uint64(b1 & 7)
        w2 = load64(codes, b2 >> 3) >> np.uint64(b2 & 7)
        w3 = load64(codes, b3 >> 3) >> np.uint64(b3 & 7)
        for _ in range(4):  # at least 57 bits were loaded, and each takes at most 12
            t0, t1, t2, t3 = several[w0 & _MASK], several[w1 & _MASK], several[w2 & _MASK], several[w3 & _MASK]
            store64(scratch, n0, t0 >> _8)
            store64(scratch, n1, t1 >> _8)
            store64(scratch, n2, t2 >> _8)
            store64(scratch, n3, t3 >> _8)
            n0 += np.int64(t0 >> _56)
            n1 += np.int64(t1 >> _56)
            n2 += np.int64(t2 >> _56)
            n3 += np.int64(t3 >> _56)
            w0 >>= t0 & _63
            w1 >>= t1 & _63
            w2 >>= t2 & _63
            w3 >>= t3 & _63
            b0 += np.int64(t0 & _63)
            b1 += np.int64(t1 & _63)
            b2 += np.int64(t2 & _63)
            b3 += np.int64(t3 & _63)
    filled[0], filled[1], filled[2], filled[3] = n0, n1 - _STRIDE, n2 - 2 * _STRIDE, n3 - 3 * _STRIDE
    bits[0], bits[1], bits[2], bits[3] = b0, b1, b2, b3
