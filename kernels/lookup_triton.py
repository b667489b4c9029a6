"""Codebooks on a GPU, in Triton: decoding, and for a few tokens y = x @ W.T that never writes W to memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels import lookup_kernels as kernels
from compress.kernels import permuted_kernels, prepared, sums
from compress.kernels.lookup import Lookup

FUSED_TOKENS = 64  # of more, the product of a decoded weight is faster than looking up again for every 64
_X = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def decode(weight: Lookup) -> Tensor:
    """(N, K), each a level, or level * scale in float32, rounded to the weight's dtype."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=weight.dtype, device=weight.indices.device)
    block_n, block_k = _tile(weight, 16, 128)
    grid = (triton.cdiv(n, block_n), triton.cdiv(k, block_k))
    _launch(kernels.decode, grid, *_parts(weight), out, n, k, *_sizes(weight), BLOCK_N=block_n, BLOCK_K=block_k)
    return out


def linear(x: Tensor, weight: Lookup, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias, summed in float32. For more than FUSED_TOKENS tokens, decode and multiply instead.

    x: (..., K) bf16, fp16 or fp32, on the weight's device. bias: (N,). Returns (..., N) in the dtype of x.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: has {x.shape[-1]} features, and the weight's in_features is {k}")
    flat = x.reshape(-1, k).contiguous()
    tokens = len(flat)
    if _permutes(x.dtype, weight):
        return sums.finish(_permuted(flat, weight), bias, x.dtype).view(*x.shape[:-1], n)
    block_m = 1 if tokens == 1 else 16 if tokens <= 16 else 64
    block_n, block_k = _tile(weight, *((8, 128) if block_m == 1 else (64, 64)))
    grid, partial = sums.shared(flat, n, (block_m, block_n, block_k))
    if partial.numel():
        _launch(
            kernels.product,
            grid,
            *_parts(weight),
            flat,
            partial,
            tokens,
            n,
            k,
            *_sizes(weight),
            DOT=_X[x.dtype],
            SPLIT=len(partial),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return sums.finish(partial, bias, x.dtype).view(*x.shape[:-1], n)


def _permutes(dtype: torch.dtype, weight: Lookup) -> bool:
    """Whether the levels that a thread needs fit in its registers and are of the dtype that matrices are made of."""
    alone = weight.scales is None and weight.indices.dim() == 2 and not prepared.ROCM
    return alone and 2 <= weight.bits <= 4 and dtype.itemsize == 2 and dtype == weight.tables.dtype


def _permuted(x: Tensor, weight: Lookup) -> Tensor:
    """x: (M, K). Returns (split, M, N) float32, to be added up."""
    (n, k), tokens = weight.shape, len(x)
    tile = _permuted_tile(tokens)
    grid, partial = sums.shared(x, n, (tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]))
    if partial.numel():
        with torch.cuda.device_of(x):
            permuted_kernels.product[grid](
                weight.indices,
                weight.tables.view(torch.uint32),
                x,
                partial,
                tokens,
                n,
                k,
                weight.indices.shape[1],
                weight.rows,
                BITS=weight.bits,
                NATIVE=x.is_cuda,
                SPLIT=len(partial),
                **tile,
                num_warps=tile["BLOCK_N"] // 16,
                num_stages=3,
            )
    return partial


def _permuted_tile(tokens: int) -> dict[str, int]:
    """Of a program, with a warp for every 16 rows: more, and a thread would hold too many tables."""
    block_m = min(64, max(8, triton.next_power_of_2(tokens)))
    return {"BLOCK_M": block_m, "BLOCK_N": 128 if block_m == 64 else 64, "BLOCK_K": 128}


def _tile(weight: Lookup, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile, which lies within a block; of packed codes that straddle words, a unit a thread."""
    if weight.scales is not None:
        columns = min(columns, weight.columns & -weight.columns)
    if weight.indices.dim() == 2 and 32 % weight.bits:
        rows = 32 * 128 // columns
    return rows, columns


def _parts(weight: Lookup) -> tuple[Tensor, ...]:
    missing = weight.tables  # a pointer that nothing is loaded from
    return weight.indices, weight.tables, *(missing if p is None else p for p in (weight.scales, weight.selector))


def _sizes(weight: Lookup) -> tuple[Any, ...]:
    words, planes = weight.indices.shape[-1], weight.indices.dim() == 3
    blocks = 1 if weight.scales is None else weight.scales.shape[1]
    apart = weight.indices[0].numel() if planes else 0
    columns = 1 if weight.scales is None else weight.columns
    return words, apart, blocks, weight.rows, columns, weight.bits, planes, weight.scales is not None, weight.swapped


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Triton launches on the current device, whatever the first of the arguments, a tensor, lies on."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options, num_warps=4)
