"""The Triton kernels of integers and small floats with scales; groups_triton.py launches them and has the shapes.

A row is a stream of codes, read in units (codes_kernels.py). Code i of a unit and the one half a unit later become the
lower and the upper half of a word, which is made the two 16-bit floats they stand for at once: of an integer the bits
are put into the mantissa of a number so large that its steps are 1, and that number is taken away; of a float they are
put where exponent and mantissa lie, and a power of two makes good the other bias, also where the code is subnormal.
Nothing is rounded so.

A scale is of ROWS rows and GROUP columns. Where WHERE is "sums", tiles lie within a group and their sums are multiplied
by it; "codes", it multiplies the codes, rounded to DOT; "rows", a row has only one.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from compress.kernels.codes_kernels import code_of, joined, words_of


@triton.jit
def _scales(found, FORM: tl.constexpr, BITS: tl.constexpr):
    """As float32; bytes are E8M0 or E4M3 floats, or exponents of mantissas of so many bits (formats/bfp.py)."""
    if FORM == "shared":
        scales = ((found.to(tl.int32) - (BITS - 2)) << 23).to(tl.float32, bitcast=True)
    elif FORM == "e8m0":
        scales = tl.maximum(found.to(tl.uint32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    elif FORM == "e4m3":
        byte = found.to(tl.uint32)
        scales = (((byte & 0x80) << 24) | ((byte & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
    else:
        scales = found.to(tl.float32)
    return scales


@triton.jit
def _pair(unit, i: tl.constexpr, BITS: tl.constexpr):
    """Code i in the lower half of a word, and in the upper one the code half a unit later."""
    if 32 % BITS == 0:
        pair = (unit[0] >> (BITS * i)) & (((1 << BITS) - 1) * 0x10001)
    else:
        pair = code_of(unit, i, BITS) | (code_of(unit, i + 16, BITS) << 16)
    return pair


@triton.jit
def _halves(pair, DTYPE: tl.constexpr):
    """(rows, units, HALF, 2) of a 16-bit dtype."""
    halves = tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16))
    return halves.to(DTYPE, bitcast=True)


@triton.jit
def _values(pair, zeros, scales, FORM: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """(rows, units, HALF, 2): what codes stand for, times their scales where there are some, in DOT.

    zeros: (rows, units or 1) int32, or None for the middle code. scales: (rows, units).
    """
    if FORM == "int" or FORM == "signed":
        DIRECT: tl.constexpr = DOT == tl.bfloat16 and BITS < 7  # its mantissa has 7 bits, that of float16 10
        MAGIC: tl.constexpr = 0x43004300 if DIRECT else 0x64006400
        if zeros is None:
            BELOW: tl.constexpr = 1 << (BITS - 1)
            bits = pair | MAGIC
        else:  # code - zero + BELOW is not negative: both halves are made that at once
            BELOW: tl.constexpr = (1 << BITS) - 1
            bits = pair + (MAGIC + (BELOW - zeros) * 0x10001).to(tl.uint32)[:, :, None]
        if DIRECT:
            values = _halves(bits, tl.bfloat16) - tl.full((1, 1, 1, 1), 128 + BELOW, tl.bfloat16)
        else:
            values = _halves(bits, tl.float16) - tl.full((1, 1, 1, 1), 1024 + BELOW, tl.float16)
            if DOT != tl.float16:
                values = values.to(tl.float32).to(DOT)
    else:
        WIDE: tl.constexpr = DOT == tl.bfloat16  # its exponent has 8 bits, that of float16 has 5
        if FORM == "e2m1":
            bits = ((pair << 12) & 0x80008000) | ((pair & 0x00070007) << (6 if WIDE else 9))
            bias: tl.constexpr = 2.0**126 if WIDE else 2.0**14
        else:
            bits = ((pair << 8) & 0x80008000) | ((pair & 0x007F007F) << (4 if WIDE else 7))
            bias: tl.constexpr = 2.0**120 if WIDE else 2.0**8
        HALF_TYPE: tl.constexpr = tl.bfloat16 if WIDE else tl.float16
        values = (_halves(bits, HALF_TYPE) * tl.full((1, 1, 1, 1), bias, HALF_TYPE)).to(DOT)
    if scales is not None:
        values = values * scales.to(DOT)[:, :, None, None]
    return values


@triton.jit
def _pairs(unit, HALF: tl.constexpr, BITS: tl.constexpr):
    """(rows, units, HALF) uint32: code i of a unit in the lower half, and in the upper one the code HALF later."""
    parts = ()
    for i in tl.static_range(HALF):
        parts += (_pair(unit, i, BITS),)
    if HALF >= 2:
        parts = joined(parts)
    if HALF >= 4:
        parts = joined(parts)
    if HALF >= 8:
        parts = joined(parts)
    if HALF >= 16:
        parts = joined(parts)
    return tl.reshape(parts[0], (unit[0].shape[0], unit[0].shape[1], HALF))


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def product(
    codes, scales, zeros, x, bias, y, M, N, K, words, blocks, ROWS, factor,
    FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, WHERE: tl.constexpr,
    SPLIT, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] of x @ W.T + bias; where SPLIT > 1, y[split, m, n] in float32, and bias is None."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    PER: tl.constexpr = 32 // BITS if 32 % BITS == 0 else 32  # codes of a unit
    UNITS: tl.constexpr = BLOCK_K // PER
    HALF: tl.constexpr = PER // 2
    row = tl.minimum(n, N - 1).to(tl.int64)
    scaled = (row // ROWS * blocks)[:, None]
    zeroed = (row * blocks)[:, None]
    tiles = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(tiles, SPLIT)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, last = part * each, tl.minimum(part * each + each, tiles)
    if WHERE == "sums":  # of the tile to come, so that no sum waits for it
        coming = tl.load(scales + scaled + tl.minimum(first, tiles - 1) * BLOCK_K // GROUP)
    for tile in range(first, last):
        u = tile * UNITS + tl.arange(0, UNITS)
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (m[:, None] < M) & (k[None, :] < K)
        xs = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0).to(DOT)
        xs = tl.reshape(tl.permute(tl.reshape(xs, (BLOCK_M, UNITS, 2, HALF)), (0, 3, 1, 2)), (BLOCK_M, BLOCK_K))
        if WHERE == "codes":
            group = (u * PER // GROUP)[None, :]
            found = tl.load(scales + scaled + group, mask=group < blocks, other=64)  # finite, whatever form it has
            scale = _scales(found, SCALES, BITS)
        else:
            group = tl.full((1, 1), 0 if WHERE == "rows" else tile * BLOCK_K // GROUP, tl.int32)
            scale = None
        zero = None
        if zeros is not None:
            zero = tl.load(zeros + zeroed + group, mask=group < blocks, other=0).to(tl.int32)
        unit = words_of(codes + row[:, None] * words, u, words, BITS)
        if FORM == "signed":
            unit = (unit[0] ^ 0x80808080,)
        pairs = _pairs(unit, HALF, BITS)
        values = _values(pairs, zero, scale, FORM, BITS, DOT)
        values = tl.reshape(tl.permute(values, (0, 2, 1, 3)), (BLOCK_N, BLOCK_K))
        if WHERE == "sums":
            scale, following = _scales(coming, SCALES, BITS), tl.minimum(tile + 1, tiles - 1) * BLOCK_K // GROUP
            coming = tl.load(scales + scaled + following)
            zeroes = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            total += tl.dot(values, tl.trans(xs), zeroes, input_precision="ieee") * scale
        else:
            total = tl.dot(values, tl.trans(xs), total, input_precision="ieee")
    if WHERE == "rows":
        total *= _scales(tl.load(scales + scaled), SCALES, BITS)
    total *= factor
    at = (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(n[:, None] < N) & (m[None, :] < M))


@triton.jit
def decode(
    codes, scales, zeros, out, N, K, words, blocks, ROWS, GROUP,
    FORM: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, k]: code * scale in float32, rounded to the dtype of out."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    row = tl.minimum(n, N - 1).to(tl.int64)
    bit = k * BITS
    w, shift = bit // 32, (bit % 32).to(tl.uint32)
    code = tl.load(codes + row * words + w, mask=w < words, other=0) >> shift
    if 32 % BITS:
        high = tl.load(codes + row * words + w + 1, mask=w + 1 < words, other=0)
        code |= tl.where(shift + BITS > 32, high << ((32 - shift) & 31), 0)
    code &= (1 << BITS) - 1
    group = k // GROUP
    scale = _scales(tl.load(scales + row // ROWS * blocks + group, mask=group < blocks, other=0), SCALES, BITS)
    if FORM == "e2m1":
        value = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 2.0**126
    elif FORM == "e4m3":
        value = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
    else:
        number = ((code ^ 0x80) if FORM == "signed" else code).to(tl.int32)
        if zeros is None:
            value = (number - (1 << (BITS - 1))).to(tl.float32)
        else:
            value = (number - tl.load(zeros + row * blocks + group, mask=group < blocks, other=0)).to(tl.float32)
    tl.store(out + row * K + k, (value * scale).to(out.dtype.element_ty), mask=(n < N) & (k < K))
