"""The Triton kernel of bfp: what runs on the device; bfp_triton.py launches it and has the tensors' shapes."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"

import triton
import triton.language as tl


@triton.jit
def _codes(row, first, last, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) int32: the codes of a block. row: (rows, 1) pointers to bytes; the block begins at `first`.

    Bytes from `last` on, the row's end, are read as zeros.
    """
    if BITS == 2 or BITS == 4 or BITS == 8:
        at = first + tl.arange(0, BLOCK * BITS // 8)[None, :]
        found = tl.load(row + at, mask=at < last, other=0).to(tl.int32)
        if BITS == 4:
            found = tl.interleave(found & 15, found >> 4)
        if BITS == 2:
            even, odd = tl.interleave(found & 3, found >> 4 & 3), tl.interleave(found >> 2 & 3, found >> 6)
            found = tl.interleave(even, odd)
        return found
    bit = tl.arange(0, BLOCK)[None, :] * BITS  # of a code that may straddle two bytes
    at = first + (bit >> 3)
    low = tl.load(row + at, mask=at < last, other=0).to(tl.int32)
    high = tl.load(row + at + 1, mask=at + 1 < last, other=0).to(tl.int32)
    return ((low | high << 8) >> (bit & 7)) & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def matmul(
    mantissas, exponents, x, partial, M, N, K, row_bytes, blocks,
    BITS: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT,
):  # fmt: skip
    """partial[split, m, n]: the sums over that split's blocks of K.

    Of each block the mantissas, which are whole numbers that DOT holds exactly, are multiplied as they are, and the sum
    by the block's step: its exponent is applied once, and not to every weight.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1).to(tl.int64)
    x_row = x + m.to(tl.int64)[:, None] * K
    k = tl.arange(0, BLOCK)[None, :]
    each = tl.cdiv(blocks, SPLIT)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for b in range(split * each, tl.minimum(split * each + each, blocks)):
        codes = _codes(mantissas + row[:, None] * row_bytes, b * (BLOCK * BITS // 8), row_bytes, BITS, BLOCK)
        values = (codes - (1 << (BITS - 1))).to(tl.float32).to(DOT)
        xs = tl.load(x_row + (b * BLOCK + k), mask=(m[:, None] < M) & (b * BLOCK + k < K), other=0.0)
        sums = tl.dot(values, tl.trans(xs), input_precision="ieee")
        exponent = tl.load(exponents + row * blocks + b).to(tl.int32)
        total += sums * ((exponent - (BITS - 2)) << 23).to(tl.float32, bitcast=True)[:, None]
    at = (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(partial + at, total, mask=(n[:, None] < N) & (m[None, :] < M))


@triton.jit
def decode(
    mantissas, exponents, out, N, K, row_bytes, blocks,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, k]: mantissa * step in float32, rounded to the dtype of out."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    row = tl.minimum(n, N - 1).to(tl.int64)
    bit = k * BITS
    at = bit >> 3
    code = tl.load(mantissas + row * row_bytes + at, mask=at < row_bytes, other=0).to(tl.int32)
    if 8 % BITS:  # codes that straddle bytes
        high = tl.load(mantissas + row * row_bytes + at + 1, mask=at + 1 < row_bytes, other=0).to(tl.int32)
        code |= high << 8
    number = ((code >> (bit & 7)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    exponent = tl.load(exponents + row * blocks + k // BLOCK, mask=k < K, other=127).to(tl.int32)
    step = ((exponent - (BITS - 2)) << 23).to(tl.float32, bitcast=True)
    value = tl.where(number == 0, 0.0, number.to(tl.float32) * step)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=(n < N) & (k < K))
