"""The Triton kernel of bitstack for few blocks and tokens in bfloat16: signs are flipped, two at a time, not looked up.

A level is a sum of coefficients, each times the signs of some of the code's bits (the Walsh transform of the levels):
so y = sum_j c_j * (x @ W_j.T), where W_j is the scale with signs out of the exclusive or of some planes. Only the scale
is rounded, to bfloat16. bitstack_triton.py launches it; bitstack_kernels.py multiplies what it does not.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _ordered(values, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns i and i + 16 of all words side by side, as one word of two signs has them. values: (ROWS, BLOCK_K)."""
    return tl.reshape(tl.permute(tl.reshape(values, (ROWS, BLOCK_K // 32, 2, 16)), (0, 3, 1, 2)), (ROWS, BLOCK_K))


@triton.jit
def _rounded(low, high, NATIVE: tl.constexpr):
    """Two float32 as words of two bfloat16. NATIVE: by the instruction for both, which no compiler finds here."""
    if NATIVE:
        found = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        first, second = low.to(tl.bfloat16), high.to(tl.bfloat16)
        found = first.to(tl.uint16, bitcast=True).to(tl.uint32)
        found |= second.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    return found


@triton.jit
def _flipped(pairs, words, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(ROWS, BLOCK_K) bfloat16. pairs: (ROWS, 16, units) uint32. words: (ROWS, units), a bit for every sign."""
    shift = (15 - tl.arange(0, 16))[None, :, None].to(tl.uint32)
    pairs ^= (words[:, None, :] << shift) & 0x80008000
    values = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(values, (ROWS, BLOCK_K)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _coefficient(levels, j: tl.constexpr, COUNT: tl.constexpr):
    """The mean of the levels, those negative whose codes have an odd number of the bits of j."""
    total = 0.0
    for code in tl.static_range(1 << COUNT - 1):
        if ((code & j) ^ (code & j) >> 1 ^ (code & j) >> 2) & 1:
            total -= tl.load(levels + code)
        else:
            total += tl.load(levels + code)
    return total / (1 << COUNT - 1)


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def product(
    planes, u, v, levels, x, partial, M, N, K, RANK,
    COUNT: tl.constexpr, RANKS: tl.constexpr, FLOOR: tl.constexpr, NATIVE: tl.constexpr, SPLIT,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, m, n] of x @ W.T, float32. planes: (COUNT,) int64 addresses of 32-bit words. RANKS: sixteens."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    TERMS: tl.constexpr = 1 << COUNT - 1
    UNITS: tl.constexpr = BLOCK_K // 32
    row = tl.minimum(n, N - 1).to(tl.int64)
    factor = tl.arange(0, 16)
    left = ()
    for r in tl.static_range(RANKS):
        at = 16 * r + factor
        left += (tl.load(u + row[:, None] * RANK + at[None, :], mask=at[None, :] < RANK, other=0.0),)
    least = tl.where(factor[None, :] == 0, left[0].to(tl.float32) * FLOOR, 0.0).to(tl.bfloat16)
    place = ()
    for p in tl.static_range(COUNT):
        place += (tl.load(planes + p).to(tl.pointer_type(tl.uint32)) + row[:, None] * (K // 32),)
    tiles = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(tiles, SPLIT)
    total = (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),) * TERMS
    for tile in range(split * each, tl.minimum(split * each + each, tiles)):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        scale, floor = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for r in tl.static_range(RANKS):
            at = 16 * r + factor
            inside = (at[:, None] < RANK) & (k[None, :] < K)
            right = tl.load(v + at.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
            right = _ordered(right, 16, BLOCK_K)
            scale = tl.dot(left[r], right, scale)
            if r == 0:
                floor = tl.dot(least, right, floor)
        low, high = tl.split(tl.reshape(tl.maximum(scale, floor), (BLOCK_N, 16, UNITS, 2)))
        pairs = _rounded(low, high, NATIVE)
        inside = (m[:, None] < M) & (k[None, :] < K)
        xs = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
        xs = tl.trans(_ordered(xs, BLOCK_M, BLOCK_K))
        unit = tile * UNITS + tl.arange(0, UNITS)[None, :]
        words = ()
        for p in tl.static_range(COUNT):
            words += (tl.load(place[p] + unit, mask=unit < K // 32, other=0),)
        new = ()
        for j in tl.static_range(TERMS):
            signs = words[0]
            for p in tl.static_range(1, COUNT):
                if j >> (COUNT - 1 - p) & 1:
                    signs ^= words[p]
            new += (tl.dot(_flipped(pairs, signs, BLOCK_N, BLOCK_K), xs, total[j]),)
        total = new
    found = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for j in tl.static_range(TERMS):
        found += total[j] * _coefficient(levels, j, COUNT)
    at = partial + (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, found, mask=(n[:, None] < N) & (m[None, :] < M))
