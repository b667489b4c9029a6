"""Decoding packed weights: on the CPU compiled loops, one pass from packed bits to the weight's dtype, on all cores.

What ends with `_rows` is such a loop with what it decodes. Other devices run plain torch, which gives the same bits;
tests compare the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.bfp import Format
from compress.formats.bfp import unpack as unpack_bfp
from compress.formats.bitpack import packed_width, unpack
from compress.formats.compiled import jit
from compress.formats.float4 import E2M1
from compress.formats.float4 import unpack as unpack_nibbles
from compress.formats.float8 import E4M3
from compress.kernels.cpu_floats import widen, widen_groups
from compress.kernels.cpu_levels import LEVELS, most_levels, take, take_groups
from compress.kernels.cpu_unpack import TOGETHER, ask_for, unpack_row
from compress.kernels.rows import Rows

_NONE = np.empty(0, np.float32)
_SIGNED = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)


def groups(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """(q - zero) * scale in float32, rounded to the scales' dtype. Returns (rows, groups * group_size).

    packed: (rows, words) int32, as formats.bitpack lays it out. scales: (rows, groups) bf16, fp16 or fp32. zeros:
    (rows, groups) uint8, or None for 2**(bits - 1).
    """
    if packed.device.type != "cpu":
        return groups_torch(packed, scales, zeros, bits, group_size)
    return groups_rows(packed, scales, zeros, bits, group_size).whole


def groups_rows(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Rows:
    """`groups` on the CPU."""
    rows, count = scales.shape
    _check_shape("packed", packed, (rows, packed_width(count * group_size, bits)))
    if zeros is not None:
        _check_shape("zeros", zeros, (rows, count))
    offsets = torch.full((rows, count), 1 << (bits - 1), dtype=torch.uint8) if zeros is None else zeros.contiguous()
    stored = packed.contiguous().numpy().view(np.uint8), scales.float().contiguous().numpy(), _NONE, offsets.numpy()
    arguments = (*stored, bits, False, group_size, _integers(bits, group_size))
    return _rows(_group_rows, rows, count * group_size, scales.dtype, arguments)


def groups_torch(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """`groups` in plain torch, on any device."""
    rows, count = scales.shape
    q = unpack(packed, bits, count * group_size).view(rows, count, group_size).float()
    q -= 1 << (bits - 1) if zeros is None else zeros[:, :, None]
    return (q * scales[:, :, None].float()).flatten(1).to(scales.dtype)


def bfp(packed: Tensor, exponents: Tensor, form: Format, columns: int) -> Tensor:
    """mantissa * step in float32, rounded to the form's dtype: (rows, columns).

    packed: (rows, ceil(columns * bits / 8)) uint8 and exponents: (rows, blocks) uint8, as formats.bfp lays them out.
    """
    if packed.device.type != "cpu":
        return unpack_bfp(packed, exponents, form, columns)
    return bfp_rows(packed, exponents, form, columns).whole


def bfp_rows(packed: Tensor, exponents: Tensor, form: Format, columns: int) -> Rows:
    """`bfp` on the CPU."""
    rows, count = packed.shape[0], form.blocks(columns)
    _check_shape("packed", packed, (rows, form.row_bytes(columns)))
    _check_shape("exponents", exponents, (rows, count))
    zeros = np.full((rows, count), form.half, np.uint8)
    stored = packed.contiguous().numpy(), exponents.contiguous().numpy(), form.steps().numpy(), zeros
    arguments = (*stored, form.bits, False, form.block_size, _integers(form.bits, form.block_size))
    return _rows(_group_rows, rows, columns, form.dtype, arguments)


def e4m3(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """weight * scale in float32, rounded to `dtype`, by default the scales'.

    weight: (rows, columns) float8_e4m3fn. scales: (m, n), each for a block of rows x columns, the last of a row or
    column of blocks smaller.
    """
    if weight.device.type != "cpu":
        return e4m3_torch(weight, scales, block, dtype)
    return e4m3_rows(weight, scales, block, dtype).whole


def e4m3_rows(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> Rows:
    """`e4m3` on the CPU."""
    rows, columns = weight.shape
    _check_shape("scales", scales, (-(-rows // block[0]), -(-columns // block[1])))
    stored = weight.contiguous().view(torch.uint8).numpy(), scales.float().contiguous().numpy()
    arguments = (*stored, *block, E4M3.numpy())
    return _rows(_byte_rows, rows, columns, dtype or scales.dtype, arguments)


def int8_rows(weight: Tensor, scales: Tensor) -> Rows | None:
    """weight * scale on the CPU, rounded to bfloat16; None for scales of another dtype, and for short rows.

    weight: (rows, columns) int8. scales: (rows, 1).
    """
    rows, columns = weight.shape
    _check_shape("scales", scales, (rows, 1))
    if scales.dtype != torch.bfloat16 or columns < len(_SIGNED):
        return None
    stored = weight.contiguous().view(torch.uint8).numpy(), scales.float().contiguous().numpy()
    arguments = (*stored, 1, columns, _SIGNED)
    return _rows(_byte_rows, rows, columns, scales.dtype, arguments)


def e4m3_torch(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """`e4m3` in plain torch, on any device."""
    rows, columns = weight.shape
    spread = scales.float()
    if block[0] > 1 and scales.shape[0] > 1:
        spread = spread.repeat_interleave(block[0], 0)[:rows]
    if scales.shape[1] > 1:
        spread = spread.repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * spread).to(dtype or scales.dtype)


def e2m1(packed: Tensor, scales: Tensor, steps: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """code * scale in float32, rounded to `dtype`. Returns (rows, groups * group_size).

    packed: (rows, columns / 2) uint8, as formats.float4 lays it out. scales: (rows, groups) uint8, which stand for
    steps, (256,) float32; group_size even.
    """
    if packed.device.type != "cpu":
        return e2m1_torch(packed, scales, steps, group_size, dtype)
    return e2m1_rows(packed, scales, steps, group_size, dtype).whole


def e2m1_rows(packed: Tensor, scales: Tensor, steps: Tensor, group_size: int, dtype: torch.dtype) -> Rows:
    """`e2m1` on the CPU."""
    rows, count = scales.shape
    _check_shape("packed", packed, (rows, count * group_size // 2))
    stored = packed.contiguous().numpy(), scales.contiguous().numpy(), steps.numpy(), np.zeros((rows, count), np.uint8)
    arguments = (*stored, 4, False, group_size, E2M1.numpy())
    return _rows(_group_rows, rows, count * group_size, dtype, arguments)


def nibble_rows(packed: Tensor, scales: Tensor, levels: Tensor, group_size: int, dtype: torch.dtype) -> Rows:
    """level * scale in float32, rounded to `dtype`, on the CPU.

    packed: (rows, columns / 2) uint8, the first of each two codes in the high bits. scales: (rows, groups) float32.
    levels: (16,) float32.
    """
    rows, count = scales.shape
    _check_shape("packed", packed, (rows, count * group_size // 2))
    stored = packed.contiguous().numpy(), scales.contiguous().numpy(), _NONE, np.zeros((rows, count), np.uint8)
    arguments = (*stored, 4, True, group_size, levels.contiguous().numpy())
    return _rows(_group_rows, rows, count * group_size, dtype, arguments)


def e2m1_torch(packed: Tensor, scales: Tensor, steps: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """`e2m1` in plain torch, on any device."""
    values = E2M1.to(packed.device)[unpack_nibbles(packed).long()]
    return (values * steps[scales.int()].repeat_interleave(group_size, 1)).to(dtype)


def _integers(bits: int, group_size: int) -> Any:
    """What codes of so many bits stand for, where that is looked up."""
    return np.arange(max(LEVELS, 1 << bits), dtype=np.float32) if 1 << bits <= most_levels(group_size) else _NONE


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, int]) -> None:
    # The compiled loops do not check their bounds.
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name}: the shape is {tuple(tensor.shape)}, and {wanted} is needed")


def _rows(loop: Any, rows: int, columns: int, dtype: torch.dtype, arguments: tuple[Any, ...]) -> Rows:
    """Of a loop that makes bfloat16, where that is the weight's dtype, else float32."""
    made = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return Rows(loop, (rows, columns), dtype, made, arguments)


@jit
def store(values, out, dropped):  # type: ignore[no-untyped-def]
    """Puts float32 values into bits of float32 (dropped 0) or of bf16 (dropped 16, rounded half to even)."""
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF if dropped else 0)
    odd = np.uint32(1 if dropped else 0)
    for i in range(out.shape[0]):
        out[i] = (bits[i] + half + ((bits[i] >> np.uint32(16)) & odd)) >> np.uint32(dropped)


# Slices, and no sums as indices: for these numba asks whether they are below zero, and then nothing becomes a vector.
@jit
def _group_rows(  # type: ignore[no-untyped-def]
    start, stop, base, columns, out, dropped, packed, scales, steps, zeros, bits, high_first, group_size, levels
):
    """steps: what bytes of scales stand for; nothing where these are numbers. high_first: of 4 bits, the first code is
    in the higher ones. levels: what codes stand for, less zero; nothing where that is themselves."""
    groups = scales.shape[1]
    codes = np.zeros(-(-columns // TOGETHER) * TOGETHER, np.uint8)
    values = np.empty(columns, np.float32)
    factors, offsets = np.empty(groups, np.float32), np.empty(groups, np.float32)
    for place in range(start, stop):
        row, line = base + place, out[place, :columns]
        unpack_row(packed[row], bits, high_first, codes)
        stored, least = scales[row], zeros[row]
        for group in range(groups):
            offsets[group] = least[group]
        for group in range(groups):
            factors[group] = steps[np.uint64(stored[group])] if steps.shape[0] else stored[group]
        first = take_groups(levels, codes, factors, offsets, group_size, line) if dropped else 0
        for group in range(first, groups):
            scale, zero = factors[group], offsets[group]
            part = values[group * group_size : (group + 1) * group_size]
            chosen = codes[group * group_size : (group + 1) * group_size]
            for i in range(part.shape[0]):
                level = levels[chosen[i]] if levels.shape[0] else np.float32(chosen[i])
                part[i] = (level - zero) * scale
        store(values[first * group_size :], line[first * group_size :], dropped)


@jit
def _byte_rows(  # type: ignore[no-untyped-def]
    start, stop, base, columns, out, dropped, codes, scales, rows_per_scale, columns_per_scale, levels
):
    """levels: what each code stands for; where that is not looked up, codes are E4M3."""
    edge, words = np.zeros(32, np.uint8), np.empty(256, np.uint16)
    values = np.empty(columns + 32, np.float32)
    for place in range(start, stop):
        row, line = base + place, out[place, :columns]
        ask_for(codes[min(row + 1, codes.shape[0] - 1)])
        if dropped and scales.shape[1] == 1 and columns >= levels.shape[0]:
            store(levels * scales[row // rows_per_scale, 0], words, dropped)
            take(words, codes[row], line)
            continue
        factors = scales[row // rows_per_scale]
        whole = widen_groups(codes[row], factors, columns_per_scale, line) if dropped else 0
        begin = whole * columns_per_scale
        done = begin + widen(codes[row, begin:], values, columns - begin)
        rest = codes[row, done:]
        for i in range(rest.shape[0]):
            edge[i] = rest[i]
        widen(edge, values[done - begin :], 32)
        for block in range(whole, factors.shape[0]):
            first = block * columns_per_scale - begin
            part, scale = values[first : first + columns_per_scale], factors[block]
            for i in range(part.shape[0]):
                part[i] *= scale
        store(values, line[begin:], dropped)
