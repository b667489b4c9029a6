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
from compress.formats.compiled import empty, jit, load64
from compress.formats.float4 import E2M1
from compress.formats.float4 import unpack as unpack_nibbles
from compress.formats.float8 import E4M3
from compress.formats.threads import in_threads
from compress.kernels.cpu_floats import widen
from compress.kernels.cpu_levels import LEVELS, take, take_groups

_NONE = np.empty(0, np.float32)


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
    arguments = (source, scales.float().numpy(), _NONE, offsets.numpy(), bits, group_size, _integers(bits))
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
    stored = packed.contiguous().numpy(), exponents.contiguous().numpy()
    arguments = (*stored, form.steps().numpy(), zeros, form.bits, form.block_size, _integers(form.bits))
    return _run(_group_rows, rows, columns, form.dtype, arguments)


def e4m3(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
    """weight * scale in float32, rounded to `dtype`, by default the scales'.

    weight: (rows, columns) float8_e4m3fn. scales: (m, n), each for a block of rows x columns, the last of a row or
    column of blocks smaller.
    """
    if weight.device.type != "cpu":
        return e4m3_torch(weight, scales, block, dtype)
    rows, columns = weight.shape
    _check_shape("scales", scales, (-(-rows // block[0]), -(-columns // block[1])))
    arguments = (weight.contiguous().view(torch.uint8).numpy(), scales.float().numpy(), *block, E4M3.numpy())
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


def e2m1(packed: Tensor, scales: Tensor, steps: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """code * scale in float32, rounded to `dtype`. Returns (rows, groups * group_size).

    packed: (rows, columns / 2) uint8, as formats.float4 lays it out. scales: (rows, groups) uint8, which stand for
    steps, (256,) float32; group_size even.
    """
    if packed.device.type != "cpu":
        return e2m1_torch(packed, scales, steps, group_size, dtype)
    rows, count = scales.shape
    _check_shape("packed", packed, (rows, count * group_size // 2))
    stored = packed.contiguous().numpy(), scales.contiguous().numpy(), steps.numpy(), np.zeros((rows, count), np.uint8)
    arguments = (*stored, 4, group_size, E2M1.numpy())
    return _run(_group_rows, rows, count * group_size, dtype, arguments)


def e2m1_torch(packed: Tensor, scales: Tensor, steps: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """`e2m1` in plain torch, on any device."""
    values = E2M1.to(packed.device)[unpack_nibbles(packed).long()]
    return (values * steps[scales.int()].repeat_interleave(group_size, 1)).to(dtype)


def _integers(bits: int) -> Any:
    """What codes of so many bits stand for, where that fits into a table."""
    return np.arange(LEVELS, dtype=np.float32) if 1 << bits <= LEVELS else _NONE


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


# Slices, and no sums as indices: for these numba asks whether they are below zero, and then nothing becomes a vector.
@jit
def _group_rows(start, stop, out, dropped, packed, scales, steps, zeros, bits, group_size, levels):  # type: ignore[no-untyped-def]
    """steps: what bytes of scales stand for; nothing where these are numbers. levels: what codes stand for, less zero;
    nothing where that is themselves."""
    columns, groups = out.shape[1], scales.shape[1]
    codes = np.zeros(-(-columns // 32) * 32, np.uint8)
    values = np.empty(columns, np.float32)
    factors, offsets = np.empty(groups, np.float32), np.empty(groups, np.float32)
    for row in range(start, stop):
        unpack_row(packed[row], bits, codes)
        for group in range(groups):
            factors[group] = steps[np.int64(scales[row, group])] if steps.shape[0] else scales[row, group]
            offsets[group] = zeros[row, group]
        first = take_groups(levels, codes, factors, offsets, group_size, out[row]) if dropped else 0
        for group in range(first, groups):
            scale, zero = factors[group], offsets[group]
            part = values[group * group_size : (group + 1) * group_size]
            chosen = codes[group * group_size : (group + 1) * group_size]
            for i in range(part.shape[0]):
                level = levels[chosen[i]] if levels.shape[0] else np.float32(chosen[i])
                part[i] = (level - zero) * scale
        store(values[first * group_size :], out[row, first * group_size :], dropped)


@jit
def unpack_row(packed, bits, codes):  # type: ignore[no-untyped-def]
    """packed: bytes of one row. codes: room for whole octets of values; eight of them fill `bits` bytes."""
    if bits == 8:
        for i in range(packed.shape[0]):
            codes[i] = packed[i]
        return
    if bits == 4:
        for i in range(packed.shape[0]):
            codes[2 * i] = packed[i] & np.uint8(15)
            codes[2 * i + 1] = packed[i] >> np.uint8(4)
        return
    # The upper half of eight codes moves up to bit 32, then of each four to bit 16, and of each two to bit 8.
    one, two, four = np.uint64(bits), np.uint64(2 * bits), np.uint64(4 * bits)
    ones, twos, fours = _ones(one, 16), _ones(two, 32), _ones(four, 64)
    octets, words = codes.shape[0] // 8, codes.view(np.uint64)
    whole = min(octets, max(0, packed.shape[0] - 8 + bits) // bits)  # of which 8 bytes lie in the row
    for octet in range(whole):
        lane = load64(packed, octet * bits)
        lane = (lane & fours) | ((lane >> four & fours) << np.uint64(32))
        lane = (lane & twos) | ((lane >> two & twos) << np.uint64(16))
        words[octet] = (lane & ones) | ((lane >> one & ones) << np.uint64(8))
    for octet in range(whole, -(-packed.shape[0] // bits)):
        lane = np.uint64(0)
        for i in range(min(bits, packed.shape[0] - octet * bits)):
            lane |= np.uint64(packed[octet * bits + i]) << np.uint64(8 * i)
        for i in range(8):
            codes[8 * octet + i] = np.uint8((lane >> np.uint64(bits * i)) & ((np.uint64(1) << one) - np.uint64(1)))


@jit
def _ones(count, every):  # type: ignore[no-untyped-def]
    """64 bits, of which in every so many the lowest `count` are set."""
    found = np.uint64(0)
    for place in range(0, 64, every):
        found |= ((np.uint64(1) << count) - np.uint64(1)) << np.uint64(place)
    return found


@jit
def _e4m3_rows(start, stop, out, dropped, codes, scales, rows_per_scale, columns_per_scale, levels):  # type: ignore[no-untyped-def]
    """levels: what each code stands for."""
    columns, edge, words = out.shape[1], np.zeros(32, np.uint8), np.empty(256, np.uint16)
    values = np.empty(columns + 32, np.float32)
    for row in range(start, stop):
        if dropped and scales.shape[1] == 1 and columns >= words.shape[0]:
            store(levels * scales[row // rows_per_scale, 0], words, dropped)
            take(words, codes[row], out[row])
            continue
        done = widen(codes[row], values, columns)
        rest = codes[row, done:]
        for i in range(rest.shape[0]):
            edge[i] = rest[i]
        widen(edge, values[done:], 32)
        for block in range(scales.shape[1]):
            first = block * columns_per_scale
            part, scale = values[first : first + columns_per_scale], scales[row // rows_per_scale, block]
            for i in range(part.shape[0]):
                part[i] *= scale
        store(values, out[row], dropped)
