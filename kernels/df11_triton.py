"""df11 on a GPU, in Triton: decoding, and for coding=fixed y = x @ W.T that never writes W to memory.

A prepared weight (`Fixed`, `Huffman`) is what its scheme stores, with what the kernels need beside it; it is made once,
when the weight is loaded. An escaped element of a `Fixed` has code 0. The main loops take it for an element with the
lowest symbol, which is always finite; what it really is comes from the list of escapes: stored over it when decoding,
added as a difference when multiplying. So a sum is off by 2**-24 of what it was taken for, as of any other term; and an
infinite x times an escape is NaN where x @ W.T may give an infinity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from compress.formats.fixed import BLOCK, BLOCK_BYTES, WINDOW
from compress.formats.huffman import CHUNK, LIMIT, check_table, padded
from compress.kernels import df11_kernels as kernels
from compress.kernels.prepared import ROCM, stages

SEGMENT = 128  # symbols that one lane decodes; 131072 lanes for 4096 x 4096, half of what an H200 holds at a time
GROUP = 32  # segments that count their 16-bit positions from the same bit: 32 * 128 * 12 < 2**16
PROGRAMS = 512  # a grid of so many gives each of about 130 multiprocessors several
FUSED_TOKENS = 256  # W is decoded anew for every 128 of them, and the sums lie in float32 before the escapes are added
WARPS = 2 if ROCM else 4  # of a program of 128 lanes, of which a warp of an AMD Instinct has 64
_LONGEST_ROW = 1 << 16  # up to which an escape's column and word fit in 32 bits
_X = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Fixed:
    """A weight of N rows and K columns, coding=fixed.

    sign_mantissa: (N, K) uint8. codes: (blocks, 96) uint8. row_start: (N + 1,) int32, where each row's escapes begin.
    escapes: (count,) uint32, or int64 where K > 65536: column << 16 | the element's 16 bits, by row. constants: (4,)
    uint32, see kernels/df11_kernels.py.
    """

    sign_mantissa: Tensor
    codes: Tensor
    row_start: Tensor
    escapes: Tensor
    constants: Tensor

    @property
    def aligned(self) -> bool:
        """Whether every row starts a block of codes."""
        return self.sign_mantissa.shape[1] % BLOCK == 0


@dataclass(frozen=True)
class Huffman:
    """n elements of any shape, coding=huffman.

    codes: (words,) uint64. lookup: (4096,) uint16, length << 8 | symbol by the next 12 bits of the stream. groups: (n /
    4096,) int64, the bit where every 32nd segment begins. segments: (n / 128,) uint16, where each begins, counted from
    its group. sign_mantissa: (n / 4,) uint32, or None for 8-bit words. constants: (4,) uint32.
    """

    codes: Tensor
    lookup: Tensor
    groups: Tensor
    segments: Tensor
    sign_mantissa: Tensor | None
    constants: Tensor
    shape: tuple[int, ...]


def prepare_fixed(tensors: Mapping[str, Tensor], device: torch.device | str) -> Fixed:
    """tensors: sign_mantissa (..., K) uint8, codes (blocks, 96) uint8, base (1,) uint8, escape_counts (blocks,) uint16
    and escapes (count,) uint16: position in the block << 8 | symbol.
    """
    sign_mantissa = _aligned(tensors["sign_mantissa"].to(device))
    columns = max(1, sign_mantissa.shape[-1])
    sign_mantissa = sign_mantissa.reshape(-1, columns)
    codes, base = _aligned(tensors["codes"].to(device)), int(tensors["base"].item())
    shape = (-(-sign_mantissa.numel() // BLOCK), BLOCK_BYTES)
    if tuple(codes.shape) != shape or base > 256 - WINDOW:
        raise ValueError(f"codes, base: are {tuple(codes.shape)} and {base}; {shape} and at most 248 are needed")
    escapes = tensors["escapes"].to(device, torch.int32)
    positions = _positions(tensors["escape_counts"].to(device, torch.int64), escapes, sign_mantissa.numel())
    parts = sign_mantissa.flatten()[positions].int()
    words = (parts & 0x80) << 8 | (escapes & 0xFF) << 7 | parts & 0x7F
    packed = (positions % columns) << 16 | words
    per_row = torch.bincount(positions // columns, minlength=sign_mantissa.shape[0])
    row_start = F.pad(per_row.cumsum(0), (1, 0)).int()
    small = packed if columns > _LONGEST_ROW else packed.int().view(torch.uint32)
    return Fixed(sign_mantissa, codes, row_start, small, _constants(base, device))


def _positions(counts: Tensor, escapes: Tensor, elements: int) -> Tensor:
    """Which elements are escapes. counts: (blocks,) int64. Returns (count,) int64, ascending."""
    blocks = -(-elements // BLOCK)
    if counts.numel() != blocks or int(counts.sum()) != escapes.numel():
        raise ValueError(f"escape_counts: {counts.numel()} of {blocks} blocks, and a sum other than {escapes.numel()}")
    positions = torch.arange(blocks, device=counts.device).repeat_interleave(counts) * BLOCK + (escapes >> 8)
    if (positions.diff() <= 0).any() or (positions >= elements).any():
        raise ValueError("escapes: the positions do not ascend, or are past the last element")
    return positions


def prepare_huffman(tensors: Mapping[str, Tensor], device: torch.device | str) -> Huffman:
    """tensors: table (k, 2) uint8, chunk_bytes (chunks,) uint16, codes (bytes,) uint8, and what has the shape:
    sign_mantissa (...) uint8, or like (0, ...) of an 8-bit dtype.

    Raises ValueError where a chunk's codes do not end with its bytes, as `formats.huffman.decode` does.
    """
    part, table = tensors.get("sign_mantissa"), tensors["table"].cpu()
    shape = tuple(tensors["like"].shape[1:] if part is None else part.shape)
    count, sizes = torch.Size(shape).numel(), tensors["chunk_bytes"].to(device, torch.int64)
    check_table(table.numpy())
    stops = sizes.cumsum(0)
    if sizes.numel() != -(-count // CHUNK) or tensors["codes"].numel() != padded(int(sizes.sum())):
        raise ValueError("chunk_bytes: do not belong to these codes")
    weight = Huffman(
        _words(tensors["codes"].to(device), torch.uint64),
        _lookup(table.tolist()).view(torch.uint16).to(device),
        torch.empty(-(-count // (SEGMENT * GROUP)), dtype=torch.int64, device=device),
        torch.empty(-(-count // SEGMENT), dtype=torch.uint16, device=device),
        None if part is None else _words(part.to(device).flatten(), torch.uint32),
        _constants(0, device),
        shape,
    )
    if count:
        ends = torch.empty_like(stops)
        _launch(
            kernels.scan,
            (triton.cdiv(sizes.numel(), 32),),
            weight.codes,
            weight.lookup,
            (stops - sizes) * 8,
            ends,
            weight.groups,
            weight.segments,
            weight.codes.numel(),
            sizes.numel(),
            count - (sizes.numel() - 1) * CHUNK,
            min(CHUNK // SEGMENT, weight.segments.numel()),
            LANES=32,
            SEGMENT=SEGMENT,
            CHUNK=CHUNK,
            GROUP=GROUP,
            num_warps=1,
        )
        if ((ends + 7) // 8 != stops).any():
            raise ValueError("the codes are damaged; download the checkpoint again")
    return weight


def _lookup(table: list[list[int]]) -> Tensor:
    """table: rows of symbol and length, those of a complete canonical code. Returns (4096,) int16."""
    entries = torch.zeros(1 << LIMIT, dtype=torch.int16)
    code, previous = 0, table[0][1]
    for symbol, length in table:
        code <<= length - previous
        reversed_code = int(f"{code:0{length}b}"[::-1], 2) if length else 0
        entries[reversed_code :: 1 << length] = length << 8 | symbol
        code, previous = code + 1, length
    return entries


def decode_fixed(weight: Fixed) -> Tensor:
    """Returns the 16 bits of every element: (N, K) int16."""
    rows, columns = weight.sign_mantissa.shape
    out = torch.empty(rows, columns, dtype=torch.int16, device=weight.codes.device)
    together = min(16, triton.next_power_of_2(-(-4096 // columns)))
    if out.numel():
        _launch(
            kernels.decode_fixed,
            (triton.cdiv(rows, together),),
            *_parts(weight),
            weight.row_start,
            weight.escapes,
            out,
            out.view(torch.uint64) if weight.aligned else out,
            rows,
            columns,
            ROWS=together,
            LANES=128,
            ALIGNED=weight.aligned,
            num_warps=WARPS,
        )
    return out


def decode_huffman(weight: Huffman) -> Tensor:
    """Returns the 16 bits of every element as int16, or where they have 8 as uint8, in the weight's shape."""
    wide, count = weight.sign_mantissa is not None, torch.Size(weight.shape).numel()
    dtype, quad = (torch.int16, torch.uint64) if wide else (torch.uint8, torch.uint32)
    out = torch.empty(-(-count // 4) * 4, dtype=dtype, device=weight.codes.device)
    if count:
        _launch(
            kernels.decode_huffman,
            (triton.cdiv(weight.segments.numel(), 128),),
            weight.codes,
            weight.lookup,
            weight.groups,
            weight.segments,
            weight.sign_mantissa,
            weight.constants,
            out.view(quad),
            weight.codes.numel(),
            weight.segments.numel(),
            out.numel() // 4,
            LANES=128,
            SEGMENT=SEGMENT,
            GROUP=GROUP,
            WIDE=wide,
            num_warps=WARPS,
        )
    return out[:count].view(weight.shape)


def linear_fixed(x: Tensor, weight: Fixed, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a bf16 W, summed in float32. For more than FUSED_TOKENS tokens, decode and multiply instead.

    x: (..., K) bf16, fp16 or fp32. bias: (N,). Returns (..., N) in the dtype of x.
    """
    rows, columns = weight.sign_mantissa.shape
    if x.shape[-1] != columns:
        raise ValueError(f"x: has {x.shape[-1]} features, and the weight's in_features is {columns}")
    if x.dtype not in _X:
        raise ValueError(
            f"x: is {x.dtype}; convert it to bfloat16, float16 or float32, or multiply by the decoded weight"
        )
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != weight.codes.device:
            raise ValueError(f"{name}: is on {tensor.device}; move it to {weight.codes.device}, where the weight is")
    flat = _aligned(x.reshape(-1, columns))
    y = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    if y.numel():
        (_one_token if flat.shape[0] == 1 and weight.aligned else _tokens)(flat, weight, bias, y)
    return y.view(*x.shape[:-1], rows)


def _one_token(x: Tensor, weight: Fixed, bias: Tensor | None, y: Tensor) -> None:
    """x: (1, K), where every row starts a block."""
    rows, columns = weight.sign_mantissa.shape
    together, lanes = next((r for r in (4, 2) if rows >= r * PROGRAMS), 1), 128
    programs = triton.cdiv(rows, together)
    split = max(1, min(PROGRAMS // programs, columns // (16 * lanes)))
    partial = y if split == 1 else torch.empty(split, 1, rows, dtype=torch.float32, device=y.device)
    _launch(
        kernels.gemv,
        (programs, split),
        *_parts(weight),
        weight.row_start,
        weight.escapes,
        x if x.dtype == torch.float32 else x.view(torch.uint64),
        x,
        bias,
        partial,
        rows,
        columns,
        X=_X[x.dtype],
        ROWS=together,
        LANES=lanes,
        SPLIT=split,
        EVEN=columns % (16 * lanes) == 0,
        num_warps=WARPS,
    )
    if split > 1:
        _finish(y, partial, x.T, weight, bias)


def _tokens(x: Tensor, weight: Fixed, bias: Tensor | None, y: Tensor) -> None:
    tokens, (rows, columns) = x.shape[0], weight.sign_mantissa.shape
    narrow = x.dtype == torch.bfloat16  # a float32 dot is one of plain multiplications, which needs registers
    block_m, block_n = min(128 if narrow else 16, max(16, triton.next_power_of_2(tokens))), 64
    across, down = triton.cdiv(rows, block_n), triton.cdiv(tokens, block_m)
    split = max(1, min(PROGRAMS // (2 * across * down), columns // (2 * BLOCK)))
    partial = torch.empty(split, tokens, rows, dtype=torch.float32, device=y.device)
    _launch(
        kernels.matmul,
        (across, down, split),
        *_parts(weight),
        x,
        partial,
        tokens,
        rows,
        columns,
        DOT=tl.bfloat16 if narrow else tl.float32,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLIT=split,
        ALIGNED=weight.aligned,
        num_warps=4 if block_m <= 32 else 8,
        num_stages=stages(3 if block_m == 16 else 2),
    )
    _finish(y, partial, x.T.contiguous(), weight, bias)


def _finish(y: Tensor, partial: Tensor, xt: Tensor, weight: Fixed, bias: Tensor | None) -> None:
    """y: (M, N). partial: (SPLIT, M, N). xt: (K, M), so that the tokens at an escape's column lie side by side."""
    split, tokens, rows = partial.shape
    block_m = min(64, triton.next_power_of_2(tokens))
    block_n = max(1, min(8, 64 // block_m))
    _launch(
        kernels.finish,
        (triton.cdiv(rows, block_n), triton.cdiv(tokens, block_m)),
        partial,
        xt,
        weight.row_start,
        weight.escapes,
        weight.constants,
        bias,
        y,
        tokens,
        rows,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        ESCAPES=16,
        SPLIT=split,
        num_warps=4,
    )


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Triton launches on the current device, whatever the first of the arguments, a tensor, lies on."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


def _parts(weight: Fixed) -> tuple[Tensor, ...]:
    """sign_mantissa and codes, as 32-bit words where the kernels read such, and the constants."""
    stored: Any = (weight.sign_mantissa, weight.codes)
    if weight.aligned:
        stored = tuple(part.view(torch.uint32) for part in stored)
    return *stored, weight.constants


def _constants(base: int, device: torch.device | str) -> Tensor:
    values = torch.tensor([base * 0x01010101, 0x80008000, 0x7F807F80, 0x04040404])
    return values.int().view(torch.uint32).to(device)


def _words(part: Tensor, dtype: torch.dtype) -> Tensor:
    """part: (n,) uint8. Returns it with zeros at the end, as whole words of dtype."""
    missing = -part.numel() % dtype.itemsize
    return _aligned(F.pad(part, (0, missing)) if missing else part).view(dtype)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and where 16 bytes can be loaded at once."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
