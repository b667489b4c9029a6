"""Integers and small floats with scales on a GPU, in Triton: decoding, and y = x @ W.T without W in memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels import groups_kernels as kernels
from compress.kernels import prepared, sums
from compress.kernels.groups import Groups

PROGRAMS = 528  # a grid of so many gives each of an H200's 132 multiprocessors four
FUSED_TOKENS = 256  # W is unpacked anew for every 128 of them
_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def decode(weight: Groups) -> Tensor:
    """(N, K): code * scale in float32, rounded to the weight's dtype."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=weight.dtype, device=weight.codes.device)
    scales, form = weight.scales, weight.scale_form
    if weight.divisor != 1:
        scales, form = weight.divided(), "float"
    if out.numel():
        grid = (triton.cdiv(n, 8), triton.cdiv(k, 512))
        with torch.cuda.device_of(out):
            kernels.decode[grid](
                weight.codes,
                scales,
                weight.zeros,
                out,
                *_sizes(weight),
                weight.columns,
                FORM=weight.form,
                BITS=weight.bits,
                SCALES=form,
                BLOCK_N=8,
                BLOCK_K=512,
                num_warps=4,
            )
    return out


def linear(x: Tensor, weight: Groups, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias, summed in float32. For more than FUSED_TOKENS tokens, decode and multiply instead.

    x: (..., K) bf16, fp16 or fp32, on the weight's device. bias: (N,). Returns (..., N) in the dtype of x.
    """
    n, k = weight.shape
    if x.shape[-1] != k or x.dtype not in _DOT:
        raise ValueError(f"x: is {tuple(x.shape)} {x.dtype}; (..., {k}) bfloat16, float16 or float32 is needed")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != weight.codes.device:
            raise ValueError(f"{name}: is on {tensor.device}; move it to {weight.codes.device}, where the weight is")
    flat = x.reshape(-1, k).contiguous()
    tokens = len(flat)
    where, tile = _tiles(weight, tokens, x.dtype != torch.float32)
    across, down = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(tokens, tile["BLOCK_M"])
    steps = triton.cdiv(k, tile["BLOCK_K"])
    split = max(1, min(PROGRAMS // max(1, across * down), steps // 4))
    dtype = x.dtype if split == 1 else torch.float32
    y = torch.empty(split, tokens, n, dtype=dtype, device=x.device)
    if y.numel():
        with torch.cuda.device_of(flat):
            kernels.product[(across, down, split)](
                weight.codes,
                weight.scales,
                weight.zeros,
                flat,
                bias if split == 1 else None,
                y,
                tokens,
                *_sizes(weight),
                1 / weight.divisor,
                FORM=weight.form,
                BITS=weight.bits,
                GROUP=weight.columns,
                SCALES=weight.scale_form,
                WHERE=where,
                DOT=_DOT[x.dtype],
                SPLIT=split,
                **tile,
                num_warps=8 if tile["BLOCK_M"] > 64 else 4,
                num_stages=prepared.stages(3),
            )
    y = y[0] if split == 1 else sums.finish(y, bias, x.dtype)
    return y.view(*x.shape[:-1], n)


def _tiles(weight: Groups, tokens: int, narrow: bool) -> tuple[str, dict[str, int]]:
    """Where scales are applied (see groups_kernels.py), and the tile of a program."""
    wide = 128 if narrow else 32  # a float32 dot is one of plain multiplications, which needs registers
    whole = next((size for size in (wide, wide // 2) if size >= weight.unit and weight.columns % size == 0), 0)
    if weight.scales.shape[1] == 1:
        where, block_k = "rows", wide
    elif whole:
        where, block_k = "sums", whole
    else:
        few = tokens <= 16 and weight.bits <= 4  # of more, more registers would be needed
        where, block_k = "codes", wide if few or not narrow else 64
    # AMD's matrix instructions take 16 tokens: 8 would be multiplied by more and smaller ones, or by none.
    block_m = min(128 if narrow else 16, max(16 if prepared.ROCM else 8, triton.next_power_of_2(tokens)))
    tall = narrow and block_m <= 16 and not prepared.ROCM
    return where, {"BLOCK_M": block_m, "BLOCK_N": 128 if tall else 64, "BLOCK_K": block_k}


def _sizes(weight: Groups) -> tuple[Any, ...]:
    return *weight.shape, weight.codes.shape[1], weight.scales.shape[1], weight.rows
