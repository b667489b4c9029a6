"""Block floating point on a GPU, in Triton: y = x @ W.T on mantissas, without W in memory.

In bfloat16, whose exponents are those of the blocks, whole words of mantissas are integers with scales
(groups_kernels.py); else blocks are multiplied on their own, and then their sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.formats.bfp import Format
from compress.kernels import bfp_kernels as kernels
from compress.kernels import groups_triton, sums
from compress.kernels.groups import Groups
from compress.kernels.prepared import stages

PROGRAMS = 512  # a grid of so many gives each of about 130 multiprocessors several
FUSED_TOKENS = 256  # W is unpacked anew for every 128 of them
_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def linear(x: Tensor, mantissas: Tensor, exponents: Tensor, form: Format, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias, summed in float32. For more than FUSED_TOKENS tokens, decode and multiply instead.

    x: (..., K) bf16, fp16 or fp32. mantissas: (N, ceil(K * bits / 8)) uint8 and exponents: (N, ceil(K / block_size))
    uint8, as formats.bfp lays them out. bias: (N,). Returns (..., N) in the dtype of x.
    """
    rows, columns = len(mantissas), x.shape[-1]
    wanted = (rows, form.row_bytes(columns)), (rows, form.blocks(columns))
    if (tuple(mantissas.shape), tuple(exponents.shape)) != wanted:
        found = f"mantissas {tuple(mantissas.shape)} and exponents {tuple(exponents.shape)}"
        raise ValueError(f"x: has {columns} features, for which {wanted[0]} and {wanted[1]} are needed, not {found}")
    if x.dtype not in _DOT:
        raise ValueError(f"x: is {x.dtype}; convert it to bfloat16, float16 or float32")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != mantissas.device:
            raise ValueError(f"{name}: is on {tensor.device}; move it to {mantissas.device}, where the weight is")
    if x.dtype == torch.bfloat16 and (whole := _groups(mantissas, exponents, form, columns)) is not None:
        return groups_triton.linear(x, whole, bias)
    flat = x.reshape(-1, columns).contiguous()
    tokens, blocks = len(flat), form.blocks(columns)
    narrow = x.dtype != torch.float32  # a float32 dot is one of plain multiplications, which needs registers
    block_m, block_n = min(128 if narrow else 16, max(16, triton.next_power_of_2(tokens))), 64
    across, down = triton.cdiv(rows, block_n), triton.cdiv(tokens, block_m)
    split = max(1, min(PROGRAMS // max(1, 2 * across * down), columns // 512))
    partial = torch.empty(split, tokens, rows, dtype=torch.float32, device=x.device)
    if partial.numel():
        with torch.cuda.device_of(flat):
            kernels.matmul[(across, down, split)](
                mantissas.contiguous(),
                exponents.contiguous(),
                flat,
                partial,
                tokens,
                rows,
                columns,
                mantissas.shape[1],
                blocks,
                BITS=form.bits,
                BLOCK=form.block_size,
                DOT=_DOT[x.dtype],
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                SPLIT=split,
                num_warps=4 if block_m <= 32 else 8,
                num_stages=stages(3 if block_m == 16 else 2),
            )
    return sums.finish(partial, bias, x.dtype).view(*x.shape[:-1], rows)


def _groups(mantissas: Tensor, exponents: Tensor, form: Format, columns: int) -> Groups | None:
    """The weight as integers with scales, in the same memory; None where its rows are no whole words and blocks."""
    if mantissas.shape[1] % 4 or columns % form.block_size or not mantissas.numel():
        return None
    codes = mantissas.contiguous().view(torch.uint32)
    shape = len(mantissas), columns
    found = Groups(
        codes, exponents.contiguous(), None, shape, form.dtype, form.bits, "int", "shared", 1, form.block_size, 1.0
    )
    return found if found.fits else None


def decode(mantissas: Tensor, exponents: Tensor, form: Format, columns: int) -> Tensor:
    """(N, columns) in the form's dtype."""
    out = torch.empty(len(mantissas), columns, dtype=form.dtype, device=mantissas.device)
    if out.numel():
        with torch.cuda.device_of(out):
            kernels.decode[(triton.cdiv(len(out), 8), triton.cdiv(columns, 512))](
                mantissas.contiguous(),
                exponents.contiguous(),
                out,
                *out.shape,
                mantissas.shape[1],
                exponents.shape[1],
                BITS=form.bits,
                BLOCK=form.block_size,
                BLOCK_N=8,
                BLOCK_K=512,
                num_warps=4,
            )
    return out
