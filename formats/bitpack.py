"""Dense little-endian bit streams: 1 to 8 bits a value, as compressed-tensors 0.20 `pack-quantized` stores them.

Value i of a row starts at bit i * bits of that row, low bits first, and may straddle two words; the last word is
zero-padded. Eight values fill exactly `bits` bytes, so octets are squeezed inside one 64-bit lane: pairs, quads, octet.
"""

import torch
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """How many int32 words a row of `count` values takes."""
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """values: (rows, count) uint8, each below 2**bits. Returns (rows, ceil(count * bits / 32)) int32."""
    _check(values, torch.uint8, "values", bits)
    rows, count = values.shape
    # Whole octets of words: every path below works on full 64-bit lanes, and the surplus is cut off at the end.
    padded = values.new_zeros(rows, -(-count // 32) * 32)
    padded[:, :count] = values
    words = packed_width(count, bits)
    if not values.numel():
        return values.new_zeros(rows, words, dtype=torch.int32)
    return _squeeze(padded, bits).view(torch.int32)[:, :words].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """packed: (rows, ceil(count * bits / 32)) int32 from `pack`. Returns (rows, count) uint8."""
    _check(packed, torch.int32, "packed", bits)
    rows, words = packed.shape
    if words != packed_width(count, bits):
        wanted = packed_width(count, bits)
        raise ValueError(f"packed: {count} values of {bits} bits take {wanted} words a row, not {words}")
    if not packed.numel():
        return packed.new_zeros(rows, count, dtype=torch.uint8)
    padded = packed.new_zeros(rows, -(-count // 32) * bits)
    padded[:, :words] = packed
    return _stretch(padded.view(torch.uint8), bits)[:, :count].contiguous()


def _check(tensor: Tensor, dtype: torch.dtype, name: str, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: {bits} is not in 1..8")
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise ValueError(f"{name}: a 2-D {dtype} tensor is needed, not {tensor.ndim}-D {tensor.dtype}")


def _squeeze(values: Tensor, bits: int) -> Tensor:
    """values: (rows, 32 * n) uint8. Returns (rows, 4 * bits * n) uint8."""
    rows, count = values.shape
    if bits == 8:
        return values
    if bits in (2, 4):
        parts = values.view(rows, count * bits // 8, 8 // bits)
        packed = parts[..., 0].clone()
        for i in range(1, 8 // bits):
            packed |= parts[..., i] << (bits * i)
        return packed
    lanes = values.view(torch.int64)
    for width in (8, 16, 32):  # two neighbours of `kept` bits each, `width` apart, move together
        kept = bits * width // 8
        low = _repeated_mask(kept, 2 * width)
        lanes = (lanes & low) | ((lanes >> (width - kept)) & (low << kept))
    return lanes.view(torch.uint8).view(rows, count // 8, 8)[..., :bits].reshape(rows, count // 8 * bits).contiguous()


def _stretch(packed: Tensor, bits: int) -> Tensor:
    """packed: (rows, 4 * bits * n) uint8. Returns (rows, 32 * n) uint8: `_squeeze` in reverse."""
    rows, size = packed.shape
    if bits == 8:
        return packed
    if bits in (2, 4):
        shifts = range(0, 8, bits)
        return torch.stack([(packed >> s) & (2**bits - 1) for s in shifts], dim=-1).view(rows, size * 8 // bits)
    octets = packed.new_zeros(rows, size // bits, 8)
    octets[..., :bits] = packed.view(rows, size // bits, bits)
    lanes = octets.view(torch.int64)
    for width in (32, 16, 8):
        kept = bits * width // 8
        low = _repeated_mask(kept, 2 * width)
        lanes = (lanes & low) | ((lanes << (width - kept)) & (low << width))
    return lanes.view(torch.uint8).view(rows, size // bits * 8)


def _repeated_mask(bits: int, period: int) -> int:
    """The low `bits` bits of every `period` bits of a 64-bit lane."""
    return sum((2**bits - 1) << start for start in range(0, 64, period))
