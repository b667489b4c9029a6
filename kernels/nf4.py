"""Decoding 4-bit codes that stand for levels of a block's largest magnitude; blocks run over the flattened weight.

On the CPU a compiled loop, elsewhere plain torch; the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import empty, jit
from compress.formats.threads import in_threads
from compress.kernels import cpu, lookup, prepared
from compress.kernels.cpu_levels import take_groups
from compress.kernels.decode import nibble_rows, store
from compress.kernels.op import Layout, Packed

TOGETHER = 16  # blocks that are unpacked at a time


@dataclass(frozen=True)
class Blocks:
    """A weight as bitsandbytes stores it. packed, absmax, levels, block_size: see `decode`."""

    packed: Tensor
    absmax: Tensor
    levels: Tensor
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def pack(
    packed: Tensor, absmax: Tensor, levels: Tensor, block_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Packed:
    """The weight for its device: of whole blocks in a row, on a GPU a codebook with the first code in the high bits."""
    rows, columns = shape
    if prepared.runs_triton(packed.device) and rows and columns and columns % block_size == 0:
        indices = packed.view(rows, -1).view(torch.int32)
        parts = indices, levels[None], (rows, columns), 1, block_size, dtype
        return lookup.pack(*parts, scales=absmax.view(rows, -1), swapped=True)
    return LAYOUT(packed, absmax, levels, block_size, shape, dtype)


def decode(
    packed: Tensor, absmax: Tensor, levels: Tensor, block_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """level * absmax in float32, rounded to `dtype`, one of bf16, fp16, fp32. Returns a tensor of `shape`.

    packed: (ceil(count / 2), 1) uint8, the first of each two codes in the high bits. absmax: (blocks,) float32.
    levels: (16,) float32. block_size: even. Raises ValueError where the tensors are not as long as that takes.
    """
    count = math.prod(shape)
    blocks = -(-count // block_size)
    _check("packed", packed, torch.uint8, -(-count // 2))
    _check("absmax", absmax, torch.float32, blocks)
    _check("levels", levels, torch.float32, 16)
    if packed.device.type != "cpu":
        return decode_torch(packed, absmax, levels, block_size, shape, dtype)
    # The compiled loop makes bits of bf16 or of float32; these become float16 in a second step.
    words, dropped = (torch.int16, 16) if dtype == torch.bfloat16 else (torch.int32, 0)
    out = empty((count,), words)
    arguments = (packed.contiguous().view(-1).numpy(), absmax.contiguous().numpy(), levels.contiguous().numpy())
    unsigned = out.numpy().view(np.uint16 if dropped else np.uint32)
    in_threads(_decode_blocks, blocks, count, unsigned, dropped, block_size, *arguments)
    return out.view(torch.bfloat16 if dropped else torch.float32).to(dtype).view(shape)


def decode_torch(
    packed: Tensor, absmax: Tensor, levels: Tensor, block_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """`decode` in plain torch, on any device."""
    count = math.prod(shape)
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=1).view(-1)[:count]
    return (levels[codes.int()] * absmax.repeat_interleave(block_size)[:count]).to(dtype).view(shape)


def _decode(weight: Blocks) -> Tensor:
    return decode(weight.packed, weight.absmax, weight.levels, weight.block_size, weight.shape, weight.dtype)


def _linear(x: Tensor, weight: Blocks, bias: Tensor | None) -> Tensor:
    height, columns = weight.shape
    rows = None
    if weight.packed.device.type == "cpu" and height and columns and columns % weight.block_size == 0:
        scales, packed = weight.absmax.view(height, -1), weight.packed.view(height, -1)
        rows = nibble_rows(packed, scales, weight.levels, weight.block_size, weight.dtype)
    return cpu.dense(x, (height, columns), _decode(weight).__getitem__ if rows is None else rows, bias)


LAYOUT = Layout("nf4", Blocks, _decode, _linear)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    # The compiled loop does not check its bounds.
    if tensor.dtype != dtype or tensor.numel() != count:
        found = f"{tensor.numel()} values of {tensor.dtype}"
        raise ValueError(f"{name}: there are {found}, and {count} of {dtype} are needed")


@jit
def _decode_blocks(start, stop, out, dropped, block_size, packed, absmax, levels):  # type: ignore[no-untyped-def]
    size = TOGETHER * block_size
    codes, values, zeros = np.empty(size, np.uint8), np.empty(size, np.float32), np.zeros(TOGETHER, np.float32)
    for first in range(start, stop, TOGETHER):
        scales = absmax[first : min(first + TOGETHER, stop)]
        part = out[first * block_size : (first + scales.shape[0]) * block_size]
        pairs = packed[first * block_size // 2 :][: (part.shape[0] + 1) // 2]
        for i in range(pairs.shape[0]):
            codes[2 * i] = pairs[i] >> np.uint8(4)
            codes[2 * i + 1] = pairs[i] & np.uint8(15)
        done = take_groups(levels, codes, scales, zeros, block_size, part) if dropped else 0
        for block in range(done, scales.shape[0]):
            found = values[block * block_size : (block + 1) * block_size]
            chosen = codes[block * block_size : (block + 1) * block_size]
            for i in range(found.shape[0]):
                found[i] = levels[chosen[i]] * scales[block]
        left = part[done * block_size :]
        store(values[done * block_size :][: left.shape[0]], left, dropped)
