"""Adding up what the programs that share a product's columns found, in Triton: one launch for sum, bias and dtype."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
PROGRAMS = 512  # a grid of so many gives each of about 130 multiprocessors several


def shared(x: Tensor, rows: int, tile: tuple[int, int, int]) -> tuple[tuple[int, int, int], Tensor]:
    """The grid of a product with few tokens, and what its programs fill: (split, M, rows) float32.

    x: (M, K). tile: tokens, rows and columns of a program's step; two steps at least are one program's.
    """
    (tokens, columns), (block_m, block_n, block_k) = x.shape, tile
    across, down = triton.cdiv(rows, block_n), triton.cdiv(tokens, block_m)
    split = max(1, min(PROGRAMS // max(1, across * down), triton.cdiv(columns, 2 * block_k)))
    return (across, down, split), torch.empty(split, tokens, rows, dtype=torch.float32, device=x.device)


@triton.jit(do_not_specialize=["count", "SPLIT"])
def _finish(partial, bias, y, count, N, SPLIT, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(SPLIT):
        total += tl.load(partial + s * count + i, mask=i < count, other=0.0)
    if bias is not None:
        total += tl.load(bias + i % N, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < count)


def finish(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """partial: (split, M, N) float32. bias: (N,). Returns their sum, (M, N)."""
    split, tokens, rows = partial.shape
    y = torch.empty(tokens, rows, dtype=dtype, device=partial.device)
    if y.numel():
        with torch.cuda.device_of(partial):
            grid = (triton.cdiv(y.numel(), BLOCK),)
            _finish[grid](partial, bias, y, y.numel(), rows, SPLIT=split, BLOCK=BLOCK, num_warps=4)
    return y
