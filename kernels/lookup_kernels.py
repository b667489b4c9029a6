"""The Triton kernels of codebooks: what runs on the device; lookup_triton.py launches them and has the tensors' shapes.

Codes are packed, in units where their width does not divide 32 (codes_kernels.py), or lie in bit planes. A tile of
codes is looked up in its rows' tables, which stay in the L1 cache: a `tl.gather` from registers takes up to eight
shuffles a weight, each of which costs what such a load does. (Few levels of 16 bits: permuted_kernels.py.) Where
SCALED, a block of COLUMNS columns has a scale, and a selector says which table; tiles lie within blocks.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from compress.kernels.codes_kernels import code_of, joined, words_of


@triton.jit
def _codes(
    indices, row, k0, words, planes,
    BITS: tl.constexpr, PLANES: tl.constexpr, SWAPPED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK_K) int32. row: (rows, 1) int64. words: of a row. planes: words of a plane."""
    if PLANES:
        w = k0 // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
        shift = tl.arange(0, 32)[None, None, :]
        codes = tl.zeros((row.shape[0], BLOCK_K // 32, 32), tl.int32)
        for b in tl.static_range(BITS):
            word = tl.load(indices + (b * planes + row * words + w), mask=w < words, other=0)
            codes = (codes << 1) | ((word[:, :, None] >> shift) & 1)
    elif 32 % BITS:
        unit = words_of(indices + row * words, k0 // 32 + tl.arange(0, BLOCK_K // 32), words, BITS)
        parts = ()
        for i in tl.static_range(32):
            parts += (code_of(unit, i, BITS),)
        parts = joined(joined(joined(joined(joined(parts)))))
        codes = parts[0].to(tl.int32)
    else:
        w = k0 * BITS // 32 + tl.arange(0, BLOCK_K * BITS // 32)[None, :]
        shift = (tl.arange(0, 32 // BITS) ^ (1 if SWAPPED else 0))[None, None, :] * BITS
        word = tl.load(indices + (row * words + w), mask=w < words, other=0)
        codes = (word[:, :, None] >> shift) & ((1 << BITS) - 1)
    return tl.reshape(codes, (row.shape[0], BLOCK_K))


@triton.jit
def _tile(
    indices, tables, scales, selector, row, k0, words, planes, blocks, book,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, SCALED: tl.constexpr,
    SWAPPED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK_K) weights from column k0 on: in the tables' dtype, or where SCALED float32.

    book: (rows, 1), where a row's table begins, unless SCALED.
    """
    codes = _codes(indices, row, k0, words, planes, BITS, PLANES, SWAPPED, BLOCK_K)
    if SCALED:
        at = row * blocks + k0 // COLUMNS
        table = tables + (tl.load(selector + at).to(tl.int32) << BITS)
    else:
        table = tables + book
    values = tl.load(table + codes)
    if SCALED:
        values = values.to(tl.float32) * tl.load(scales + at).to(tl.float32)
    return values


@triton.jit
def decode(
    indices, tables, scales, selector, out, N, K, words, planes, blocks, ROWS,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, SCALED: tl.constexpr, SWAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    row = tl.minimum(n, N - 1).to(tl.int64)
    values = _tile(
        indices,
        tables,
        scales,
        selector,
        row,
        k0,
        words,
        planes,
        blocks,
        row // ROWS << BITS,
        COLUMNS,
        BITS,
        PLANES,
        SCALED,
        SWAPPED,
        BLOCK_K,
    )
    tl.store(out + (row * K + k), values.to(out.dtype.element_ty), mask=(n < N) & (k < K))


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def product(
    indices, tables, scales, selector, x, partial, M, N, K, words, planes, blocks, ROWS,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, SCALED: tl.constexpr, SWAPPED: tl.constexpr,
    SPLIT, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, m, n] of x @ W.T, float32; one token (BLOCK_M 1) with plain products, more with matrix ones."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    book = row // ROWS << BITS
    tiles = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(tiles, SPLIT)
    lane = tl.arange(0, BLOCK_K)
    if BLOCK_M == 1:
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    else:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(split * each, tl.minimum(split * each + each, tiles)):
        k0 = tile * BLOCK_K
        k = k0 + lane
        weight = _tile(
            indices, tables, scales, selector, row, k0, words, planes, blocks, book,
            COLUMNS, BITS, PLANES, SCALED, SWAPPED, BLOCK_K,
        )  # fmt: skip
        if BLOCK_M == 1:
            values = tl.load(x + tl.program_id(1).to(tl.int64) * K + k, mask=k < K, other=0.0)
            total += weight.to(tl.float32) * values.to(tl.float32)[None, :]
        else:
            inside = (m[:, None] < M) & (k[None, :] < K)
            values = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
            total = tl.dot(weight.to(DOT), tl.trans(values.to(DOT)), total, input_precision="ieee")
    if BLOCK_M == 1:
        at = partial + (split * M + tl.program_id(1)).to(tl.int64) * N + n
        tl.store(at, tl.sum(total, 1), mask=n < N)
    else:
        at = partial + (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(at, total, mask=(n[:, None] < N) & (m[None, :] < M))
