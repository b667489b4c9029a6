"""Decoding packed weights: on the CPU compiled loops, one pass from packed bits to the weight's dtype, on all cores.

Other devices run plain torch, which gives the same bits; tests compare the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.bfp import Format
from compress.formats.bfp import unpack as unpack_bfp
from compress.formats.bitpack import packed_width, unpack
from compress.formats.compiled import empty, jit
from compress.formats.float4 import E2M1
from compress.formats.float4 import unpack as unpack_nibbles
from compress.formats.threads import in_threads

_TABLE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def groups(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """(q - zero) * scale in float32, rounded to the scales' dtype. Returns (rows, groups * group_size).

    packed: (rows, words) int32, as formats.bitpack lays it out. scales: (rows, groups) bf16, fp16 or fp32. zeros:
    (rows, groups) uint8, or None for 2**(bits - 1).
    """
    if packed.device.type != "cpu":
        return groups_torch(packed, scales, zeros, bits, group_size)
    rows, count = scales.shape
    _check_shape("packed", packed, (rows, packed_width(count * group_size, bits)))
    if zeros is not None:
        _check_shape("zeros", zeros, (rows, count))
    offsets = torch.full((rows, count), 1 << (bits - 1), dtype=torch.uint8) if zeros is None else zeros.contiguous()
    source = packed.contiguous().numpy().view(np.uint8)
    arguments = (source, scales.float().numpy(), offsets.numpy(), bits, group_size)
    return _run(_group_rows, rows, count * group_size, scales.dtype, arguments)


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
    rows, count = packed.shape[0], form.blocks(columns)
    _check_shape("packed", packed, (rows, form.row_bytes(columns)))
    _check_shape("exponents", exponents, (rows, count))
    zeros = np.full((rows, count), form.half, np.uint8)
    scales = form.steps()[exponents.int()].numpy()
    return _run(
        _group_rows,
        rows,
        columns,
        form.dtype,
        (packed.contiguous().numpy(), scales, zeros, form.bits, form.block_size),
    )


def e4m3(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """weight * scale in float32, rounded to `dtype`, by default the scales'.

    weight: (rows, columns) float8_e4m3fn. scales: (m, n), each for a block of rows x columns, the last of a row or
    column of blocks smaller.
    """
    if weight.device.type != "cpu":
        return e4m3_torch(weight, scales, block, dtype)
    rows, columns = weight.shape
    _check_shape("scales", scales, (-(-rows // block[0]), -(-columns // block[1])))
    arguments = (weight.contiguous().view(torch.uint8).numpy(), scales.float().numpy(), *block, _TABLE)
    return _run(_e4m3_rows, rows, columns, dtype or scales.dtype, arguments)


def e4m3_torch(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """`e4m3` in plain torch, on any device."""
    rows, columns = weight.shape
    spread = scales.float()
    if block[0] > 1 and scales.shape[0] > 1:
        spread = spread.repeat_interleave(block[0], 0)[:rows]
    if scales.shape[1] > 1:
        spread = spread.repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * spread).to(dtype or scales.dtype)


def e2m1(packed: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """code * scale in float32, rounded to `dtype`. Returns (rows, groups * group_size).

    packed: (rows, columns / 2) uint8, as formats.float4 lays it out. scales: (rows, groups) float32; group_size even.
    """
    if packed.device.type != "cpu":
        return e2m1_torch(packed, scales, group_size, dtype)
    rows, count = scales.shape
    _check_shape("packed", packed, (rows, count * group_size // 2))
    arguments = (packed.contiguous().numpy(), scales.float().contiguous().numpy(), group_size, E2M1.numpy())
    return _run(_e2m1_rows, rows, count * group_size, dtype, arguments)


def e2m1_torch(packed: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """`e2m1` in plain torch, on any device."""
    values = E2M1.to(packed.device)[unpack_nibbles(packed).long()]
    return (values * scales.float().repeat_interleave(group_size, 1)).to(dtype)


def _check_shape(name: str, tensor: Tensor, wanted: tuple[int, int]) -> None:
    # The compiled loops do not check their bounds.
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name}: the shape is {tuple(tensor.shape)}, and {wanted} is needed")


def _run(loop: Any, rows: int, columns: int, dtype: torch.dtype, arguments: tuple[Any, ...]) -> Tensor:
    """loop(start, stop, bits of the result, how many of them a float32 has more, *arguments) over all rows."""
    if dtype == torch.bfloat16:
        halves = empty((rows, columns), torch.int16)
        in_threads(loop, rows, rows * columns, halves.numpy().view(np.uint16), 16, *arguments)
        return halves.view(torch.bfloat16)
    floats = empty((rows, columns), torch.float32)
    in_threads(loop, rows, rows * columns, floats.numpy().view(np.uint32), 0, *arguments)
    return floats.to(dtype)


@jit
def store(values, out, dropped):  # type: ignore[no-untyped-def]
    """Puts float32 values into bits of float32 (dropped 0) or of bf16 (dropped 16, rounded half to even)."""
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF if dropped else 0)
    odd = np.uint32(1 if dropped else 0)
    for i in range(out.shape[0]):
        out[i] = (bits[i] + half + ((bits[i] >> np.uint32(16)) & odd)) >> np.uint32(dropped)


@jit
def _group_rows(start, stop, out, dropped, packed, scales, zeros, bits, group_size):  # type: ignore[no-untyped-def]
    columns = out.shape[1]
    codes = np.zeros(-(-columns // 32) * 32, np.uint8)
    values = np.empty(columns, np.float32)
    for row in range(start, stop):
        unpack_row(packed[row], bits, codes)
        for group in range(scales.shape[1]):
            scale, zero = scales[row, group], np.float32(zeros[row, group])
            for i in range(group * group_size, min((group + 1) * group_size, columns)):
                values[i] = (np.float32(codes[i]) - zero) * scale
        store(values, out[row], dropped)


@jit
def unpack_row(packed, bits, codes):  # type: ignore[no-untyped-def]
    """packed: bytes of one row. codes: room for whole octets of values; eight of them fill `bits` bytes."""
    if bits == 8:
        codes[: packed.shape[0]] = packed
        return
    if bits == 4:
        for i in range(packed.shape[0]):
            codes[2 * i] = packed[i] & np.uint8(15)
            codes[2 * i + 1] = packed[i] >> np.uint8(4)
        return
    mask = np.uint64((1 << bits) - 1)
    for octet in range(-(-packed.shape[0] // bits)):
        lane = np.uint64(0)
        for i in range(min(bits, packed.shape[0] - octet * bits)):
            lane |= np.uint64(packed[octet * bits + i]) << np.uint64(8 * i)
        for i in range(8):
            codes[8 * octet + i] = np.uint8((lane >> np.uint64(bits * i)) & mask)


@jit
def _e4m3_rows(start, stop, out, dropped, codes, scales, rows_per_scale, columns_per_scale, table):  # type: ignore[no-untyped-def]
    columns = out.shape[1]
    values = np.empty(columns, np.float32)
    for row in range(start, stop):
        for block in range(scales.shape[1]):
            first = block * columns_per_scale
            scale = scales[row // rows_per_scale, block]
            for i in range(first, min(first + columns_per_scale, columns)):
                values[i] = table[codes[row, i]] * scale
        store(values, out[row], dropped)


@jit
def _e2m1_rows(start, stop, out, dropped, packed, scales, group_size, table):  # type: ignore[no-untyped-def]
    values = np.empty(out.shape[1], np.float32)
    half = group_size // 2
    for row in range(start, stop):
        for group in range(scales.shape[1]):
            scale = scales[row, group]
            for i in range(group * half, (group + 1) * half):
                code = packed[row, i]
                values[2 * i] = table[code & np.uint8(15)] * scale
                values[2 * i + 1] = table[code >> np.uint8(4)] * scale
        store(values, out[row], dropped)
