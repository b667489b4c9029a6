"""Decoding and multiplying with losslessly coded words: compiled loops on the CPU, Triton on a GPU."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from compress.formats import fixed, huffman
from compress.formats.compiled import empty
from compress.formats.words import join
from compress.kernels import cpu_words, prepared
from compress.kernels.op import Layout, Packed

CHUNK = huffman.CHUNK
MOST_KEPT = 1 << 28  # bytes of decoded weights


class _Room(threading.local):
    """Memory that a thread keeps: the system takes as long for new memory as decoding into it does."""

    held: Tensor | None = None

    def __call__(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        if size > MOST_KEPT:
            return empty((count,), dtype)
        if self.held is None or self.held.numel() < size:
            self.held = empty((size,), torch.uint8)
        return self.held[:size].view(dtype)


_room = _Room()


def decode(tensors: dict[str, Tensor], count: int, chunks: Any = None, reused: bool = False) -> Tensor:
    """The words of a tensor of `count` weights, (count,) int16 or uint8, on the CPU.

    tensors: as `compress.df11` stores them. chunks: only these, each of 16384 words, one after the other; the last
    one may be short. reused: into memory that the next tensor which this thread decodes so is decoded into. Raises
    ValueError where the codes are damaged.
    """
    arrays = {name: tensor.cpu().contiguous().view(-1).numpy() for name, tensor in tensors.items() if name != "like"}
    wide = "sign_mantissa" in tensors
    size = count if chunks is None else len(chunks) * CHUNK
    dtype = torch.int16 if wide else torch.uint8
    out = _room(size, dtype) if reused else empty((size,), dtype)
    words = out.numpy().view(np.uint16) if wide else out.numpy()
    rest = arrays["sign_mantissa"] if wide else np.empty(0, np.uint8)
    if "base" in tensors:
        codes = arrays["codes"].reshape(-1, fixed.BLOCK_BYTES)
        counts, escapes = arrays["escape_counts"], arrays["escapes"]
        stored = (int(arrays["base"][0]), codes, counts, escapes, rest)
        fixed.decode(*stored, words, count, chunks, cpu_words.decode_chunks)
    else:
        table = arrays["table"].reshape(-1, 2)
        huffman.decode(table, arrays["chunk_bytes"], arrays["codes"], rest, words, count, chunks)
    return out


def decode_rows(tensors: dict[str, Tensor], shape: tuple[int, int], index: Tensor) -> Tensor:
    """The words of the rows `index`, (n, columns), of a (rows, columns) weight, from the chunks that hold them.

    index: (n,) int64 on the CPU, from 0 to rows - 1.
    """
    columns, count = shape[1], math.prod(shape)
    if not index.numel() * columns:
        return decode(tensors, count, np.empty(0, np.int64)).view(index.numel(), columns)
    starts = index.numpy() * columns
    first, last = starts // CHUNK, (starts + columns - 1) // CHUNK
    needed = np.zeros(-(-count // CHUNK), bool)
    for step in range(int((last - first).max()) + 1):
        needed[np.minimum(first + step, last)] = True
    words = decode(tensors, count, np.flatnonzero(needed))
    slots = np.cumsum(needed) - 1  # where a chunk is among those that are decoded; a row's lie side by side
    rows = sliding_window_view(words.numpy(), columns)[slots[first] * CHUNK + starts % CHUNK]
    return torch.from_numpy(rows)


@dataclass(frozen=True)
class FixedOnGpu:
    """The fields of a `df11_triton.Fixed`; low: the lower halves of float32, where any is not zero."""

    sign_mantissa: Tensor
    codes: Tensor
    row_start: Tensor
    escapes: Tensor
    constants: Tensor
    low: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def coded(self) -> Any:
        from compress.kernels.df11_triton import Fixed  # imports triton, which a machine without a GPU need not have

        return Fixed(self.sign_mantissa, self.codes, self.row_start, self.escapes, self.constants)


@dataclass(frozen=True)
class HuffmanOnGpu:
    """The fields of a `df11_triton.Huffman`; low: the lower halves of float32, where any is not zero."""

    codes: Tensor
    lookup: Tensor
    groups: Tensor
    segments: Tensor
    sign_mantissa: Tensor | None
    constants: Tensor
    low: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def coded(self) -> Any:
        from compress.kernels.df11_triton import Huffman

        starts = self.groups, self.segments
        return Huffman(self.codes, self.lookup, *starts, self.sign_mantissa, self.constants, self.shape)


def on_gpu(tensors: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Packed | None:
    """Prepares a weight for the GPU that its tensors are on; None where the kernels do not run."""
    device = tensors["codes"].device
    if not prepared.runs_triton(device):
        return None
    from compress.kernels import df11_triton

    low = tensors.get("low")
    if "base" in tensors:
        return FIXED(**vars(df11_triton.prepare_fixed(tensors, device)), low=low, shape=shape, dtype=dtype)
    coded = {**vars(df11_triton.prepare_huffman(tensors, device)), "shape": shape}
    return HUFFMAN(**coded, low=low, dtype=dtype)


def _decode_fixed(weight: FixedOnGpu) -> Tensor:
    from compress.kernels import df11_triton

    words = df11_triton.decode_fixed(weight.coded).view(weight.shape)
    return join(words, weight.low, weight.dtype)


def _decode_huffman(weight: HuffmanOnGpu) -> Tensor:
    from compress.kernels import df11_triton

    words = df11_triton.decode_huffman(weight.coded).view(weight.shape)
    return join(words, weight.low, weight.dtype)


def _linear_fixed(x: Tensor, weight: FixedOnGpu, bias: Tensor | None) -> Tensor:
    """x @ W.T + bias: fused for a few tokens where the words are bfloat16, else of the decoded weight."""
    from compress.kernels import df11_triton

    if weight.low is None and x.numel() <= df11_triton.FUSED_TOKENS * x.shape[-1]:
        return df11_triton.linear_fixed(x, weight.coded, bias)
    return F.linear(x, _decode_fixed(weight).to(x.dtype), bias)


FIXED = Layout("df11_fixed", FixedOnGpu, _decode_fixed, _linear_fixed)
HUFFMAN = Layout("df11_huffman", HuffmanOnGpu, _decode_huffman)
