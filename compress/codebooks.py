"""The codebooks of `kmeans`: learned for rows that share one, rounded to what is stored, and read back."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats import bitpack, cluster, datatypes
from compress.scheme import Tensors

LITTLE = 2.0**-40  # of an importance: as good as none


def learn(
    weight: Tensor, bits: int, rows: int, importance: Tensor, nested: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Optimal codebooks for every `rows` rows, of the last perhaps fewer.

    importance: (1 or out_features, in_features), positive. Returns (codebooks, 2**bits) float32; or nested, for all
    widths from 2 to `bits` side by side, and the codes of the widest, (out_features, in_features) uint8.
    """
    height, width = weight.shape
    whole, found, codes = height // rows * rows, [], []
    for first, last, together in ((0, whole, rows), (whole, height, height - whole)):
        if first == last:
            continue
        values = weight[first:last].reshape(-1, together * width)
        shared = importance if len(importance) == 1 else importance[first:last].reshape(len(values), -1)
        if nested:
            chosen, widths = cluster.nested(values, bits, shared)
            found.append(torch.cat(widths, 1))
            codes.append(chosen.view(-1, width))
        else:
            found.append(cluster.codebooks(values, 1 << bits, shared))
    return torch.cat(found), torch.cat(codes) if nested else None


def store(levels: Tensor, dtype: torch.dtype, int8: bool) -> Tensors:
    """levels: (codebooks, K) float32. Returns them in `dtype`, or as integers times a scale in `dtype`."""
    if not int8:
        return {"codebook": cast(levels, dtype)}
    steps = positive(levels.abs().amax(1, keepdim=True) / 127, dtype)
    return {"codebook": (levels / steps.float()).round().clamp(-127, 127).to(torch.int8), "codebook_scale": steps}


def entries(tensors: Tensors, bits: int) -> Tensor:
    """(codebooks, 2**bits) float32: what `store` has stored, of nested ones those for all bits."""
    levels = tensors["codebook"][:, -(1 << bits) :].float()
    return levels * tensors["codebook_scale"].float() if "codebook_scale" in tensors else levels


def fit_blocks(weight: Tensor, name: str, bits: int, block: int, importance: Tensor) -> Tensors:
    """The scales of a fixed codebook, and which one of several each block has. importance: as in `learn`."""
    tables = datatypes.levels(name, bits)
    scales, numbers = datatypes.search(weight, tables, block, importance)
    found = {"scale": positive(scales, weight.dtype)}
    return found if len(tables) == 1 else {**found, "selector": bitpack.pack(numbers, 2)}


def selectors(tensors: Tensors) -> Tensor:
    """(out_features, blocks) uint8: the fixed codebook of each block."""
    blocks = tensors["scale"].shape[1]
    if "selector" not in tensors:
        return torch.zeros(tensors["scale"].shape, dtype=torch.uint8, device=tensors["scale"].device)
    return bitpack.unpack(tensors["selector"], 2, blocks)


def row_scale(weight: Tensor, importance: Tensor) -> Tensor:
    """(out_features, 1) in the weight's dtype: the root of the weighted mean square.
    importance: as in `learn`, and 1 on average in every row."""
    return positive((weight.double().square() * importance).mean(1, keepdim=True).sqrt(), weight.dtype)


def spread(levels: Tensor, rows: int, count: int) -> Tensor:
    """The codebook of each of `count` rows, of which `rows` share one."""
    return levels.repeat_interleave(rows, 0)[:count]


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, at most its largest number."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)


def positive(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, with 1 for a scale of zero, whose weights are zeros."""
    rounded = cast(scales, dtype)
    rounded[rounded == 0] = 1
    return rounded
