"""DFloat11 (arXiv:2504.11651): lossless; the exponents are entropy-coded, sign and mantissa kept as they are.

Their idea in a layout of our own: no reserved exponents, one table, chunks that decode independently; and beside
Huffman codes the fixed-length ones of ZipServ (arXiv:2603.17435), which a matrix product can decode as it reads. Not
their file format: `compress.dfloat11` reads that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats import fixed, huffman
from compress.formats.compiled import empty
from compress.formats.words import WIDTHS, join, split
from compress.kernels import cpu
from compress.kernels import df11 as kernels
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats

SMALLEST = 1024  # weights; of fewer, table and names in the header take what the codes save


@dataclass(frozen=True)
class Df11(Scheme):
    """Lossless: entropy-coded exponents beside sign and mantissa; every tensor, bit for bit.

    A bfloat16 word is coded as its exponent, by `huffman` or by `fixed`-length codes, and the eight bits of sign and
    mantissa. Of float16 the symbol is the exponent with three bits of the mantissa, of float32 the upper half is coded
    like a bfloat16 (and the lower half not stored where it is zero everywhere), and of float8 the whole byte; float16
    and float8 have Huffman codes also with coding=fixed. What does not get smaller is stored as it is.
    """

    name = "df11"
    lossless = True
    sized_by_data = True
    locals: ClassVar[frozenset[str]] = frozenset(
        ("sign_mantissa", "table", "chunk_bytes", "codes", "base", "escape_counts", "escapes", "low", "like", "weight")
    )
    coding: Literal["huffman", "fixed"] = "huffman"

    def takes(self, spec: Spec) -> bool:
        return spec.dtype in WIDTHS and math.prod(spec.shape) >= SMALLEST

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        count = math.prod(shape)
        chunks, blocks = -(-count // huffman.CHUNK), -(-count // fixed.BLOCK)
        specs = {"weight": Spec(dtype, shape)}  # where coding it would not make it smaller
        if self._is_fixed(dtype):
            specs |= {
                "base": Spec(torch.uint8, (1,)),
                "codes": Spec(torch.uint8, (blocks, fixed.BLOCK_BYTES)),
                "escape_counts": Spec(torch.uint16, (blocks,)),
                "escapes": Spec(torch.uint16, (count,)),
            }
        else:
            specs |= {
                "table": Spec(torch.uint8, (256, 2)),
                "chunk_bytes": Spec(torch.uint16, (chunks,)),
                "codes": Spec(torch.uint8, (huffman.padded(count * huffman.LIMIT // 8 + chunks),)),
            }
        if WIDTHS[dtype] == 2:
            specs["sign_mantissa"] = Spec(torch.uint8, shape)
        if dtype == torch.float32:
            specs["low"] = Spec(torch.int16, shape)
        if dtype != torch.bfloat16:
            specs["like"] = Spec(dtype, (0, *shape))
        return specs

    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return math.prod(shape) * dtype.itemsize

    def measure(self, weight: Tensor) -> int:
        if not weight.numel():
            return 0
        words, low = split(weight)
        counts = huffman.histogram(words)
        total = counts.sum(0, dtype=np.int64)
        if self._is_fixed(weight.dtype):
            base = fixed.window(total)
            escapes = words.size - int(total[base : base + fixed.WINDOW].sum())
            size = 1 + -(-words.size // fixed.BLOCK) * (fixed.BLOCK_BYTES + 2) + 2 * escapes
        else:
            table = huffman.code_table(total)
            size = table.size + 2 * len(counts) + huffman.padded(huffman.chunk_bytes(counts, table).sum())
        size += words.size if words.itemsize == 2 else 0
        size += 0 if low is None else low.nbytes
        return int(min(size, weight.nbytes))

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        """weight: of any shape, bfloat16, float16, float32 or float8, any bits. Returns the tensors to store.

        Raises ValueError for another dtype.
        """
        if not weight.numel():
            return {"weight": weight}
        words, low = split(weight)
        rest = empty(tuple(weight.shape) if words.itemsize == 2 else (0,), torch.uint8)
        encode = _encode_fixed if self._is_fixed(weight.dtype) else _encode_huffman
        tensors = encode(words, rest.view(-1).numpy())
        if words.itemsize == 2:
            tensors["sign_mantissa"] = rest
        if low is not None:
            tensors["low"] = low
        if weight.dtype != torch.bfloat16:
            tensors["like"] = torch.empty((0, *weight.shape), dtype=weight.dtype)
        return tensors if sum(tensor.nbytes for tensor in tensors.values()) < weight.nbytes else {"weight": weight}

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them. Raises ValueError where the codes are damaged."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        stored: Tensors = tensors
        if "weight" in stored:
            return stored["weight"]
        return _decoded(stored).to(stored["codes"].device)

    def dense(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor:
        differentiated = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if x.device.type != "cpu" or differentiated or not isinstance(tensors, dict) or "weight" in tensors:
            return super().dense(x, tensors, bias)
        return F.linear(x, _decoded(tensors, reused=True).to(x.dtype), bias)

    def prepare(self, tensors: Tensors) -> Any:
        if "weight" in tensors:
            return tensors
        original = _original(tensors)
        return kernels.on_gpu(tensors, original.shape, original.dtype) or super().prepare(tensors)

    def product(self, tensors: Tensors) -> Product | None:
        if "base" not in tensors or "like" in tensors or tensors["sign_mantissa"].dim() != 2:
            return None
        rows, columns = tensors["sign_mantissa"].shape
        return cpu.fixed_words(tensors, (rows, columns))

    def recode(self, tensors: Tensors, **options: Any) -> tuple[Scheme, Tensors]:
        scheme = Df11(**options)
        return scheme, scheme.encode(self.decode(tensors))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def rows(self, tensors: Any, index: Tensor) -> Tensor:
        """decode(tensors)[index]; on the CPU from the chunks that hold these rows. The weight is (rows, columns)."""
        if isinstance(tensors, Prepared):
            return super().rows(tensors, index)
        stored: Tensors = tensors
        rows, columns = _original(stored).shape
        unique, inverse = index.cpu().unique(return_inverse=True)
        if unique.numel() and not 0 <= int(unique[0]) <= int(unique[-1]) < rows:
            raise IndexError(f"rows {int(unique[0])} to {int(unique[-1])} of a weight with {rows}")
        if "weight" in stored:
            return stored["weight"][index]
        words = kernels.decode_rows(stored, (rows, columns), unique)
        low = stored["low"].cpu()[unique] if "low" in stored else None
        return join(words, low, _original(stored).dtype)[inverse].to(index.device)

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        if "weight" in specs:
            return specs["weight"]
        if "like" in specs:
            return Spec(specs["like"].dtype, specs["like"].shape[1:])
        return Spec(torch.bfloat16, specs["sign_mantissa"].shape)

    def check(self, specs: Mapping[str, Spec]) -> None:
        if "weight" in specs:
            return
        try:
            original = self.original(specs)
            if original.dtype not in WIDTHS:
                raise ValueError(f"like is {specs['like']}, and {self.name} has no such dtype; download it again")
            is_fixed = not specs.keys().isdisjoint(("base", "escape_counts", "escapes"))
            wanted = Df11("fixed" if is_fixed else "huffman").specs(original.shape, original.dtype)
        except KeyError as error:
            raise ValueError(
                f"no {error.args[0]} is stored, so the checkpoint is incomplete; download it again"
            ) from None
        missing = sorted(wanted.keys() - specs.keys() - {"weight", "low"})
        if missing:
            raise ValueError(f"no {missing[0]} is stored, so the checkpoint is incomplete; download it again")
        for local, spec in specs.items():
            if local not in wanted:
                raise ValueError(f"{local} is {spec}, and beside the others {self.name} has none; download it again")
            needed = wanted[local].shape
            if local in ("table", "codes", "escapes"):  # of these there are as many as the values need
                needed = (*spec.shape[:1], *needed[1:])
            if spec != Spec(wanted[local].dtype, needed):
                raise ValueError(f"{local} is {spec}, and {self.name} needs {wanted[local]}; download it again")

    def _is_fixed(self, dtype: torch.dtype) -> bool:
        return self.coding == "fixed" and dtype in (torch.bfloat16, torch.float32)


def _original(tensors: Tensors) -> Spec:
    return Df11().original({name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})


def _decoded(tensors: Tensors, reused: bool = False) -> Tensor:
    """The weight on the CPU. reused: in memory that the next one of this thread takes."""
    original = _original(tensors)
    words = kernels.decode(tensors, math.prod(original.shape), reused=reused).view(original.shape)
    low = tensors["low"].cpu() if "low" in tensors else None
    return join(words, low, original.dtype)


def _encode_huffman(words: Any, rest: Any) -> Tensors:
    counts = huffman.histogram(words)
    table = huffman.code_table(counts.sum(0, dtype=np.int64))
    sizes = huffman.chunk_bytes(counts, table)
    codes = huffman.encode(words, table, sizes, rest)
    return {
        "table": torch.from_numpy(table),
        "chunk_bytes": torch.from_numpy(sizes.astype(np.uint16)),
        "codes": torch.from_numpy(codes),
    }


def _encode_fixed(words: Any, rest: Any) -> Tensors:
    base = fixed.window(huffman.histogram(words).sum(0, dtype=np.int64))
    codes, counts, escapes = fixed.encode(words, base, rest)
    return {
        "base": torch.tensor([base], dtype=torch.uint8),
        "codes": torch.from_numpy(codes),
        "escape_counts": torch.from_numpy(counts),
        "escapes": torch.from_numpy(escapes),
    }
