"""The Triton kernel of codebooks of 4 to 16 levels of 16 bits, on NVIDIA's GPUs: levels are looked up in registers.

A thread holds the tables of its rows, the low bytes of all levels apart from the high ones. An instruction picks four
bytes out of eight, each as four bits of a selector say (PTX: prmt); so two take the bytes of four levels out of a table
of eight, and more as many pairs of them. lookup_triton.py launches it; what it needs is said there.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from compress.kernels.codes_kernels import joined, words_of


@triton.jit
def permute(a, b, selector, NATIVE: tl.constexpr):
    """Byte i is that of the eight bytes of a and b which the three low bits of nibble i of the selector say.

    All uint32. The other bits of the lower 16 must be zero. NATIVE: the instruction, which no interpreter has.
    """
    if NATIVE:
        found = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        found = tl.zeros_like(a ^ selector)
        for i in tl.static_range(4):
            which = (selector >> (4 * i)) & 7
            found |= ((tl.where(which < 4, a, b) >> ((which & 3) * 8)) & 255) << (8 * i)
    return found


@triton.jit
def _bytes(table, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """The low bytes of the levels, four to a word, and the high ones. table: pointers to words of two levels."""
    low, high = (), ()
    for i in tl.static_range(1 << BITS - 2):
        first, second = tl.load(table + 2 * i), tl.load(table + (2 * i + 1))
        low += (permute(first, second, tl.full(first.shape, 0x6420, tl.uint32), NATIVE),)
        high += (permute(first, second, tl.full(first.shape, 0x7531, tl.uint32), NATIVE),)
    return low, high


@triton.jit
def _spread(word, BITS: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """Of fields of twice as many bits, the upper BITS moved on to bit WIDTH of theirs. EACH: the lowest bits of all."""
    LOW: tl.constexpr = EACH * ((1 << BITS) - 1)
    return (word & LOW) | ((word & (LOW << BITS)) << (WIDTH - BITS))


@triton.jit
def _nibbles(unit, i: tl.constexpr, BITS: tl.constexpr):
    """Codes 8 i to 8 i + 7 of a unit, four bits each."""
    bit: tl.constexpr = 8 * BITS * i
    found = unit[bit // 32] >> (bit % 32)
    if bit % 32 + 8 * BITS > 32:
        found |= unit[bit // 32 + 1] << (32 - bit % 32)
    if BITS < 4:  # four codes each go to their halves, two to their bytes, and one to its nibble
        found = _spread(found, 4 * BITS, 1, 16)
        found = _spread(found, 2 * BITS, 0x10001, 8)
        found = _spread(found, BITS, 0x1010101, 4)
    return found


@triton.jit
def _four(table, selector, upper, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """The bytes of four levels. upper: takes the levels from the eighth on out of a second word."""
    if BITS == 2:
        found = permute(table[0], table[0], selector, NATIVE)
    else:
        found = permute(table[0], table[1], selector, NATIVE)
    if BITS == 4:
        found = permute(found, permute(table[2], table[3], selector, NATIVE), upper, NATIVE)
    return found


@triton.jit
def _pairs(unit, low, high, PER: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """(rows, units, PER / 2) uint32: the levels of all codes of a unit, two to a word."""
    parts = ()
    for i in tl.static_range(PER // 8):
        codes = _nibbles(unit, i, BITS)
        selectors, uppers = codes & 0x77777777, ((codes >> 1) & 0x44444444) | 0x32103210
        for j in tl.static_range(2):
            selector, upper = selectors >> (16 * j), uppers >> (16 * j)
            a, b = _four(low, selector, upper, BITS, NATIVE), _four(high, selector, upper, BITS, NATIVE)
            parts += (permute(a, b, tl.full(a.shape, 0x5140, tl.uint32), NATIVE),)
            parts += (permute(a, b, tl.full(a.shape, 0x7362, tl.uint32), NATIVE),)
    parts = joined(joined(parts))
    if PER >= 16:
        parts = joined(parts)
    if PER >= 32:
        parts = joined(parts)
    return tl.reshape(parts[0], (unit[0].shape[0], unit[0].shape[1], PER // 2))


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def product(
    indices, tables, x, partial, M, N, K, words, ROWS,
    BITS: tl.constexpr, NATIVE: tl.constexpr,
    SPLIT, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, m, n] of x @ W.T, float32. tables: words of two levels in the dtype of x."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    PER: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # codes of a unit
    UNITS: tl.constexpr = BLOCK_K // PER
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    low, high = _bytes(tables + (row // ROWS << BITS - 1), BITS, NATIVE)
    tiles = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(tiles, SPLIT)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(split * each, tl.minimum(split * each + each, tiles)):
        unit = words_of(indices + row * words, tile * UNITS + tl.arange(0, UNITS), words, BITS)
        pairs = _pairs(unit, low, high, PER, BITS, NATIVE)
        levels = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
        levels = levels.to(x.dtype.element_ty, bitcast=True)
        # Columns in the order in which a thread that multiplies matrices has them if it holds whole units.
        levels = tl.reshape(tl.permute(levels, (0, 2, 1, 3)), (BLOCK_N, BLOCK_K))
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (m[:, None] < M) & (k[None, :] < K)
        xs = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
        xs = tl.reshape(tl.permute(tl.reshape(xs, (BLOCK_M, UNITS, PER // 2, 2)), (0, 2, 1, 3)), (BLOCK_M, BLOCK_K))
        total = tl.dot(levels, tl.trans(xs), total)
    at = partial + (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, total, mask=(n[:, None] < N) & (m[None, :] < M))
