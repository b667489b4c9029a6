"""The Triton kernels of df11: what runs on the device; df11_triton.py launches them and has the tensors' shapes.

A 16-bit word of a weight is (s & 0x80) << 8 | symbol << 7 | s & 0x7F, with s its byte of sign_mantissa. Four elements
that follow one another (a quad) are one byte each of 32-bit words, and two by two they become pairs: `even` holds the
words of elements 0 and 2, `odd` those of 1 and 3, the first in the lower half. All words are unsigned, so that shifts
fill with zeros. constants: base four times over, then masks. The masks are loaded because LLVM makes two instructions
of a select by a literal mask, and the GPU has one for it.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"

import triton
import triton.language as tl


@triton.jit
def _load_constants(constants):
    return tl.load(constants), tl.load(constants + 1), tl.load(constants + 2), tl.load(constants + 3)


@triton.jit
def _select(a, b, mask):
    """Bits of a where mask has 1, else of b."""
    return ((a ^ b) & mask) ^ b


@triton.jit
def _merge(symbols, sign_mantissa, constants):
    """The pairs of a quad, from four symbols and four bytes of sign_mantissa."""
    even = _select(symbols << 7, _select(sign_mantissa << 8, sign_mantissa, constants[1]), constants[2])
    odd = _select(symbols >> 1, _select(sign_mantissa, sign_mantissa >> 8, constants[1]), constants[2])
    return even, odd


@triton.jit
def _pairs(low, high, sign_mantissa, constants, i: tl.constexpr):
    """The pairs of quad i of the four whose codes lie in the words low and high."""
    if i == 0:
        codes = _select(high << 2, low, constants[3])
    else:
        codes = _select(high >> (2 * i - 2), low >> (2 * i), constants[3])
    return _merge((codes & 0x07070707) + constants[0], sign_mantissa, constants)


@triton.jit
def _first(pair):
    """The bf16 in the lower half, as float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _second(pair):
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _in_order(even, odd):
    """The words of a quad, in order, as 64 bits."""
    first = (even & 0xFFFF) | (odd << 16)
    second = (even >> 16) | (odd & 0xFFFF0000)
    return first.to(tl.uint64) | (second.to(tl.uint64) << 32)


@triton.jit
def _word(sign_mantissa, codes, constants, start, k, inside):
    """The words of elements start + k, byte by byte: for rows that do not start a block of codes. k: int32."""
    at = (start & 0xFF).to(tl.int32) + k
    codes += (start >> 8) * 96
    block, at = at >> 8, (at & 0xFF).to(tl.uint32)
    low = tl.load(codes + (block * 96 + (at & 63).to(tl.int32)), mask=inside, other=0).to(tl.uint32)
    high = tl.load(codes + (block * 96 + 64 + (at & 31).to(tl.int32)), mask=inside, other=0).to(tl.uint32)
    part = tl.load(sign_mantissa + start + k, mask=inside, other=0).to(tl.uint32)
    code = ((low >> (at >> 6 << 1)) & 3) | (((high >> (at >> 5)) & 1) << 2)
    symbol = (constants[0] & 0xFF) + code
    return ((part & 0x80) << 8) | (symbol << 7) | (part & 0x7F)


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=inside, other=0)
    return values


@triton.jit
def _difference(word, constants):
    """What an escaped element is, less what the main loop took it for."""
    taken = (word & 0x807F) | ((constants[0] & 0xFF) << 7)
    return _first(word) - _first(taken)


@triton.jit
def decode_fixed(
    sign_mantissa, codes, constants, row_start, escapes, out, out_quads, N, K,
    ROWS: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """ROWS rows as one run of elements, then their escapes over them."""
    constants = _load_constants(constants)
    n0 = tl.program_id(0) * ROWS
    count = tl.minimum(N - n0, ROWS) * K
    start = n0.to(tl.int64) * K
    lane = tl.arange(0, LANES)
    if ALIGNED:
        for t0 in range(0, count // 16, LANES):
            t = t0 + lane
            inside = t < count // 16
            block, w = start // 256 + t // 16, t % 16
            low = tl.load(codes + block * 24 + w, mask=inside, other=0)
            high = tl.load(codes + block * 24 + 16 + (w & 7), mask=inside, other=0) >> (w >> 3).to(tl.uint32)
            for i in tl.static_range(4):
                quad = block * 64 + 16 * i + w
                part = tl.load(sign_mantissa + quad, mask=inside, other=0)
                even, odd = _pairs(low, high, part, constants, i)
                tl.store(out_quads + quad, _in_order(even, odd), mask=inside)
    else:
        for t0 in range(0, count, 8 * LANES):
            t = t0 + tl.arange(0, 8 * LANES)
            word = _word(sign_mantissa, codes, constants, start, t, t < count)
            tl.store(out + start + t, word.to(tl.int16), mask=t < count)
    tl.debug_barrier()  # no thread may store an escape before another has stored the run
    n = n0 + tl.arange(0, ROWS)
    begin = tl.load(row_start + n, mask=n < N, other=0)
    end = tl.load(row_start + n + 1, mask=n < N, other=0)
    for e0 in range(0, tl.max(end - begin, 0), LANES // ROWS):
        e = begin[:, None] + e0 + tl.arange(0, LANES // ROWS)[None, :]
        escape = tl.load(escapes + e, mask=e < end[:, None], other=0)
        at = n[:, None].to(tl.int64) * K + (escape >> 16).to(tl.int64)
        tl.store(out + at, (escape & 0xFFFF).to(tl.int16), mask=e < end[:, None])


@triton.jit
def _quad(x, at, inside, X: tl.constexpr, EVEN: tl.constexpr):
    """Four values of x that follow one another, each in its own tensor of float32. at: which quad."""
    if X == tl.float32:
        x0 = _load(x + 4 * at, inside, EVEN)
        x1 = _load(x + 4 * at + 1, inside, EVEN)
        x2 = _load(x + 4 * at + 2, inside, EVEN)
        x3 = _load(x + 4 * at + 3, inside, EVEN)
    else:
        quad = _load(x + at, inside, EVEN)
        a, b = quad.to(tl.uint32), (quad >> 32).to(tl.uint32)
        if X == tl.bfloat16:
            x0, x1, x2, x3 = _first(a), _second(a), _first(b), _second(b)
        else:
            x0, x1, x2, x3 = _half(a), _half(a >> 16), _half(b), _half(b >> 16)
    return x0, x1, x2, x3


@triton.jit
def _half(bits):
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def gemv(
    sign_mantissa, codes, constants, row_start, escapes, x, x_values, bias, y, N, K,
    X: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One token and rows that start a block. Each lane has 16 elements of every row: all loads of a warp coalesce.

    x: as 64-bit words unless it is float32, in which form the same memory is x_values. y: (N,), or where SPLIT > 1
    (SPLIT, N) float32, with neither bias nor escapes.
    """
    constants = _load_constants(constants)
    n0, part = tl.program_id(0) * ROWS, tl.program_id(1)
    lane = tl.arange(0, LANES)
    begins = ()
    for r in tl.static_range(ROWS + 1):
        begins += (tl.load(row_start + tl.minimum(n0 + r, N)),)
    sums = (tl.zeros((LANES,), tl.float32),) * ROWS
    for t0 in range(part * LANES, K // 16, SPLIT * LANES):
        t = t0 + lane
        inside = t < K // 16
        w, block = t % 16, t // 16
        lows, highs = (), ()
        for r in tl.static_range(ROWS):
            words = codes + tl.minimum(n0 + r, N - 1).to(tl.int64) * (K // 256 * 24)
            high = _load(words + (block * 24 + 16 + (w & 7)), inside, EVEN)
            lows += (_load(words + (block * 24 + w), inside, EVEN),)
            highs += (high >> (w >> 3).to(tl.uint32),)
        for i in tl.static_range(4):
            quad = block * 64 + 16 * i + w
            x0, x1, x2, x3 = _quad(x, quad, inside, X, EVEN)
            new = ()
            for r in tl.static_range(ROWS):
                row = sign_mantissa + tl.minimum(n0 + r, N - 1).to(tl.int64) * (K // 4)
                even, odd = _pairs(lows[r], highs[r], _load(row + quad, inside, EVEN), constants, i)
                total = sums[r] + x0 * _first(even)
                total += x1 * _first(odd)
                total += x2 * _second(even)
                total += x3 * _second(odd)
                new += (total,)
            sums = new
    if SPLIT == 1:  # the rows' escapes lie one after the other
        for e0 in range(begins[0], begins[ROWS], LANES):
            e = e0 + lane
            escape = tl.load(escapes + e, mask=e < begins[ROWS], other=0)
            value = tl.load(x_values + (escape >> 16).to(tl.int32), mask=e < begins[ROWS], other=0).to(tl.float32)
            product = value * _difference((escape & 0xFFFF).to(tl.uint32), constants)
            new = ()
            for r in tl.static_range(ROWS):
                new += (sums[r] + tl.where((e >= begins[r]) & (e < begins[r + 1]), product, 0.0),)
            sums = new
    for r in tl.static_range(ROWS):
        result = tl.sum(sums[r], 0)
        if SPLIT == 1 and bias is not None:
            result += tl.load(bias + tl.minimum(n0 + r, N - 1)).to(tl.float32)
        tl.store(y + part * N + n0 + r, result, mask=n0 + r < N)


@triton.jit
def _tile(even, odd, DOT: tl.constexpr):
    """The pairs of (rows, quads), as (rows, 4 * quads) values of dtype DOT, in order."""
    if DOT == tl.bfloat16:
        a = tl.join((even & 0xFFFF).to(tl.uint16), (even >> 16).to(tl.uint16))
        b = tl.join((odd & 0xFFFF).to(tl.uint16), (odd >> 16).to(tl.uint16))
    else:
        a, b = tl.join(_first(even), _second(even)), tl.join(_first(odd), _second(odd))
    return tl.reshape(tl.join(a, b), (even.shape[0], 4 * even.shape[1])).to(DOT, bitcast=True)


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def matmul(
    sign_mantissa, codes, constants, x, partial, M, N, K,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT, ALIGNED: tl.constexpr,
):  # fmt: skip
    """partial[split, m, n]: the sums over that split's part of K, escapes not yet accounted for."""
    constants = _load_constants(constants)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    x_row = x + m.to(tl.int64)[:, None] * K
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    blocks = tl.cdiv(K, 256)
    each = tl.cdiv(blocks, SPLIT)
    if ALIGNED:
        w, k64 = tl.arange(0, 16)[None, :], tl.arange(0, 64)[None, :]
        for b in range(split * each, tl.minimum(split * each + each, blocks)):
            words = codes + (row * blocks + b) * 24
            low = tl.load(words + w)
            high = tl.load(words + 16 + (w & 7)) >> (w >> 3).to(tl.uint32)
            for i in tl.static_range(4):
                part = tl.load(sign_mantissa + (row * blocks + b) * 64 + 16 * i + w)
                even, odd = _pairs(low, high, part, constants, i)
                xs = tl.load(x_row + (b * 256 + 64 * i + k64), mask=m[:, None] < M, other=0.0).to(DOT)
                total = tl.dot(_tile(even, odd, DOT), tl.trans(xs), total, input_precision="ieee")
    else:
        for k0 in range(split * each * 256, tl.minimum(split * each * 256 + each * 256, K), 32):
            k = k0 + tl.arange(0, 32)[None, :]  # more at a time do not fit in registers
            word = _word(sign_mantissa, codes, constants, row * K, k, k < K)
            xs = tl.load(x_row + k, mask=(m[:, None] < M) & (k < K), other=0.0).to(DOT)
            if DOT == tl.bfloat16:
                values = word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
            else:
                values = _first(word)
            total = tl.dot(values, tl.trans(xs), total, input_precision="ieee")
    at = (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(partial + at, total, mask=(n[:, None] < N) & (m[None, :] < M))


@triton.jit(do_not_specialize=["M", "SPLIT"])  # one compilation for any number of tokens
def finish(
    partial, xt, row_start, escapes, constants, bias, y, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ESCAPES: tl.constexpr, SPLIT,
):  # fmt: skip
    """y = the sum of the partial sums, x times the differences of the escapes, and the bias."""
    constants = _load_constants(constants)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (n[:, None] < N) & (m[None, :] < M)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for s in range(SPLIT):
        at = (s * M + m).to(tl.int64)[None, :] * N + n[:, None]
        total += tl.load(partial + at, mask=inside, other=0.0)
    begin = tl.load(row_start + n, mask=n < N, other=0)
    end = tl.load(row_start + n + 1, mask=n < N, other=0)
    for e0 in range(0, tl.max(end - begin, 0), ESCAPES):
        e = begin[:, None] + e0 + tl.arange(0, ESCAPES)[None, :]
        there = e < end[:, None]
        escape = tl.load(escapes + e, mask=there, other=0)
        difference = _difference((escape & 0xFFFF).to(tl.uint32), constants)
        here = there[:, :, None] & (m[None, None, :] < M)
        at = (escape >> 16).to(tl.int64)[:, :, None] * M + m[None, None, :]
        value = tl.load(xt + at, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(here, value * difference[:, :, None], 0.0), 1)
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :].to(tl.int64) * N + n[:, None], total, mask=inside)


@triton.jit
def _window(codes, position, last):
    """64 bits of the stream from bit `position` on. codes: 64-bit words, of which `last` is the last one to be read."""
    word = tl.minimum(position >> 6, last)
    low = tl.load(codes + word)
    high = tl.load(codes + tl.minimum(word + 1, last))
    shift = (position & 63).to(tl.uint64)
    return (low >> shift) | ((high << (63 - shift)) << 1)


@triton.jit
def _entry(window, lookup):
    """length << 8 | symbol of the code at the start of window.

    Few codes are longer than 8 bits, and looking up 8 bits first touches few cache lines. Eight bits of a longer code,
    with zeros after them, find the entry of a longer code too.
    """
    entry = tl.load(lookup + (window & 0xFF).to(tl.int32)).to(tl.int32)
    return tl.load(lookup + (window & 0xFFF).to(tl.int32), mask=entry >= 9 << 8, other=entry).to(tl.int32)


@triton.jit
def _four(codes, lookup, position, last):
    """Four symbols as the bytes of a word, and the position after them; 4 * 12 bits fit in a window."""
    window = _window(codes, position, last)
    symbols = tl.zeros_like(position).to(tl.uint32)
    for i in tl.static_range(4):
        entry = _entry(window, lookup)
        symbols |= (entry & 0xFF).to(tl.uint32) << (8 * i)
        window >>= (entry >> 8).to(tl.uint64)
        position += entry >> 8
    return symbols, position


@triton.jit
def scan(
    codes, lookup, starts, ends, groups, segments, words, chunks, rest, steps,
    LANES: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Finds where each segment of SEGMENT symbols begins and each chunk ends: a lane walks through a chunk.

    starts, ends: bits. rest: symbols of the last chunk. steps: segments of a chunk, at most.
    """
    chunk = tl.program_id(0) * LANES + tl.arange(0, LANES)
    start = tl.load(starts + chunk, mask=chunk < chunks, other=0)
    first = start >> 6
    last = tl.maximum(tl.minimum(words - 1 - first, 1 << 30), 0).to(tl.int32)
    position = (start & 63).to(tl.int32)
    group = position
    symbols = tl.where(chunk == chunks - 1, rest, CHUNK)
    for step in range(steps):
        segment = chunk * (CHUNK // SEGMENT) + step
        there = (chunk < chunks) & (step * SEGMENT < symbols)
        group = tl.where(step % GROUP == 0, position, group)
        tl.store(groups + segment // GROUP, first * 64 + position, mask=there & (step % GROUP == 0))
        tl.store(segments + segment, (position - group).to(tl.uint16), mask=there)
        for four in range(step * (SEGMENT // 4), (step + 1) * (SEGMENT // 4)):
            _symbols, after = _four(codes + first, lookup, position, last)
            position = tl.where(four < symbols // 4, after, position)
    window = _window(codes + first, position, last)
    for i in tl.static_range(3):
        length = tl.where(i < symbols % 4, _entry(window, lookup) >> 8, 0)
        window >>= length.to(tl.uint64)
        position += length
    tl.store(ends + chunk, first * 64 + position, mask=chunk < chunks)


@triton.jit
def decode_huffman(
    codes, lookup, groups, segments, sign_mantissa, constants, out, words, count, quads,
    LANES: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every lane decodes a segment, 16 symbols at a time. out: a quad as 64 bits, or as 32 where it is of bytes."""
    constants = _load_constants(constants)
    segment = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = segment < count
    start = tl.load(groups + segment // GROUP, mask=there, other=0)
    start += tl.load(segments + segment, mask=there, other=0).to(tl.int64)
    first = tl.minimum(tl.maximum(start >> 6, 0), words - 1)
    last = tl.minimum(words - 1 - first, 1 << 30).to(tl.int32)
    position = (start & 63).to(tl.int32)
    stream = codes + first
    for step in range(SEGMENT // 16):
        a, position = _four(stream, lookup, position, last)
        b, position = _four(stream, lookup, position, last)
        c, position = _four(stream, lookup, position, last)
        d, position = _four(stream, lookup, position, last)
        symbols = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (LANES, 4))
        quad = segment.to(tl.int64)[:, None] * (SEGMENT // 4) + step * 4 + tl.arange(0, 4)[None, :]
        if WIDE:
            even, odd = _merge(symbols, tl.load(sign_mantissa + quad, mask=quad < quads, other=0), constants)
            tl.store(out + quad, _in_order(even, odd), mask=quad < quads)
        else:
            tl.store(out + quad, symbols, mask=quad < quads)
