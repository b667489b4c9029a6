"""Weights in block floating point as the kernel of a GPU takes them; plain torch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats.bfp import Format, unpack
from compress.kernels import prepared
from compress.kernels.op import Layout, Packed


@dataclass(frozen=True)
class Blocks:
    """mantissas: (N, bytes) uint8 and exponents: (N, blocks) uint8, as formats.bfp lays them out."""

    mantissas: Tensor
    exponents: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    block_size: int
    full_range: bool

    @property
    def form(self) -> Format:
        return Format(self.bits, self.block_size, self.full_range, self.dtype)


def on_gpu(mantissas: Tensor, exponents: Tensor, form: Format, columns: int) -> Packed | None:
    """Prepares a weight for the GPU that its tensors are on; None where the kernel does not run."""
    if not prepared.runs_triton(mantissas.device):
        return None
    return pack(mantissas, exponents, form, columns)


def pack(mantissas: Tensor, exponents: Tensor, form: Format, columns: int) -> Packed:
    """`on_gpu`, on any device; the tensors themselves."""
    shape = (len(mantissas), columns)
    return LAYOUT(mantissas, exponents, shape, form.dtype, form.bits, form.block_size, form.full_range)


def decode(weight: Blocks) -> Tensor:
    """(N, K) in the weight's dtype."""
    if prepared.runs_triton(weight.mantissas.device):
        from compress.kernels import bfp_triton  # imports triton, which a machine without a GPU need not have

        return bfp_triton.decode(weight.mantissas, weight.exponents, weight.form, weight.shape[1])
    return unpack(weight.mantissas, weight.exponents, weight.form, weight.shape[1])


def linear(x: Tensor, weight: Blocks, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias: fused on a GPU for as many tokens as that is faster for, else of the decoded weight."""
    if prepared.runs_triton(x.device):
        from compress.kernels import bfp_triton

        if x.numel() <= bfp_triton.FUSED_TOKENS * x.shape[-1]:
            return bfp_triton.linear(x, weight.mantissas, weight.exponents, weight.form, bias)
    return F.linear(x, decode(weight).to(x.dtype), bias)


LAYOUT = Layout("bfp", Blocks, decode, linear)
