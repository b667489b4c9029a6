"""Weights that are stored as indices into codebooks: what is stored for which options, and how it is read and run.

How the codebooks are found is another matter (`kmeans.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress import codebooks, outliers
from compress.formats import bitpack, datatypes
from compress.kernels import cpu, lookup
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared
from compress.kernels.rows import Rows
from compress.scheme import Scheme, Spec, Tensors

NESTED_VALUES = 1 << 16  # share a codebook at least: of fewer, the best cells of two widths differ too much


@dataclass(frozen=True)
class Clustered(Scheme):
    """What `kmeans` stores. Its options are described there."""

    locals: ClassVar[frozenset[str]] = frozenset(
        ("indices", "codebook", "codebook_scale", "scale", "selector", "like", *outliers.NAMES)
    )
    bits: int = 4
    granularity: Literal["channel", "tensor", "group"] = "channel"
    group_size: int = 16
    method: Literal["ganq", "rtn"] = "ganq"
    sensitivity: Literal["activation", "fisher", "none"] = "activation"
    codebook: Literal["learned", "nf", "bitmod3", "bitmod4"] = "learned"
    block_size: int = 128
    entries: Literal["float", "int8"] = "float"
    scale: bool = False
    outliers: float = 0.0
    refine: int = 0
    nested: bool = False

    def __post_init__(self) -> None:
        only = datatypes.WIDTHS.get(self.codebook)
        if only and self.bits == Clustered.bits:
            object.__setattr__(self, "bits", only)
        least = 1 if self.codebook == "learned" and not self.nested else 2
        if not least <= self.bits <= 8 or (only and self.bits != only):
            wanted = only or f"{least} to 8"
            raise ValueError(f"{self.name}: bits is {self.bits}; give {wanted} (codebook={self.codebook})")
        for option in ("group_size", "block_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{self.name}: {option} is {getattr(self, option)}; give 1 or more, for example 16")
        if not 0 <= self.outliers <= 0.5:
            raise ValueError(f"{self.name}: outliers is {self.outliers}; give a fraction from 0 to 0.5")
        if self.refine < 0 or (self.refine and (self.codebook != "learned" or self.nested or self.outliers)):
            raise ValueError(
                f"{self.name}: refine is {self.refine}; give 0, or steps for codebook=learned, no outliers, not nested"
            )
        if self.codebook != "learned" and (self.nested or self.scale or self.entries == "int8"):
            raise ValueError(f"{self.name}: nested, scale and entries are for codebook=learned, not {self.codebook}")

    @property
    def recodes(self) -> bool:
        return self.nested

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        rows, width = shape
        packed = (self.bits, rows, bitpack.packed_width(width, 1))
        if not self.nested:
            packed = (rows, bitpack.packed_width(width, self.bits))  # type: ignore[assignment]
        specs = {"indices": Spec(torch.int32, packed), "like": Spec(dtype, (0, *shape))}
        if self.codebook != "learned":
            blocks = -(-width // self.block_size)
            specs["scale"] = Spec(dtype, (rows, blocks))
            if self.codebook != "nf":
                specs["selector"] = Spec(torch.int32, (rows, bitpack.packed_width(blocks, 2)))
            return specs | outliers.specs(shape, dtype, self.outliers)
        books = -(-rows // self.rows_together(shape))
        entries = 2 ** (self.bits + 1) - 4 if self.nested else 2**self.bits  # 4 + 8 + ...
        specs["codebook"] = Spec(dtype if self.entries == "float" else torch.int8, (books, entries))
        if self.entries == "int8":
            specs["codebook_scale"] = Spec(dtype, (books, 1))
        if self.scale:
            specs["scale"] = Spec(dtype, (rows, 1))
        return specs | outliers.specs(shape, dtype, self.outliers)

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        return Spec(specs["like"].dtype, specs["like"].shape[1:])

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        decoded = lookup.decode(*self._tables(tensors))
        return outliers.put(decoded, tensors) if "outlier_start" in tensors else decoded

    def loop(self, tensors: Tensors) -> Rows | None:
        return None if "outlier_start" in tensors else lookup.decode_rows(*self._tables(tensors))

    def _tables(self, tensors: Tensors) -> tuple[Tensor, Tensor, tuple[int, int], int, int]:
        """As `lookup.decode` takes them."""
        like: Tensor = tensors["like"]
        shape = (tensors["indices"].shape[-2], like.shape[2])
        levels, rows, columns = self.levels(tensors, *shape)
        return tensors["indices"], codebooks.cast(levels, like.dtype), shape, rows, columns

    @property
    def row_tensors(self) -> frozenset[str]:
        if self.nested or self.outliers or self.entries != "float" or self.granularity == "group":
            return frozenset()
        return frozenset(["indices", "scale", "selector", *(["codebook"] if self.granularity == "channel" else [])])

    def prepare(self, tensors: Tensors) -> Any:
        if "outlier_start" in tensors:  # no kernel adds them
            return tensors
        like = tensors["like"]
        shape = (like.shape[1], like.shape[2])
        if self.codebook == "learned":
            levels, rows, columns = self.levels(tensors, *shape)
            tables = codebooks.cast(levels[:, 0], like.dtype)
            found = lookup.on_gpu(tensors["indices"], tables, shape, rows, columns, like.dtype)
            return found or super().prepare(tensors)
        tables = datatypes.levels(self.codebook, self.bits).to(like.device)
        blocks = {"scales": tensors["scale"], "selector": codebooks.selectors(tensors)}
        found = lookup.on_gpu(tensors["indices"], tables, shape, 1, self.block_size, like.dtype, **blocks)
        return found or super().prepare(tensors)

    def product(self, tensors: Tensors) -> Product | None:
        if self.nested or self.codebook not in ("learned", "nf"):
            return None
        like, indices = tensors["like"], tensors["indices"]
        shape = (like.shape[1], like.shape[2])
        if self.codebook == "nf":
            levels = datatypes.levels(self.codebook, self.bits)
            return cpu.tables(indices, tensors["scale"], levels, self.block_size, shape)
        books, rows, _ = self.levels(tensors, *shape)
        if books.shape[2] != 1 << self.bits:
            return None  # decoding says what is wrong
        return cpu.tables(indices, None, codebooks.cast(books[:, 0], like.dtype), shape[1], shape, rows)

    def recode(self, tensors: Tensors, **options: Any) -> tuple[Scheme, Tensors]:
        """bits: how many to run with, of those that a nested weight has."""
        bits: int = options.get("bits", 0)
        if not self.nested or list(options) != ["bits"] or not 2 <= bits <= self.bits:
            raise ValueError(f"{self.name}: {options} cannot be chosen at loading; bits=2 to {self.bits} can if nested")
        narrower = {"indices": tensors["indices"][:bits], "codebook": tensors["codebook"][:, : 2 ** (bits + 1) - 4]}
        return replace(self, bits=bits), {**tensors, **narrower}

    def rows_together(self, shape: tuple[int, ...]) -> int:
        """How many share a codebook."""
        least = -(-NESTED_VALUES // shape[1]) if self.nested else 1
        asked = {"channel": 1, "tensor": shape[0], "group": self.group_size}[self.granularity]
        return min(max(least, asked), shape[0])

    def levels(self, tensors: Tensors, height: int, width: int) -> tuple[Tensor, int, int]:
        """What codes stand for, (n, blocks, 2**bits) float32; and the rows and columns that share a table."""
        if self.codebook != "learned":
            tables = datatypes.levels(self.codebook, self.bits).to(tensors["scale"].device)
            chosen = tables[codebooks.selectors(tensors).int()]
            return tensors["scale"].float()[..., None] * chosen, 1, self.block_size
        levels, rows = codebooks.entries(tensors, self.bits), self.rows_together((height, width))
        if self.scale:
            levels, rows = codebooks.spread(levels, rows, height) * tensors["scale"].float(), 1
        return levels[:, None], rows, width
