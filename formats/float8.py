"""E4M3 (OCP 8-bit float: 4 exponent bits, 3 mantissa bits, no infinity), saturating; and the maxima for its scales.

Compiled with numba on the CPU, plain torch elsewhere; the same bytes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats.compiled import float_bits, jit
from compress.formats.threads import in_threads

E4M3_MAX = 448.0
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # what each byte stands for
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def to_e4m3(weight: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """weight: (rows, cols) bf16, fp16 or fp32. Returns (rows, cols) float8_e4m3fn.

    scales: positive, broadcastable to the weight; with `block`, one for each block of rows x cols, the last of a row or
    column smaller. The value stored is weight / scales rounded to float32, clamped to +-448, then rounded half to even;
    infinities become +-448, a NaN stays one.
    """
    _check(weight)
    if not bool((scales > 0).all()):
        raise ValueError("scales: all must be positive; store 1 for a block of zeros")
    rows, cols = weight.shape
    lines, height, width = _lines(scales.float(), rows, cols, block)
    if weight.device.type != "cpu":
        lines = lines if lines.shape[1] == 1 else lines.repeat_interleave(width, dim=1)[:, :cols]
        line_of_row = torch.arange(rows, device=weight.device) // height
        # Clamped because torch 2.11 casts what lies beyond 448 to NaN.
        return (weight / lines[line_of_row]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    source, shift = float_bits(weight)
    codes = np.empty((rows, cols), np.uint8)
    arguments = (source, shift, lines.detach().contiguous().numpy(), height, width, codes)
    in_threads(_encode_rows, rows, weight.numel(), *arguments)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def absmax(weight: Tensor, rows_per_block: int, cols_per_block: int) -> Tensor:
    """weight: (rows, cols) bf16, fp16 or fp32. Returns (row_blocks, col_blocks) float32, numbers rounded up.

    The last block of a row or column may be smaller. A NaN makes its block's maximum NaN.
    """
    _check(weight)
    rows, cols = weight.shape
    blocks = _blocks(rows, cols, (rows_per_block, cols_per_block))
    if not weight.numel():
        return torch.zeros(blocks, device=weight.device)
    of_rows = torch.zeros(blocks[0] * rows_per_block, blocks[1], device=weight.device)
    if weight.device.type == "cpu":
        source, shift = float_bits(weight)
        maxima = of_rows.numpy().view(np.uint32)
        in_threads(_maxima_of_rows, rows, weight.numel(), source, shift, min(cols, cols_per_block), maxima)
    else:
        magnitudes = F.pad(weight.abs(), (0, blocks[1] * cols_per_block - cols))
        of_rows[:rows] = magnitudes.view(rows, blocks[1], cols_per_block).amax(dim=2)
    return of_rows.view(blocks[0], rows_per_block, blocks[1]).amax(dim=1)


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.dtype not in _DTYPES:
        raise ValueError(f"weight: a 2-D bf16, fp16 or fp32 tensor is needed, not {weight.ndim}-D {weight.dtype}")


def _blocks(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    if min(block) < 1:
        raise ValueError(f"block: {block[0]} x {block[1]}; both must be at least 1")
    return -(-rows // block[0]), -(-cols // block[1])


def _lines(scales: Tensor, rows: int, cols: int, block: tuple[int, int] | None) -> tuple[Tensor, int, int]:
    """Scales as lines, how many rows of the weight share a line, and how many neighbours in a row share a scale."""
    if block is None:
        scales = scales.expand(1, 1) if scales.ndim < 2 and scales.numel() == 1 else scales
        if scales.ndim != 2 or scales.shape[0] not in (1, rows) or scales.shape[1] not in (1, cols):
            raise ValueError(f"scales: {tuple(scales.shape)} does not broadcast to the weight's {(rows, cols)}")
        return scales, max(1, rows) if scales.shape[0] == 1 else 1, max(1, cols) if scales.shape[1] == 1 else 1
    wanted = _blocks(rows, cols, block)
    if scales.shape != wanted:
        raise ValueError(f"scales: {wanted} blocks of {block} make up the weight, not {tuple(scales.shape)}")
    return scales, block[0], min(block[1], max(1, cols))


@jit
def _encode_rows(start, stop, source, shift, lines, height, width, codes):  # type: ignore[no-untyped-def]
    for row in range(start, stop):
        line = lines[row // height]
        if width == 1:
            _encode(source[row], shift, line, codes[row])
            continue
        for i in range(line.shape[0]):
            part = slice(i * width, (i + 1) * width)
            _encode_with_one_scale(source[row, part], shift, line[i], codes[row, part])


@jit
def _encode_with_one_scale(source, shift, scale, codes):  # type: ignore[no-untyped-def]
    for i in range(source.shape[0]):
        codes[i] = _code(np.uint32(np.uint32(source[i]) << shift).view(np.float32) / scale)


@jit
def _encode(source, shift, scales, codes):  # type: ignore[no-untyped-def]
    for i in range(source.shape[0]):
        codes[i] = _code(np.uint32(np.uint32(source[i]) << shift).view(np.float32) / scales[i])


@jit
def _code(value):  # type: ignore[no-untyped-def]
    """The E4M3 byte of a float32: 20 mantissa bits fewer, the exponent's bias 7 instead of 127."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    clamped = np.uint32(min(magnitude, np.uint32(0x43E00000)))  # 448
    odd = np.uint32(clamped >> np.uint32(20)) & np.uint32(1)
    normal = np.uint32(np.uint32(clamped + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32((127 - 7) << 3)
    # Below 2**-6 E4M3's steps are 2**-9, and so are float32's at 2**14, where the addition rounds and leaves a count.
    sum_bits = np.float32(np.uint32(clamped).view(np.float32) + np.float32(2.0**14)).view(np.uint32)
    small = np.uint32(sum_bits - np.uint32(0x46800000))
    code = np.uint32(small if clamped < np.uint32(0x3C800000) else normal)
    code = np.uint32(0x7F) if magnitude > np.uint32(0x7F800000) else code
    return np.uint8(code | np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80)))


@jit
def _maxima_of_rows(start, stop, source, shift, width, maxima):  # type: ignore[no-untyped-def]
    """Without their sign, floats order as integers do, and integers have the faster maximum."""
    for row in range(start, stop):
        for block in range(maxima.shape[1]):
            maximum = np.uint32(0)
            part = source[row, block * width : (block + 1) * width]
            for i in range(part.shape[0]):
                maximum = max(maximum, np.uint32(np.uint32(np.uint32(part[i]) << shift) & np.uint32(0x7FFFFFFF)))
            maxima[row, block] = maximum
