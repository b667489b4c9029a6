"""Block floating point: blocks of signed mantissas that share an 8-bit exponent (arXiv:2403.20137; d-Matrix's BFP12 and
BFP16 are those of 4 and 8 bits).

Blocks run along a row; the last one may be short. A mantissa has no hidden bit: of `bits` bits, the sign among them, it
stands for mantissa * 2**(exponent - 127 - (bits - 2)). It is stored with 2**(bits - 1) added, low bits first as
formats.bitpack has it, in whole bytes a row. Exponent 255 marks a block with a NaN or an infinity in it, which comes
back as NaN. Compiled with numba on the CPU, plain torch elsewhere; the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats import bitpack
from compress.formats.compiled import float_bits, jit
from compress.formats.threads import in_threads

BIAS = 127
INFINITY = np.int32(0x7F800000)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Format:
    """Mantissas of 2 to 8 bits, `block_size` of them to an exponent, for values of `dtype`.

    full_range: mantissas from -2**(bits - 1); otherwise as many below zero as above.
    """

    bits: int
    block_size: int
    full_range: bool
    dtype: torch.dtype

    @property
    def half(self) -> int:
        """What is added to a mantissa where it is stored; and the largest mantissa plus one."""
        return 1 << (self.bits - 1)

    @property
    def lowest(self) -> int:
        """The least exponent: its step is the least normal float32."""
        return self.bits - 1

    @property
    def top(self) -> int:
        """The largest exponent of a number of `dtype`. With it no mantissa is -2**(bits - 1), which would overflow."""
        return math.frexp(torch.finfo(self.dtype).max)[1] - 1 + BIAS

    def steps(self, device: torch.device | str = "cpu") -> Tensor:
        """(256,) float32: what a mantissa of 1 stands for, by exponent."""
        steps = torch.ldexp(torch.ones(256), torch.arange(256) - (BIAS + self.bits - 2))
        steps[255] = torch.nan
        return steps.to(device)

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block_size)

    def row_bytes(self, columns: int) -> int:
        return -(-columns * self.bits // 8)


def shared_exponents(values: Tensor, form: Format) -> Tensor:
    """values: (rows, columns) bf16, fp16 or fp32. Returns (rows, blocks) uint8.

    The least exponent whose range holds the block without what rounding adds: floor(log2(largest magnitude)); with
    full_range one less for a negative largest one that is a power of two.
    """
    _check(values)
    rows, columns = values.shape
    if values.device.type != "cpu":
        return shared_exponents_torch(values, form)
    exponents = np.empty((rows, form.blocks(columns)), np.uint8)
    source, shift = float_bits(values)
    options = (shift, form.block_size, int(form.full_range), form.lowest)
    in_threads(_exponents_of_rows, rows, values.numel(), source, options, exponents)
    return torch.from_numpy(exponents)


def shared_exponents_torch(values: Tensor, form: Format) -> Tensor:
    """`shared_exponents` in plain torch, on any device."""
    bits = _in_blocks(values.detach().float(), form).view(torch.int32)
    keys = bits & 0x7FFFFFFF
    keys -= ((bits < 0) & (keys < int(INFINITY))).int() * int(form.full_range)
    if not keys.numel():
        return keys.new_zeros(len(values), keys.shape[1], dtype=torch.uint8)
    return (keys.amax(2) >> 23).clamp(min=form.lowest).to(torch.uint8)


def nearest_exponents(values: Tensor, form: Format) -> Tensor:
    """Of `shared_exponents`, one more and one less, each block's with the least squared error; (rows, blocks) uint8."""
    first = shared_exponents(values, form)
    exact = _in_blocks(values.float(), form) / form.steps(values.device)[first.int()][..., None]
    chosen, least = first, torch.full(first.shape, torch.inf, device=values.device)
    for step in (0, 1, -1):
        tried = torch.where(first < 255, (first.int() + step).clamp(form.lowest, form.top), 255).to(torch.uint8)
        mantissas = _in_blocks(codes(values, tried, form).float() - form.half, form)
        ratio = torch.ldexp(torch.ones_like(least), tried.int() - first.int())
        errors = (mantissas * ratio[..., None] - exact).square().sum(2)  # in first steps: no overflow
        chosen = torch.where(errors < least, tried, chosen)
        least = torch.minimum(errors, least)
    return chosen


def pack(values: Tensor, exponents: Tensor, form: Format) -> Tensor:
    """Mantissas, rounded half to even and clipped. Returns (rows, ceil(columns * bits / 8)) uint8.

    values: (rows, columns) bf16, fp16 or fp32. exponents: (rows, blocks) uint8, `lowest` or more.
    """
    packed = bitpack.pack(codes(values, exponents, form), form.bits).view(torch.uint8)
    return packed[:, : form.row_bytes(values.shape[1])].contiguous()


def codes(values: Tensor, exponents: Tensor, form: Format) -> Tensor:
    """What `pack` packs: mantissas plus 2**(bits - 1), (rows, columns) uint8."""
    _check(values)
    rows, columns = values.shape
    if tuple(exponents.shape) != (rows, form.blocks(columns)):
        raise ValueError(f"exponents: {(rows, form.blocks(columns))} are needed, not {tuple(exponents.shape)}")
    if values.device.type != "cpu":
        return codes_torch(values, exponents, form)
    found = torch.empty(rows, columns, dtype=torch.uint8)
    source, shift = float_bits(values)
    options = (shift, form.block_size, np.float32(form.half), form.full_range, form.top)
    inverses = (1 / form.steps()).numpy()
    arguments = (source, options, inverses, exponents.contiguous().numpy(), found.numpy())
    in_threads(_codes_of_rows, rows, values.numel(), *arguments)
    return found


def codes_torch(values: Tensor, exponents: Tensor, form: Format) -> Tensor:
    """`codes` in plain torch, on any device."""
    spread = _spread(exponents, form, values.shape[1]).int()
    mantissas = (values.detach().float() / form.steps(values.device)[spread]).round()
    least = torch.where((spread < form.top) & form.full_range, -form.half, 1 - form.half)
    return (mantissas.clamp(max=form.half - 1).maximum(least).nan_to_num(0) + form.half).to(torch.uint8)


def unpack(packed: Tensor, exponents: Tensor, form: Format, columns: int) -> Tensor:
    """mantissa * step in float32, rounded to the form's dtype: (rows, columns). `kernels.decode.bfp` is faster."""
    codes = bitpack.unpack(words(packed), form.bits, columns)
    steps = form.steps(packed.device)[_spread(exponents, form, columns).int()]
    return ((codes.float() - form.half) * steps).to(form.dtype)


def words(packed: Tensor) -> Tensor:
    """packed: (rows, bytes) uint8. Returns it as formats.bitpack has it, in whole int32 words a row."""
    return F.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)


def _spread(exponents: Tensor, form: Format, columns: int) -> Tensor:
    return exponents.repeat_interleave(form.block_size, 1)[:, :columns]


def _in_blocks(values: Tensor, form: Format) -> Tensor:
    """(rows, columns) as (rows, blocks, block_size), with zeros after the last column."""
    padded = F.pad(values, (0, -values.shape[1] % form.block_size))
    return padded.view(len(values), form.blocks(values.shape[1]), form.block_size)


def _check(values: Tensor) -> None:
    if values.ndim != 2 or values.dtype not in _DTYPES:
        raise ValueError(f"values: a 2-D bf16, fp16 or fp32 tensor is needed, not {values.ndim}-D {values.dtype}")


@jit
def _exponents_of_rows(start, stop, source, options, exponents):  # type: ignore[no-untyped-def]
    shift, size, full_range, lowest = options
    for row in range(start, stop):
        for block in range(exponents.shape[1]):
            part = source[row, block * size : (block + 1) * size]
            largest = np.int32(0)
            for i in range(part.shape[0]):
                bits = np.int32(np.uint32(part[i]) << shift)
                magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
                # One less of a negative number: its power of two then has the exponent below.
                below = np.int32(full_range if bits < 0 and magnitude < INFINITY else 0)
                largest = max(largest, np.int32(magnitude - below))
            exponents[row, block] = max(largest >> np.int32(23), lowest)


@jit
def _codes_of_rows(start, stop, source, options, inverses, exponents, codes):  # type: ignore[no-untyped-def]
    shift, size, half, full_range, top = options
    for row in range(start, stop):
        for block in range(exponents.shape[1]):
            exponent = exponents[row, block]
            least = -half if full_range and exponent < top else np.float32(1) - half
            part = source[row, block * size : (block + 1) * size]
            stored = codes[row, block * size : (block + 1) * size]
            if exponent == 255:
                stored[:] = np.uint8(half)
            else:
                _codes(part, shift, inverses[exponent], least, half, stored)


@jit
def _codes(source, shift, inverse, least, half, codes):  # type: ignore[no-untyped-def]
    for i in range(source.shape[0]):
        value = np.uint32(np.uint32(source[i]) << shift).view(np.float32) * inverse
        codes[i] = np.uint8(np.int32(min(max(np.rint(value), least), half - np.float32(1)) + half))
