"""bfp: block floating point (arXiv:2403.20137), signed mantissas in blocks along in_features with shared exponents.

In a layout of our own. Of an exponent's neighbours the one with the least squared error is searched. Channels between
two layers (`folding.py`) and those of the residual stream (`stream.py`) are put in order of size, so that outliers
share blocks, where that makes the calibrated error smaller and no layer's larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compress import gptaq
from compress.fold import Kind
from compress.formats import bfp
from compress.formats.bfp import Format
from compress.kernels import bfp as kernels
from compress.kernels import cpu, decode
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared
from compress.kernels.rows import Rows
from compress.microscaling import Element, compensate_on, search, weighting
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Bfp(Scheme):
    """Signed mantissas of 2 to 8 bits, blocks of them with a shared 8-bit exponent: block floating point.

    Exactly mantissa_bits + 8 / block_size bits per weight where blocks divide in_features; a row's last block may be
    short. full_range also uses the mantissa -2**(mantissa_bits - 1); search tries an exponent more and one less, and
    keeps the one with the least squared error, weighted where calibration measured the inputs. On calibration data:
    reorder sorts the channels between two layers, and those of the residual stream, where that helps; method=gptq makes
    good the error of each column with the later ones.
    """

    name = "bfp"
    mantissa_bits: int = 4
    block_size: int = 32
    full_range: bool = True
    search: bool = True
    reorder: bool = True
    method: Literal["gptq", "rtn"] = "gptq"

    def __post_init__(self) -> None:
        if not 2 <= self.mantissa_bits <= 8:
            raise ValueError(f"{self.name}: mantissa_bits is {self.mantissa_bits}; give 2 to 8")
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"{self.name}: block_size is {self.block_size}; give one of {known}")

    @property
    def needs_calibration(self) -> bool:
        return self.reorder or self.method == "gptq"

    @property
    def needs_hessian(self) -> bool:
        return self.needs_calibration

    @property
    def folds(self) -> frozenset[Kind]:
        return frozenset(["order"]) if self.reorder else frozenset()

    def note(self, shape: tuple[int, ...]) -> str | None:
        rest = shape[1] % self.block_size
        return f"the last block of a row has {rest} values instead of {self.block_size}" if rest else None

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        (rows, width), form = shape, self._format(dtype)
        return {
            "mantissa": Spec(torch.uint8, (rows, form.row_bytes(width))),
            "exponent": Spec(torch.uint8, (rows, form.blocks(width))),
            "like": Spec(dtype, (0, rows, width)),  # no bytes: only the header of shape and dtype
        }

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        like = specs["like"]
        if len(like.shape) != 3 or not like.dtype.is_floating_point:
            raise ValueError(f"like is {like}, and {self.name} needs (0, rows, columns) floats; download it again")
        return Spec(like.dtype, like.shape[1:])

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        form = self._format(weight.dtype)
        exponents = bfp.shared_exponents(weight, form)
        if self.search:
            exponents = self._searched(weight, exponents, form, stats)
        stored = weight
        if stats is not None and stats.hessian is not None and self.method == "gptq":
            scales = form.steps()[exponents.int()]
            stored = compensate_on(scales, self.block_size, self._element, gptaq.target(weight, stats), stats.hessian)
        return {
            "mantissa": bfp.pack(stored, exponents, form),
            "exponent": exponents,
            "like": weight.new_empty((0, *weight.shape)),
        }

    def _searched(self, weight: Tensor, exponents: Tensor, form: Format, stats: Stats | None) -> Tensor:
        """Each block's best of its exponent, one more and one less."""
        missing, weights = -weight.shape[1] % self.block_size, weighting(stats)
        if missing:
            weight = F.pad(weight, (0, missing))
            weights = None if weights is None else F.pad(weights, (0, missing))
        steps = form.steps()[form.lowest : form.top + 1]
        found = search(weight, exponents - form.lowest, steps, (0, 1, -1), len(steps) - 1, self._element, weights)
        return found + form.lowest

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        return decode.bfp(*self._blocks(tensors))

    def loop(self, tensors: Tensors) -> Rows | None:
        return decode.bfp_rows(*self._blocks(tensors))

    def prepare(self, tensors: Tensors) -> Any:
        return kernels.on_gpu(*self._blocks(tensors)) or super().prepare(tensors)

    def _blocks(self, tensors: Tensors) -> tuple[Tensor, Tensor, Format, int]:
        """Mantissas and exponents, their format, and the columns."""
        like = tensors["like"]
        return tensors["mantissa"], tensors["exponent"], self._format(like.dtype), like.shape[2]

    def product(self, tensors: Tensors) -> Product | None:
        mantissas, exponents, bits = tensors["mantissa"], tensors["exponent"], self.mantissa_bits
        return cpu.integers(mantissas, exponents, None, bits, self.block_size, tensors["like"].shape[2], bits - 2)

    @property
    def row_tensors(self) -> frozenset[str]:
        return frozenset(["mantissa", "exponent"])

    @property
    def _element(self) -> Element:
        """The mantissas as a float of which no number is normal but the largest: their steps are all 1."""
        half = 2.0 ** (self.mantissa_bits - 1)
        return Element(self.mantissa_bits - 2, half / 2, half - 1, -half if self.full_range else 1 - half)

    def _format(self, dtype: torch.dtype) -> Format:
        return Format(self.mantissa_bits, self.block_size, self.full_range, dtype)
