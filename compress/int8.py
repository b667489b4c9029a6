"""int8: the 8-bit preset of `int4`; with quantized activations (W8A8), the compressed-tensors `int-quantized` layout.

Then outliers of the activations are moved into the weights beforehand (`smooth.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compress.activations import Activations, form, input_scale
from compress.fold import Kind
from compress.int4 import Int4
from compress.kernels import activations as kernels
from compress.kernels import decode, groups
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared, with_input_scale
from compress.kernels.rows import Rows
from compress.scheme import Spec, Tensors
from compress.stats import Stats


@dataclass(frozen=True)
class Int8(Int4):
    """The 8-bit preset of `int4`; with activations=dynamic or static, int8 times int8 and a scale per output channel.

    dynamic scales each token by its largest value, static every token by the largest that calibration saw. smooth moves
    outliers of the inputs into the weights first, where that helps on calibration data (SmoothQuant).
    """

    name = "int8"
    bits: int = 8
    method: Literal["awq+gptq", "gptq", "awq", "rtn"] = "rtn"  # at 8 bits there is next to nothing to make good
    activations: Activations = "none"
    smooth: bool = True  # means nothing with activations=none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._quantizes and (self.bits, self.group_size, self.symmetric) != (8, Int4.group_size, True):
            raise ValueError(
                f"int8: with activations={self.activations}, weights are symmetric 8-bit integers with a scale per "
                "output channel; leave out bits, group_size and symmetric"
            )

    @property
    def needs_ranges(self) -> bool:
        return self.activations == "static"

    @property
    def needs_calibration(self) -> bool:
        return self._smooths or self.activations == "static" or super().needs_calibration

    @property
    def needs_hessian(self) -> bool:
        return self.method != "rtn"

    @property
    def needs_sample(self) -> bool:
        return self._smooths

    @property
    def folds(self) -> frozenset[Kind]:
        return frozenset(["scale"]) if self._smooths else super().folds

    def fit(self, shape: tuple[int, ...]) -> Int4:
        return self if self._quantizes else super().fit(shape)

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        if not self._quantizes:
            return super().specs(shape, dtype)
        specs = {"weight": Spec(torch.int8, shape), "weight_scale": Spec(dtype, (shape[0], 1))}
        return specs | ({"input_scale": Spec(dtype, (1,))} if self.activations == "static" else {})

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        if not self._quantizes:
            return super().original(specs)
        return Spec(specs["weight_scale"].dtype, specs["weight"].shape)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        if not self._quantizes:
            return super().encode(weight, stats)
        width = weight.shape[1]
        static = self.activations == "static"
        scales = {"input_scale": input_scale(self.name, weight, stats, kernels.INT8_MAX)} if static else {}
        packed = replace(self, activations="none", group_size=width).encode(weight, stats)
        codes = packed["weight_packed"].view(torch.uint8)[:, :width] ^ 128  # q + 128 as two's complement
        return {"weight": codes.view(torch.int8), "weight_scale": packed["weight_scale"], **scales}

    def decode(self, tensors: Any) -> Tensor:
        if not self._quantizes or isinstance(tensors, Prepared):
            return super().decode(tensors)
        weight, scales = tensors["weight"], tensors["weight_scale"]
        decoded: Tensor = weight.to(scales.dtype) * scales.view(-1, 1)  # others write (out_features,)
        return decoded

    def loop(self, tensors: Tensors) -> Rows | None:
        if not self._quantizes:
            return super().loop(tensors)
        return decode.int8_rows(tensors["weight"], tensors["weight_scale"].view(-1, 1))

    @property
    def row_tensors(self) -> frozenset[str]:
        return frozenset(["weight", "weight_scale"]) if self._quantizes else super().row_tensors

    def prepare(self, tensors: Tensors) -> Any:
        if not self._quantizes:
            return super().prepare(tensors)
        weight, scales = tensors["weight"], tensors["weight_scale"]
        shape = (weight.shape[0], weight.shape[1])
        found = groups.on_gpu(weight, scales, shape, scales.dtype, 8, (1, max(1, shape[1])), form="signed")
        return with_input_scale(found, tensors) or tensors

    def product(self, tensors: Tensors) -> Product | None:
        return None if self._quantizes else super().product(tensors)

    def linear(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor:
        if self._quantizes:
            x = kernels.int8(x, kernels.static_scale(tensors))
        return super().linear(x, tensors, bias)

    @property
    def interchange(self) -> dict[str, Any]:
        if not self._quantizes:
            return super().interchange
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        return {"format": "int-quantized", "weights": weights, "input_activations": form("int", self.activations)}

    @property
    def _quantizes(self) -> bool:
        return self.activations != "none"

    @property
    def _smooths(self) -> bool:
        return self.smooth and self._quantizes
