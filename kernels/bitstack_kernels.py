"""The Triton kernels of bitstack: what runs on the device; bitstack_triton.py launches them and knows the shapes."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"

import triton
import triton.language as tl


@triton.jit
def _bits(plane, rows, first, N, BYTES, WIDTH: tl.constexpr, STORED: tl.constexpr):
    """Bits of columns 8 * first to 8 * (first + WIDTH) - 1 of some rows of a plane: (rows, 8 * WIDTH) int32.

    plane: its address. rows: int64. BYTES: of a row of it. STORED: a thread has the bits of a whole byte, as it has
    columns to store; else they may lie as a product wants them.
    """
    at = first + tl.arange(0, WIDTH)
    inside = (rows < N)[:, None] & (at < BYTES)[None, :]
    octets = plane.to(tl.pointer_type(tl.uint8)) + rows[:, None] * BYTES + at[None, :]
    if STORED:
        octets = tl.load(octets[:, :, None], mask=inside[:, :, None], other=0)
    else:
        octets = tl.load(octets, mask=inside, other=0)[:, :, None]
    spread = (octets.to(tl.int32) >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(spread, (rows.shape[0], 8 * WIDTH))


@triton.jit
def _scale(u, v, rows, columns, N, K, RANK, FLOOR, R: tl.constexpr):
    """max(u @ v, FLOOR * u0 * v0) of some rows and columns, float32; the factors R at a time.

    With R = 1 they are summed in their order, to the bits of `bitstack.scale`: a float32 holds the product of two
    bfloat16 (from 2**-134 on), so that it is the same whether or not the compiler fuses it with the addition.
    """
    total = tl.full((rows.shape[0], columns.shape[0]), -0.0 if R == 1 else 0.0, tl.float32)  # -0 + x is x
    for start in range(0, RANK, R):
        if R == 1:
            left = tl.load(u + rows[:, None] * RANK + start, mask=(rows < N)[:, None], other=0.0)
            right = tl.load(v + tl.cast(start, tl.int64) * K + columns[None, :], mask=(columns < K)[None, :], other=0.0)
            total += left.to(tl.float32) * right.to(tl.float32)
        else:
            k = start + tl.arange(0, R)
            left = tl.load(
                u + rows[:, None] * RANK + k[None, :], mask=(rows < N)[:, None] & (k < RANK)[None, :], other=0.0
            )
            right = tl.load(
                v + k.to(tl.int64)[:, None] * K + columns[None, :],
                mask=(k < RANK)[:, None] & (columns < K)[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total)
    u0 = tl.load(u + rows * RANK, mask=rows < N, other=0.0).to(tl.float32)
    v0 = tl.load(v + columns, mask=columns < K, other=0.0).to(tl.float32)
    return tl.maximum(total, u0[:, None] * v0[None, :] * FLOOR)


@triton.jit
def _tile(
    planes, u, v, levels, rows, step, N, K, COUNT, RANK, FLOOR, BLOCK_K: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Weights of some rows and of columns step * BLOCK_K and on: (rows, BLOCK_K) float32.

    planes: (COUNT,) int64 addresses. R: 1 to store them, to the last bit; 16 or more to multiply with them.
    """
    columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
    octet, row_bytes = step * (BLOCK_K // 8), (K + 7) // 8
    codes = tl.zeros((rows.shape[0], BLOCK_K), tl.int32)
    for plane in range(1, COUNT):
        codes = codes << 1 | _bits(tl.load(planes + plane), rows, octet, N, row_bytes, BLOCK_K // 8, R == 1)
    magnitude = _scale(u, v, rows, columns, N, K, RANK, FLOOR, R) * tl.load(levels + codes)
    negative = _bits(tl.load(planes), rows, octet, N, row_bytes, BLOCK_K // 8, R == 1)
    return tl.where(negative != 0, -magnitude, magnitude)


@triton.jit
def decode(
    planes, u, v, levels, out, N, K, COUNT, RANK,
    FLOOR: tl.constexpr, LARGEST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, k]: the weight, rounded to the dtype of out, whose largest number is LARGEST."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.program_id(1)
    columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
    weight = _tile(planes, u, v, levels, rows, step, N, K, COUNT, RANK, FLOOR, BLOCK_K, 1)
    weight = tl.clamp(weight, -LARGEST, LARGEST).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * K + columns[None, :], weight, mask=(rows < N)[:, None] & (columns < K)[None, :])


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def matmul(
    planes,
    u,
    v,
    levels,
    x,
    partial,
    M,
    N,
    K,
    COUNT,
    RANK,
    FLOOR: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
    SPLIT,
):
    """partial[s] = x @ W.T over the s-th part of K. planes: (COUNT,) int64 addresses. partial: (SPLIT, M, N) fp32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    steps = (K + BLOCK_K - 1) // BLOCK_K
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = _tile(planes, u, v, levels, rows, step, N, K, COUNT, RANK, FLOOR, BLOCK_K, R).to(DOT)
        inside = (tokens < M)[:, None] & (columns < K)[None, :]
        taken = tl.load(x + tokens[:, None] * K + columns[None, :], mask=inside, other=0.0).to(DOT)
        sums = tl.dot(taken, tl.trans(weight), sums, input_precision="ieee")
    to = partial + (part.to(tl.int64) * M + tokens[:, None]) * N + rows[None, :]
    tl.store(to, sums, mask=(tokens < M)[:, None] & (rows < N)[None, :])
