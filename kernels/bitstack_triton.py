"""bitstack on a GPU, in Triton: decoding, and y = x @ W.T from packed planes, for any rank and any number of blocks.

To multiply, W is made in registers, a tile at a time, and never written to memory. The planes stay where they are, each
in a tensor of its own: a kernel is given their addresses, so that blocks come and go without a copy of the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels import bitstack_kernels, prepared, signs_kernels, sums
from compress.kernels.bitstack import FLOOR, Planes
from compress.kernels.prepared import stages

FUSED_TOKENS = 128  # for more, W is better decoded once
BLOCK_N = 32
BLOCK_K = {True: 128, False: 64}  # bfloat16 or not: a float32 dot is one of plain multiplications, and needs registers
RANKS = 16  # of the factors that are multiplied at once
FLIPPED_PLANES = 3  # signs are flipped for twice as many matrices with every plane more
DECODED = {"BLOCK_N": 8, "BLOCK_K": 1024}  # a thread has eight columns of all rows, and reads v once for them


def decode(stack: Planes) -> Tensor:
    """(N, K) in the stack's dtype: the bits that `bitstack.decode_torch` gives."""
    n, k = stack.shape
    out = torch.empty(n, k, dtype=stack.dtype, device=stack.u.device)
    if out.numel():
        with torch.cuda.device_of(out):
            bitstack_kernels.decode[(triton.cdiv(n, DECODED["BLOCK_N"]), triton.cdiv(k, DECODED["BLOCK_K"]))](
                *_parts(stack),
                out,
                n,
                k,
                len(stack.planes),
                stack.u.shape[1],
                FLOOR=FLOOR,
                LARGEST=torch.finfo(stack.dtype).max,
                **DECODED,
                num_warps=4,
            )
    return out


def linear(x: Tensor, stack: Planes, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias, summed in float32 in an order that depends on the shapes alone.

    x: (..., K) bf16, fp16 or fp32, on the device of the planes. Returns (..., N) in the dtype of x.
    """
    n, k = stack.shape
    if x.shape[-1] != k or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x: is {tuple(x.shape)} {x.dtype}; (..., {k}) bfloat16, float16 or float32 is needed")
    if x.device != stack.u.device:
        raise ValueError(f"x: is on {x.device}; move it to {stack.u.device}, where the weight is")
    flat = x.reshape(-1, k).contiguous()
    m, narrow = flat.shape[0], x.dtype == torch.bfloat16
    if narrow and _flips(stack):
        return sums.finish(_flipped(flat, stack), bias, x.dtype).view(*x.shape[:-1], n)
    block_m = min(64 if narrow else 16, max(16, triton.next_power_of_2(m)))
    grid, partial = sums.shared(flat, n, (block_m, BLOCK_N, BLOCK_K[narrow]))
    if partial.numel():
        with torch.cuda.device_of(x):
            bitstack_kernels.matmul[grid](
                *_parts(stack),
                flat,
                partial,
                m,
                n,
                k,
                len(stack.planes),
                stack.u.shape[1],
                FLOOR=FLOOR,
                DOT=tl.bfloat16 if narrow else tl.float32,
                BLOCK_M=block_m,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K[narrow],
                R=RANKS,
                SPLIT=len(partial),
                num_warps=4,
                num_stages=stages(2),
            )
    return sums.finish(partial, bias, x.dtype).view(*x.shape[:-1], n)


def _flips(stack: Planes) -> bool:
    """Whether the planes are few, and whole words that can be read as such."""
    aligned = stack.shape[1] % 32 == 0 and all(plane.data_ptr() % 4 == 0 for plane in stack.planes)
    return aligned and len(stack.planes) <= FLIPPED_PLANES and not prepared.ROCM


def _flipped(x: Tensor, stack: Planes) -> Tensor:
    """x: (M, K) bfloat16. Returns (split, M, N) float32, to be added up."""
    (n, k), m = stack.shape, len(x)
    tile = _flipped_tile(m)
    grid, partial = sums.shared(x, n, (tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]))
    if partial.numel():
        with torch.cuda.device_of(x):
            signs_kernels.product[grid](
                *_parts(stack),
                x,
                partial,
                m,
                n,
                k,
                stack.u.shape[1],
                COUNT=len(stack.planes),
                RANKS=triton.cdiv(stack.u.shape[1], RANKS),
                FLOOR=FLOOR,
                NATIVE=x.is_cuda,
                SPLIT=len(partial),
                **tile,
                num_warps=4,
                num_stages=4,  # the planes of a tile are 2 KiB: many must be on their way
            )
    return partial


def _flipped_tile(tokens: int) -> dict[str, int]:
    """Of a program: a thread that multiplies matrices has whole words of signs if a row has four."""
    return {"BLOCK_M": min(32, max(8, triton.next_power_of_2(tokens))), "BLOCK_N": 64, "BLOCK_K": 128}


def _parts(stack: Planes) -> tuple[Tensor | None, ...]:
    return (stack if stack.addresses is not None else stack.located()).addresses, stack.u, stack.v, stack.levels
