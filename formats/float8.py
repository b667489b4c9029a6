"""E4M3 (OCP 8-bit float: 4 exponent bits, 3 mantissa bits, no infinity), saturating; and the maxima for its scales."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
_CHUNK = 1 << 18  # values: intermediate results of this size stay in a core's cache
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


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
    lines, height = _lines(scales.float(), rows, cols, block)
    line_of_row = torch.arange(rows, device=weight.device) // height
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=weight.device)
    buffer = torch.empty(0, dtype=torch.float32, device=weight.device)
    for part in _row_chunks(weight):
        buffer.resize_(part.stop - part.start, cols)
        torch.div(weight[part], lines[line_of_row[part]], out=buffer)
        # Clamped because torch 2.11 casts what lies beyond 448 to NaN.
        codes[part].copy_(buffer.clamp_(-E4M3_MAX, E4M3_MAX))
    return codes


def absmax(weight: Tensor, rows_per_block: int, cols_per_block: int) -> Tensor:
    """weight: (rows, cols) bf16, fp16 or fp32. Returns (row_blocks, col_blocks) float32, numbers rounded up.

    The last block of a row or column may be smaller. A NaN makes its block's maximum NaN.
    """
    _check(weight)
    rows, cols = weight.shape
    blocks = _blocks(rows, cols, (rows_per_block, cols_per_block))
    integers = weight.contiguous().view(_INTEGERS[weight.dtype])
    of_rows = integers.new_zeros(blocks[0] * rows_per_block, blocks[1])
    # Without their sign, floats order as integers do, and integers have the faster maximum.
    mask = torch.iinfo(integers.dtype).max
    if weight.numel():
        for part in _row_chunks(integers):
            magnitudes = F.pad(integers[part] & mask, (0, blocks[1] * cols_per_block - cols))
            of_rows[:rows][part] = magnitudes.view(-1, blocks[1], cols_per_block).amax(dim=2)
    return of_rows.view(blocks[0], rows_per_block, blocks[1]).amax(dim=1).view(weight.dtype).float()


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.dtype not in _INTEGERS:
        raise ValueError(f"weight: a 2-D bf16, fp16 or fp32 tensor is needed, not {weight.ndim}-D {weight.dtype}")


def _blocks(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    if min(block) < 1:
        raise ValueError(f"block: {block[0]} x {block[1]}; both must be at least 1")
    return -(-rows // block[0]), -(-cols // block[1])


def _lines(scales: Tensor, rows: int, cols: int, block: tuple[int, int] | None) -> tuple[Tensor, int]:
    """Scales as lines (n, 1 or cols), and how many rows of the weight share a line."""
    if block is None:
        scales = scales.reshape(1, 1) if scales.ndim == 0 else scales
        return scales, max(1, rows) if scales.shape[0] == 1 else 1
    wanted = _blocks(rows, cols, block)
    if scales.shape != wanted:
        raise ValueError(f"scales: {wanted} blocks of {block} make up the weight, not {tuple(scales.shape)}")
    return scales.repeat_interleave(block[1], dim=1)[:, :cols], block[0]


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    rows, cols = weight.shape
    step = max(1, _CHUNK // max(1, cols)) if weight.device.type == "cpu" else max(1, rows)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
