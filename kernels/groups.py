"""Integers and small floats with scales as the kernels of a GPU take them; plain torch elsewhere, the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats.bitpack import unpack
from compress.formats.float4 import E2M1, E8M0
from compress.kernels import prepared
from compress.kernels.op import Layout, Packed


@dataclass(frozen=True)
class Groups:
    """A weight of N rows and K columns.

    codes: (N, words) uint32, each row a stream of `bits` bits a code, low bits first. form: of the codes: int (less
    zeros, or less the middle one), signed (8 bits, two's complement), e2m1, e4m3. scales: (n, blocks), each for `rows`
    rows and `columns` columns; of bytes the floats that `scale_form` says, e8m0 or e4m3, else `float`; to multiply only
    also the `shared` exponents of formats/bfp.py. zeros: (N, blocks) uint8. Scales are divided by divisor.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    form: str
    scale_form: str
    rows: int
    columns: int
    divisor: float

    @property
    def unit(self) -> int:
        """Codes that are unpacked together, from whole words."""
        return 32 if 32 % self.bits else 32 // self.bits

    @property
    def fits(self) -> bool:
        """Whether a kernel multiplies with it: a unit of codes has one scale."""
        return self.scales.shape[1] == 1 or self.columns % self.unit == 0

    def chosen(self, index: Tensor) -> Groups:
        """Those rows of it, where each has scales of its own. index: (count,) int64."""
        codes = self.codes.view(torch.int32)[index].view(torch.uint32)  # torch takes no rows of unsigned words
        zeros = None if self.zeros is None else self.zeros[index]
        shape = (len(index), self.shape[1])
        return replace(self, codes=codes, scales=self.scales[index], zeros=zeros, shape=shape)

    def divided(self) -> Tensor:
        """(n, blocks) float32: the scales."""
        scales = self.scales
        if self.scale_form == "e8m0":
            return E8M0.to(scales.device)[scales.int()]
        if self.scale_form == "e4m3":
            scales = scales.view(torch.float8_e4m3fn)
        return scales.float() / self.divisor


def on_gpu(codes: Tensor, scales: Tensor, shape: tuple[int, int], *how: Any, **named: Any) -> Packed | None:
    """Prepares a weight for the GPU that its tensors are on; None where kernels do not run. Takes what `pack` takes."""
    if not prepared.runs_triton(codes.device) or 0 in shape:
        return None
    return pack(codes, scales, shape, *how, **named)


def pack(
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    block: tuple[int, int],
    form: str = "int",
    zeros: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Packed:
    """A weight for the kernels. The tensors are used as they are, unless rows must be padded to whole words.

    codes: (N, bytes or words) of any dtype. scales: (n, blocks), uint8 for E8M0. block: rows and columns of one.
    """
    stream = codes.contiguous().view(torch.uint8)
    stream = F.pad(stream, (0, -stream.shape[1] % 4)) if stream.shape[1] % 4 else stream
    kind = {torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}.get(scales.dtype, "float")
    held = scales.contiguous() if kind == "float" else scales.contiguous().view(torch.uint8)
    by = 1.0 if divisor is None else float(divisor)
    return LAYOUT(stream.view(torch.uint32), held, zeros, shape, dtype, bits, form, kind, *block, by)


def decode(weight: Groups) -> Tensor:
    """(N, K): code * scale in float32, rounded to the weight's dtype."""
    if not prepared.runs_triton(weight.codes.device):
        return decode_torch(weight)
    from compress.kernels import groups_triton  # imports triton, which a machine without a GPU need not have

    return groups_triton.decode(weight)


def decode_torch(weight: Groups) -> Tensor:
    """`decode` in plain torch, on any device."""
    rows, columns = weight.shape
    codes, scales = unpack(weight.codes.view(torch.int32), weight.bits, columns), weight.divided()
    if weight.form == "e2m1":
        values = E2M1.to(codes.device)[codes.long()]
    elif weight.form == "e4m3":
        values = codes.view(torch.float8_e4m3fn).float()
    elif weight.form == "signed":
        values = codes.view(torch.int8).float()
    elif weight.zeros is None:
        values = codes.float() - (1 << (weight.bits - 1))
    else:
        values = codes.float() - weight.zeros.repeat_interleave(weight.columns, 1)[:, :columns]
    spread = scales.repeat_interleave(weight.rows, 0)[:rows].repeat_interleave(weight.columns, 1)[:, :columns]
    return (values * spread).to(weight.dtype)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that the kernels multiply


def linear(x: Tensor, weight: Groups, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias: fused on a GPU for as many tokens as that is faster for, else of the decoded weight."""
    # Scales that are powers of two can lie outside of float16's range.
    fits = weight.fits and x.dtype in _DTYPES and not (x.dtype == torch.float16 and weight.scale_form == "e8m0")
    if prepared.runs_triton(x.device) and fits:
        from compress.kernels import groups_triton

        if x.numel() <= groups_triton.FUSED_TOKENS * x.shape[-1]:
            return groups_triton.linear(x, weight, bias)
    return F.linear(x, decode(weight).to(x.dtype), bias)


LAYOUT = Layout("groups", Groups, decode, linear)
