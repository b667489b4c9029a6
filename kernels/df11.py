"""Decoding and multiplying with losslessly coded words: compiled loops on the CPU, Triton on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from compress.formats import fixed, huffman
from compress.formats.compiled import empty

CHUNK = huffman.CHUNK


def decode(tensors: dict[str, Tensor], count: int, chunks: Any = None) -> Tensor:
    """The words of a tensor of `count` weights, (count,) int16 or uint8, on the CPU.

    tensors: as `compress.df11` stores them. chunks: only these, each of 16384 words, one after the other; the last
    one may be short. Raises ValueError where the codes are damaged.
    """
    arrays = {name: tensor.cpu().contiguous().view(-1).numpy() for name, tensor in tensors.items() if name != "like"}
    wide = "sign_mantissa" in tensors
    size = count if chunks is None else len(chunks) * CHUNK
    out = empty((size,), torch.int16 if wide else torch.uint8)
    words = out.numpy().view(np.uint16) if wide else out.numpy()
    rest = arrays["sign_mantissa"] if wide else np.empty(0, np.uint8)
    if "base" in tensors:
        codes = arrays["codes"].reshape(-1, fixed.BLOCK_BYTES)
        counts, escapes = arrays["escape_counts"], arrays["escapes"]
        fixed.decode(int(arrays["base"][0]), codes, counts, escapes, rest, words, count, chunks)
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
class OnGpu:
    """The words of one weight on a GPU, laid out for the kernels of `kernels.df11_triton`: a Fixed or a Huffman."""

    coded: Any

    def decode(self) -> Tensor:
        """(n,) int16 or uint8."""
        from compress.kernels import df11_triton

        is_fixed = isinstance(self.coded, df11_triton.Fixed)
        words = df11_triton.decode_fixed(self.coded) if is_fixed else df11_triton.decode_huffman(self.coded)
        return words.view(-1)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x @ W.T + bias for a bfloat16 W with fixed-length codes and a few tokens; None where decoding W is better."""
        from compress.kernels import df11_triton

        few = x.numel() <= df11_triton.FUSED_TOKENS * x.shape[-1]
        fused = few and isinstance(self.coded, df11_triton.Fixed)
        return df11_triton.linear_fixed(x, self.coded, bias) if fused else None


def on_gpu(tensors: dict[str, Tensor]) -> OnGpu | None:
    """Prepares a weight for the GPU that its tensors are on; None where the kernels do not run."""
    device = tensors["codes"].device
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from compress.kernels import df11_triton  # imports triton, which a machine without a GPU need not have

    prepare = df11_triton.prepare_fixed if "base" in tensors else df11_triton.prepare_huffman
    return OnGpu(prepare(tensors, device))
