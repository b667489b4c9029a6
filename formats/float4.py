"""E2M1 (OCP 4-bit float: 2 exponent bits, 1 mantissa bit) and E8M0 (OCP 8-bit exponents, for scales).

Codes are 0 to 15 with the sign in bit 3, two to a byte, the even column in the low nibble, as compressed-tensors and
NVIDIA's kernels read them. Compiled with numba on the CPU, plain torch elsewhere; the same bytes.
"""

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import float_bits, jit
from compress.formats.threads import in_threads

E2M1_MAX = 6.0
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E8M0 = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
E8M0[255] = torch.nan
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def to_e2m1(weight: Tensor, scales: Tensor) -> Tensor:
    """weight: (rows, columns) bf16, fp16 or fp32. Returns codes, (rows, columns) uint8.

    scales: (rows, groups) float32, positive, each for columns / groups neighbours. The value coded is weight / scale
    rounded to float32, clamped to +-6, then rounded half to even; a zero keeps its sign. A NaN becomes 6.
    """
    if weight.ndim != 2 or weight.dtype not in _DTYPES:
        raise ValueError(f"weight: a 2-D bf16, fp16 or fp32 tensor is needed, not {weight.ndim}-D {weight.dtype}")
    rows, columns = weight.shape
    if scales.ndim != 2 or scales.shape[0] != rows or columns % max(1, scales.shape[1]):
        raise ValueError(f"scales: {tuple(scales.shape)} are no groups along the rows of {(rows, columns)}")
    if not bool((scales > 0).all()):
        raise ValueError("scales: all must be positive; store 1 for a group of zeros")
    if weight.device.type != "cpu":
        return to_e2m1_torch(weight, scales)
    source, shift = float_bits(weight)
    codes = np.empty((rows, columns), np.uint8)
    in_threads(_encode_rows, rows, weight.numel(), source, shift, scales.float().contiguous().numpy(), codes)
    return torch.from_numpy(codes)


def to_e2m1_torch(weight: Tensor, scales: Tensor) -> Tensor:
    """`to_e2m1` in plain torch, on any device."""
    if not weight.numel():
        return torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    values = weight / scales.float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    magnitudes = values.abs().nan_to_num(E2M1_MAX).clamp(max=E2M1_MAX)
    steps = 0.5 * (1 + (magnitudes >= 2).float() + 2 * (magnitudes >= 4).float())
    rounded = torch.round(magnitudes / steps) * steps
    codes = torch.searchsorted(E2M1[:8].to(weight.device), rounded).to(torch.uint8)
    return codes | (values.signbit() & ~values.isnan()).to(torch.uint8) << 3


def pack(codes: Tensor) -> Tensor:
    """codes: (rows, columns) uint8 below 16, columns even. Returns (rows, columns / 2) uint8."""
    if codes.shape[1] % 2:
        raise ValueError(f"codes: {codes.shape[1]} columns do not fill bytes; an even number does")
    pairs = codes.contiguous().view(torch.int16)
    return (pairs | pairs >> 4).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """packed: (rows, columns / 2) uint8. Returns codes, (rows, columns) uint8."""
    pairs = packed.to(torch.int16)
    return ((pairs | pairs << 4) & 0x0F0F).view(torch.uint8)


def floor_exponent(values: Tensor) -> Tensor:
    """floor(log2(value)) of normal positive float32 numbers, int32; -127 for what is smaller, and for 0."""
    return (values.view(torch.int32) >> 23) - 127


@jit
def _encode_rows(start, stop, source, shift, scales, codes):  # type: ignore[no-untyped-def]
    size = source.shape[1] // max(1, scales.shape[1])
    spread = np.empty(source.shape[1], np.float32)
    for row in range(start, stop):
        for group in range(scales.shape[1]):
            spread[group * size : (group + 1) * size] = scales[row, group]
        _encode(source[row], shift, spread, codes[row])


@jit
def _encode(source, shift, scales, codes):  # type: ignore[no-untyped-def]
    for i in range(source.shape[0]):
        bits = np.float32(np.uint32(np.uint32(source[i]) << shift).view(np.float32) / scales[i]).view(np.uint32)
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        clamped = np.uint32(min(magnitude, np.uint32(0x40C00000)))  # 6
        # 22 mantissa bits fewer, the exponent's bias 1 instead of 127
        odd = np.uint32(clamped >> np.uint32(22)) & np.uint32(1)
        rounded = np.uint32(np.uint32(clamped + np.uint32(0x1FFFFF) + odd) >> np.uint32(22))
        normal = np.uint32(rounded - np.uint32((127 - 1) << 1))
        # Below 1 E2M1's step is 1/2, and so is float32's at 2**22, where the addition rounds and leaves a count.
        sum_bits = np.float32(np.uint32(clamped).view(np.float32) + np.float32(2.0**22)).view(np.uint32)
        small = np.uint32(sum_bits - np.uint32(0x4A800000))
        code = np.uint32(small if clamped < np.uint32(0x3F800000) else normal)
        sign = np.uint32(bits >> np.uint32(28)) & np.uint32(8 if magnitude <= np.uint32(0x7F800000) else 0)
        codes[i] = np.uint8(code | sign)
