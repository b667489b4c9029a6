"""Integers and small floats with scales on a GPU, in Triton: decoding, and y = x @ W.T without W in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels import groups_kernels as kernels
from compress.kernels import sums

PROGRAMS = 528  # a grid of so many gives each of an H200's 132 multiprocessors four
FUSED_TOKENS = 256  # W is unpacked anew for every 128 of them
_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Groups:
    """A weight of N rows and K columns.

    codes: (N, words) uint32, each row a stream of `bits` bits a code, low bits first. form: of the codes: int (less
    zeros, or less the middle one), signed (8 bits, two's complement), e2m1, e4m3. scales: (n, blocks), each for `rows`
    rows and `columns` columns; of bytes the floats that `scale_form` says, e8m0 or e4m3. zeros: (N, blocks) uint8. All
    is divided by divisor.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    bits: int
    form: str
    scale_form: str
    rows: int
    columns: int
    divisor: float = 1.0

    @property
    def unit(self) -> int:
        """Codes that are unpacked together, from whole words."""
        return 32 if 32 % self.bits else 32 // self.bits

    @property
    def fits(self) -> bool:
        """Whether `linear` can multiply with it: a unit of codes has one scale."""
        return self.scales.shape[1] == 1 or self.columns % self.unit == 0


def prepare(
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    bits: int,
    block: tuple[int, int],
    form: str = "int",
    zeros: Tensor | None = None,
    divisor: float = 1.0,
) -> Groups:
    """codes: (N, bytes or words) of any dtype. scales: (n, blocks), uint8 for E8M0. block: rows and columns of one."""
    stream = codes.contiguous().view(torch.uint8)
    stream = F.pad(stream, (0, -stream.shape[1] % 4)) if stream.shape[1] % 4 else stream  # to whole words
    kinds = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}
    kind = kinds.get(scales.dtype, "float")
    held = scales.contiguous() if kind == "float" else scales.contiguous().view(torch.uint8)
    return Groups(stream.view(torch.uint32), held, zeros, shape, bits, form, kind, *block, divisor)


def decode(weight: Groups, dtype: torch.dtype) -> Tensor:
    """(N, K): code * scale in float32, rounded to `dtype`."""
    n, k = weight.shape
    out = torch.empty(n, k, dtype=dtype, device=weight.codes.device)
    scales, form = weight.scales, weight.scale_form
    if weight.divisor != 1:
        scales = scales.view(torch.float8_e4m3fn).float() / weight.divisor
        form = "float"
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
                bias,
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
                num_stages=3,
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
        where, block_k = "codes", 64 if narrow else 32
    block_m = min(128 if narrow else 16, max(8, triton.next_power_of_2(tokens)))
    return where, {"BLOCK_M": block_m, "BLOCK_N": 128 if narrow and block_m <= 16 else 64, "BLOCK_K": block_k}


def _sizes(weight: Groups) -> tuple[Any, ...]:
    return *weight.shape, weight.codes.shape[1], weight.scales.shape[1], weight.rows
