"""NF4 (QLoRA, arXiv:2305.14314): each block of a flattened weight as its largest magnitude and 4-bit levels of it.

And its double quantization: those magnitudes, less their mean, as 8-bit "dynamic" floats (arXiv:1511.04561) in blocks
of 256. On the CPU, the first compiled with numba; the same bits as bitsandbytes, but for what `nest` says.
"""

import numpy as np
import torch
from torch import Tensor

from compress.formats.compiled import empty, float_bits, jit
from compress.formats.threads import in_threads

# The paper's appendix E: quantiles of a normal distribution, scaled to -1..1, with an exact zero.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
NESTED_BLOCK = 256
_BOUNDS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
_SMALLEST = np.float32(1e-38)  # a block's reciprocal stays finite


def encode(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """weight: bf16, fp16 or fp32 of any shape, finite. block_size: even.

    Returns (ceil(count / 2), 1) uint8, the first of each two codes in the high bits, and (blocks,) float32, the largest
    magnitudes; a value between two levels goes to the nearer one, halfway to the lower.
    """
    source, shift = float_bits(weight)
    blocks = -(-weight.numel() // block_size)
    packed, absmax = empty((-(-weight.numel() // 2), 1), torch.uint8), empty((blocks,), torch.float32)
    arguments = (source.ravel(), shift, block_size, packed.view(-1).numpy(), absmax.numpy())
    in_threads(_encode_blocks, blocks, weight.numel(), *arguments)
    return packed, absmax


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """absmax: (blocks,) float32. Returns (blocks,) uint8 codes, (ceil(blocks / 256),) float32, and the mean.

    The mean is summed in float64, because a sum in float32 would depend on the number of threads; and each code is the
    nearest one, as in bitsandbytes on a GPU (its CPU code looks it up in a table of 65536 values).
    """
    offset = absmax.double().mean().float()
    count = absmax.numel()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(dim=1)
    levels = dynamic_levels()
    scaled = blocks * (1 / largest.clamp(min=float(_SMALLEST)))[:, None]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return codes.view(-1)[:count].contiguous(), largest, offset.item()


def dynamic_levels() -> Tensor:
    """(256,) float32, ascending: 0, 1, and in each of seven decades half as many equal steps as in the one above."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decades.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


@jit
def _encode_blocks(start, stop, source, shift, block_size, packed, absmax):  # type: ignore[no-untyped-def]
    scaled = np.zeros(block_size, np.float32)
    codes = np.empty(block_size, np.uint8)
    for block in range(start, stop):
        part = source[block * block_size : (block + 1) * block_size]
        largest = _largest(part, shift)
        if part.shape[0] == block_size:
            inverse = np.float32(1) / max(largest, _SMALLEST)
            for i in range(block_size):
                scaled[i] = np.uint32(np.uint32(part[i]) << shift).view(np.float32) * inverse
        else:  # the last one, which bitsandbytes divides
            largest = max(largest, _SMALLEST)
            scaled[:] = 0
            for i in range(part.shape[0]):
                scaled[i] = np.uint32(np.uint32(part[i]) << shift).view(np.float32) / largest
        absmax[block] = largest
        _codes(scaled, codes)
        line = packed[block * block_size // 2 : (block + 1) * block_size // 2]
        for i in range(line.shape[0]):
            line[i] = np.uint8(codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]


@jit
def _largest(part, shift):  # type: ignore[no-untyped-def]
    """Without their sign, floats order as integers do, and integers have the faster maximum."""
    largest = np.uint32(0)
    for i in range(part.shape[0]):
        largest = max(largest, np.uint32(np.uint32(np.uint32(part[i]) << shift) & np.uint32(0x7FFFFFFF)))
    return np.uint32(largest).view(np.float32)


@jit
def _codes(scaled, codes):  # type: ignore[no-untyped-def]
    """The number of bounds that lie below each value."""
    for i in range(scaled.shape[0]):
        code = np.uint8(0)
        for j in range(15):
            code += np.uint8(scaled[i] > _BOUNDS[j])
        codes[i] = code
