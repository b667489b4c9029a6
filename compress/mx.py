"""mxfp4 and mxfp8: the OCP Microscaling formats, blocks of 32 with a power of two as scale. Weight-only.

"OCP Microscaling Formats (MX) Specification 1.0" (2023), in the compressed-tensors layouts `mxfp4-pack-quantized` and
`mxfp8-quantized`. MXFP6, MXINT8 and mxfp8 in E5M2 are left out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.formats import float4, float8
from compress.formats.float4 import E8M0
from compress.kernels import cpu, decode, groups
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared
from compress.kernels.rows import Rows
from compress.microscaling import E2M1, E4M3, Microscaling, search, weighting
from compress.scheme import Spec, Tensors
from compress.stats import Stats

BIAS = 127  # of E8M0: the byte e stands for 2**(e - 127)


@dataclass(frozen=True)
class _Mx(Microscaling):
    block = 32

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        self._check(weight)
        exponents = self._exponents(weight, stats)
        scales = E8M0[exponents.int()]
        return {**self._round(self._compensated(weight, scales, stats), scales), "weight_scale": exponents}

    @abstractmethod
    def _round(self, weight: Tensor, scales: Tensor) -> Tensors:
        """weight / scale to the nearest code. scales: (out_features, blocks) float32, powers of two."""

    def _exponents(self, weight: Tensor, stats: Stats | None) -> Tensor:
        """(out_features, blocks) uint8.

        The specification's rule (section 6.3) is floor(log2(largest of the block)) less that of the element type's
        largest. It cuts what lies beyond the latter, so one more or less may be nearer.
        """
        maxima = float8.absmax(weight, 1, self.block)
        largest = math.frexp(self.element.largest)[1] - 1
        # A larger scale than `top` only has codes that the dtype cannot hold, and those that `top` has too.
        top = math.frexp(torch.finfo(self.torch_dtype).max / self.element.largest)[1] - 1 + BIAS
        exponents = (float4.floor_exponent(maxima) - largest + BIAS).clamp(0, top)
        exponents = exponents.where(maxima > 0, BIAS).to(torch.uint8)
        if not self.search:
            return exponents
        return search(weight, exponents, E8M0, (0, 1, -1), top, self.element, weighting(stats))

    def _interchange(self, bits: int, layout: str) -> dict[str, Any]:
        weights = {
            "num_bits": bits,
            "type": "float",
            "symmetric": True,
            "group_size": self.block,
            "strategy": "group",
            "dynamic": False,
            "scale_dtype": "torch.uint8",
        }
        return {"format": layout, "weights": weights}


@dataclass(frozen=True)
class Mxfp4(_Mx):
    """4-bit floats (E2M1) with a power of two as scale for every 32 along in_features: OCP MXFP4.

    search tries the rule's exponent, one more and one less. On calibration data: method=gptq makes good the error of
    each column with the later ones; reorder sorts the channels between two layers, hadamard rotates those of value
    heads, both where that helps. dtype is filled in from the weight.
    """

    name = "mxfp4"
    element = E2M1

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        rows, width = shape
        return {
            "weight_packed": Spec(torch.uint8, (rows, width // 2)),
            "weight_scale": Spec(torch.uint8, (rows, width // self.block)),
        }

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        rows, half = specs["weight_packed"].shape
        return Spec(self.torch_dtype, (rows, 2 * half))

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        scales = tensors["weight_scale"]
        return decode.e2m1(tensors["weight_packed"], scales, E8M0.to(scales.device), self.block, self.torch_dtype)

    def loop(self, tensors: Tensors) -> Rows | None:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        return decode.e2m1_rows(packed, scales, E8M0, self.block, self.torch_dtype)

    def prepare(self, tensors: Tensors) -> Any:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        shape, block = (packed.shape[0], 2 * packed.shape[1]), (1, self.block)
        found = groups.on_gpu(packed, scales, shape, self.torch_dtype, 4, block, form="e2m1")
        return found or super().prepare(tensors)

    @property
    def row_tensors(self) -> frozenset[str]:
        return frozenset(["weight_packed", "weight_scale"])

    def product(self, tensors: Tensors) -> Product | None:
        packed, exponents = tensors["weight_packed"], tensors["weight_scale"]
        return cpu.tables(packed, exponents, float4.E2M1[None], self.block, (len(packed), 2 * packed.shape[1]))

    @property
    def interchange(self) -> dict[str, Any]:
        return self._interchange(4, "mxfp4-pack-quantized")

    def _round(self, weight: Tensor, scales: Tensor) -> Tensors:
        return {"weight_packed": float4.pack(float4.to_e2m1(weight, scales))}


@dataclass(frozen=True)
class Mxfp8(_Mx):
    """8-bit floats (E4M3) with a power of two as scale for every 32 along in_features: OCP MXFP8.

    search tries the rule's exponent, one more and one less. On calibration data: method=gptq makes good the error of
    each column with the later ones; reorder sorts the channels between two layers, hadamard rotates those of value
    heads, both where that helps. dtype is filled in from the weight.
    """

    name = "mxfp8"
    element = E4M3

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        rows, width = shape
        return {
            "weight": Spec(torch.float8_e4m3fn, (rows, width)),
            "weight_scale": Spec(torch.uint8, (rows, width // self.block)),
        }

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        return Spec(self.torch_dtype, specs["weight"].shape)

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        return decode.e4m3(tensors["weight"], _scales(tensors["weight_scale"]), (1, self.block), self.torch_dtype)

    def loop(self, tensors: Tensors) -> Rows | None:
        scales = _scales(tensors["weight_scale"])
        return decode.e4m3_rows(tensors["weight"], scales, (1, self.block), self.torch_dtype)

    def prepare(self, tensors: Tensors) -> Any:
        weight, scales = tensors["weight"], tensors["weight_scale"]
        shape, block = (weight.shape[0], weight.shape[1]), (1, self.block)
        found = groups.on_gpu(weight, scales, shape, self.torch_dtype, 8, block, form="e4m3")
        return found or super().prepare(tensors)

    @property
    def row_tensors(self) -> frozenset[str]:
        return frozenset(["weight", "weight_scale"])

    def product(self, tensors: Tensors) -> Product | None:
        return cpu.e4m3(tensors["weight"], tensors["weight_scale"], (1, self.block))

    @property
    def interchange(self) -> dict[str, Any]:
        return self._interchange(8, "mxfp8-quantized")

    def _round(self, weight: Tensor, scales: Tensor) -> Tensors:
        return {"weight": float8.to_e4m3(weight, scales, (1, self.block))}


def _scales(exponents: Tensor) -> Tensor:
    if exponents.device.type == "cpu":
        return exponents.view(torch.float8_e8m0fnu).float()  # sooner than they are looked up
    return E8M0.to(exponents.device)[exponents.int()]
