"""Decoding indices into tables of levels: on the CPU a compiled loop, elsewhere plain torch; the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats.bitpack import packed_width, unpack
from compress.formats.compiled import jit
from compress.kernels import prepared
from compress.kernels.cpu_levels import take
from compress.kernels.cpu_unpack import TOGETHER, unpack_row
from compress.kernels.op import Layout, Packed
from compress.kernels.rows import Rows

WORTH = 64  # columns with the same table, which is then laid out for vectors: of fewer that takes longer than they do


def decode(indices: Tensor, tables: Tensor, shape: tuple[int, int], rows: int, columns: int) -> Tensor:
    """tables[row // rows, column // columns, index] at every place: a tensor of `shape`, in the tables' dtype.

    indices: (shape[0], words) int32, as formats.bitpack packs `bits` bits; or bit planes, (bits, shape[0], words), the
    most significant first. tables: (n, blocks, 2**bits) bf16, fp16 or fp32. Raises ValueError where the tensors are not
    as long as that takes.
    """
    if indices.device.type == "cpu":
        return decode_rows(indices, tables, shape, rows, columns).whole
    _check(indices, tables, shape, rows, columns)
    return decode_torch(indices, tables, shape, rows, columns)


def decode_rows(indices: Tensor, tables: Tensor, shape: tuple[int, int], rows: int, columns: int) -> Rows:
    """`decode` on the CPU."""
    bits, planes = _check(indices, tables, shape, rows, columns), indices.dim() == 3
    levels = tables.contiguous().view(torch.int32 if tables.dtype == torch.float32 else torch.int16).numpy()
    source = indices.contiguous().numpy().view(np.uint8).reshape(-1 if planes else 1, shape[0], 4 * indices.shape[-1])
    arguments = (source, levels.view(np.dtype(f"u{tables.itemsize}")), rows, columns, bits)
    return Rows(_lookup_rows, shape, tables.dtype, tables.dtype, arguments)


def _check(indices: Tensor, tables: Tensor, shape: tuple[int, int], rows: int, columns: int) -> int:
    """The bits of an index."""
    bits = tables.shape[2].bit_length() - 1
    wanted = (shape[0], packed_width(shape[1], bits))
    if indices.dim() == 3:
        wanted = (bits, shape[0], packed_width(shape[1], 1))  # type: ignore[assignment]
    if tuple(indices.shape) != wanted or indices.dtype != torch.int32:
        raise ValueError(f"indices: {wanted} int32 are needed, not {tuple(indices.shape)} {indices.dtype}")
    if tables.shape[:2] != (-(-shape[0] // rows), -(-shape[1] // columns)):
        raise ValueError(f"tables: {tuple(tables.shape)} is not one for {rows} rows and {columns} columns of {shape}")
    return bits


def decode_torch(indices: Tensor, tables: Tensor, shape: tuple[int, int], rows: int, columns: int) -> Tensor:
    """`decode` in plain torch, on any device."""
    bits = tables.shape[2].bit_length() - 1
    if indices.dim() == 3:
        planes = [unpack(plane, 1, shape[1]) << (bits - 1 - b) for b, plane in enumerate(indices)]
        codes = torch.stack(planes).sum(0)
    else:
        codes = unpack(indices, bits, shape[1])
    row = torch.arange(shape[0], device=indices.device)[:, None] // rows
    block = torch.arange(shape[1], device=indices.device) // columns
    return tables[row, block, codes.int()]


@dataclass(frozen=True)
class Lookup:
    """A weight of N rows and K columns, as the kernels of a GPU take it.

    indices: (N, words) uint32 of packed codes, or (bits, N, words) bit planes, the most significant first. tables: (n,
    2**bits); of row // rows, or where there are scales that of the selector. scales: (N, blocks) for blocks of so many
    columns, or None. selector: (N, blocks) uint8, or None. swapped: of each two 4-bit codes the first is in the high
    bits.
    """

    indices: Tensor
    tables: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    rows: int
    columns: int
    scales: Tensor | None = None
    selector: Tensor | None = None
    swapped: bool = False

    @property
    def bits(self) -> int:
        return self.tables.shape[1].bit_length() - 1


def on_gpu(
    indices: Tensor, tables: Tensor, shape: tuple[int, int], rows: int, columns: int, dtype: torch.dtype, **blocks: Any
) -> Packed | None:
    """Prepares a weight for the GPU that its tensors are on; None where the kernels do not run.

    blocks: `scales` and `selector` of a `Lookup`, of which the other arguments are the parts too.
    """
    if not prepared.runs_triton(indices.device) or (blocks and columns % 32):
        return None
    return pack(indices, tables, shape, rows, columns, dtype, **blocks)


def pack(
    indices: Tensor,
    tables: Tensor,
    shape: tuple[int, int],
    rows: int,
    columns: int,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    selector: Tensor | None = None,
    swapped: bool = False,
) -> Packed:
    """`on_gpu`, on any device. indices: as `decode` takes them; they are used as they lie in memory."""
    if scales is not None and selector is None:
        selector = torch.zeros(scales.shape, dtype=torch.uint8, device=scales.device)
    words = indices.contiguous().view(torch.uint32)
    return LAYOUT(words, tables.contiguous(), shape, dtype, rows, columns, scales, selector, swapped)


def decode_packed(weight: Lookup) -> Tensor:
    """(N, K): levels, or level * scale in float32, rounded to the weight's dtype."""
    if prepared.runs_triton(weight.indices.device):
        from compress.kernels import lookup_triton  # imports triton, which a machine without a GPU need not have

        return lookup_triton.decode(weight)
    indices, (_, width) = weight.indices.view(torch.int32), weight.shape
    if weight.swapped:
        octets = indices.view(torch.uint8)
        indices = (octets << 4 | octets >> 4).view(torch.int32)
    if weight.scales is None or weight.selector is None:
        found = decode_torch(indices, weight.tables[:, None], weight.shape, weight.rows, max(1, width))
    else:
        spread = weight.tables.float()[weight.selector.int()] * weight.scales.float()[..., None]
        found = decode_torch(indices, spread, weight.shape, 1, weight.columns)
    return found.to(weight.dtype)


def linear(x: Tensor, weight: Lookup, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias: fused on a GPU for a few tokens, else of the decoded weight."""
    if prepared.runs_triton(x.device) and x.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from compress.kernels import lookup_triton

        if x.numel() <= lookup_triton.FUSED_TOKENS * x.shape[-1]:
            return lookup_triton.linear(x, weight, bias)
    return F.linear(x, decode_packed(weight).to(x.dtype), bias)


LAYOUT = Layout("lookup", Lookup, decode_packed, linear)


@jit
def _lookup_rows(start, stop, base, width, out, dropped, source, levels, rows, columns, bits):  # type: ignore[no-untyped-def]
    """source: (1, rows, bytes) uint8, or (bits, rows, bytes). levels and out: unsigned, as wide as the weights."""
    codes = np.zeros(-(-width // TOGETHER) * TOGETHER, np.uint8)
    plane = np.zeros(codes.shape[0], np.uint8)
    for place in range(start, stop):
        row, line = base + place, out[place, :width]
        if source.shape[0] == 1:
            unpack_row(source[0, row], bits, False, codes)
        else:
            codes[:] = 0
            for b in range(source.shape[0]):
                unpack_row(source[b, row], 1, False, plane)
                for i in range(codes.shape[0]):
                    codes[i] = np.uint8(codes[i] << np.uint8(1)) | plane[i]
        for block in range(levels.shape[1]):
            table, part = levels[row // rows, block], line[block * columns : (block + 1) * columns]
            chosen = codes[block * columns : (block + 1) * columns]
            if out.itemsize == 2 and columns >= WORTH:
                take(table, chosen, part)
            else:
                for i in range(part.shape[0]):
                    part[i] = table[chosen[i]]
