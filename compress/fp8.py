"""fp8: weights as float8 E4M3 with a scale per tensor, output channel or 128x128 block; on request activations too.

The compressed-tensors `float-quantized` layout (blocks of weights alone: `naive-quantized`), as vLLM and transformers
read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compress.activations import Activations, form, input_scale
from compress.formats import float8
from compress.kernels import activations as kernels
from compress.kernels import cpu, decode, groups
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared, with_input_scale
from compress.kernels.rows import Rows
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats

BLOCK = 128


@dataclass(frozen=True)
class Fp8(Scheme):
    """8-bit floats (E4M3) with a scale per output channel, tensor or 128x128 block; activations too if asked for.

    w = weight * weight_scale; the largest E4M3 value is 448, and the scale has the source's dtype. activations=dynamic
    scales each token by its largest value (with blocks, each 128 values of it), static every token by the largest that
    calibration saw.
    """

    name = "fp8"
    granularity: Literal["channel", "tensor", "block"] = "channel"
    activations: Activations = "none"

    def __post_init__(self) -> None:
        if self.granularity == "block" and self.activations == "static":  # vLLM refuses it, and no preset has it
            raise ValueError(
                "fp8: granularity=block has no form with activations=static; take activations=dynamic, or "
                "granularity=channel"
            )

    @property
    def needs_ranges(self) -> bool:
        return self.activations == "static"

    @property
    def needs_calibration(self) -> bool:
        return self.activations == "static"

    def fit(self, shape: tuple[int, ...]) -> Fp8:
        """Groups of activations must divide in_features: where they do not, each token and each channel has a scale."""
        ragged = self.granularity == "block" and self.activations == "dynamic" and shape[1] % BLOCK != 0
        return replace(self, granularity="channel") if ragged else self

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        specs = {"weight": Spec(torch.float8_e4m3fn, shape), "weight_scale": Spec(dtype, self._scale_shape(shape))}
        return specs | ({"input_scale": Spec(dtype, (1,))} if self.activations == "static" else {})

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        return Spec(specs["weight_scale"].dtype, specs["weight"].shape)

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        rows, width = weight.shape
        static = self.activations == "static"
        static_scale = {"input_scale": input_scale(self.name, weight, stats, float8.E4M3_MAX)} if static else {}
        block = self._block((rows, width))
        scales = (float8.absmax(weight, *block) / float8.E4M3_MAX).to(weight.dtype)
        scales[scales == 0] = 1  # an all-zero block, or one so small that its scale underflows
        return {
            "weight": float8.to_e4m3(weight, scales, block if self.granularity == "block" else None),
            "weight_scale": scales.reshape(self._scale_shape((rows, width))),
            **static_scale,
        }

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        return decode.e4m3(tensors["weight"], *self._blocks(tensors))

    def loop(self, tensors: Tensors) -> Rows | None:
        return decode.e4m3_rows(tensors["weight"], *self._blocks(tensors))

    @property
    def row_tensors(self) -> frozenset[str]:
        names = {"channel": ["weight", "weight_scale"], "tensor": ["weight"], "block": []}
        return frozenset(names[self.granularity])

    def product(self, tensors: Tensors) -> Product | None:
        return cpu.e4m3(tensors["weight"], *self._blocks(tensors))

    def prepare(self, tensors: Tensors) -> Any:
        weight, (scales, block) = tensors["weight"], self._blocks(tensors)
        shape = (weight.shape[0], weight.shape[1])
        found = groups.on_gpu(weight, scales, shape, scales.dtype, 8, block, form="e4m3")
        return with_input_scale(found, tensors) or super().prepare(tensors)

    def _blocks(self, tensors: Tensors) -> tuple[Tensor, tuple[int, int]]:
        """The scales as (m, n), and the rows and columns that each is for."""
        rows, columns = tensors["weight"].shape
        block = self._block((rows, columns))
        return tensors["weight_scale"].reshape(-(-rows // block[0]), -(-columns // block[1])), block

    def linear(self, x: Tensor, tensors: Any, bias: Tensor | None = None) -> Tensor:
        if self.activations != "none":
            x = kernels.e4m3(x, kernels.static_scale(tensors), self._group_size)
        return super().linear(x, tensors, bias)

    @property
    def interchange(self) -> dict[str, Any]:
        weights = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": self.granularity,
            "dynamic": False,
        }
        if self.granularity == "block":
            weights["block_structure"] = [BLOCK, BLOCK]
        naive = self.granularity == "block" and self.activations == "none"
        return {
            "format": "naive-quantized" if naive else "float-quantized",
            "weights": weights,
            "input_activations": form("float", self.activations, self._group_size),
        }

    @property
    def _group_size(self) -> int | None:
        """How many values of a token share a scale of activations; None for all."""
        return BLOCK if self.granularity == "block" else None

    def _block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, width = max(1, shape[0]), max(1, shape[1])
        return {"tensor": (rows, width), "channel": (1, width), "block": (BLOCK, BLOCK)}[self.granularity]

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        blocks = (math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK))
        return {"tensor": (1,), "channel": (shape[0], 1), "block": blocks}[self.granularity]
