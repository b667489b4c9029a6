"""fp8: weights as float8 E4M3 with a scale per tensor, output channel or 128x128 block. Activations stay as they are.

The compressed-tensors `float-quantized` layout (blocks: `naive-quantized`), as vLLM and transformers read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.formats import float8
from compress.kernels import decode
from compress.scheme import Scheme, Spec, Tensors

BLOCK = 128


@dataclass(frozen=True)
class Fp8(Scheme):
    """8-bit floats (E4M3) with a scale per output channel, tensor or 128x128 block.

    w = weight * weight_scale; the largest E4M3 value is 448, and the scale has the source's dtype.
    """

    name = "fp8"
    granularity: Literal["channel", "tensor", "block"] = "channel"

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        return {"weight": Spec(torch.float8_e4m3fn, shape), "weight_scale": Spec(dtype, self._scale_shape(shape))}

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        return Spec(specs["weight_scale"].dtype, specs["weight"].shape)

    def encode(self, weight: Tensor) -> Tensors:
        rows, width = weight.shape
        block = self._block((rows, width))
        scales = (float8.absmax(weight, *block) / float8.E4M3_MAX).to(weight.dtype)
        scales[scales == 0] = 1  # an all-zero block, or one so small that its scale underflows
        return {
            "weight": float8.to_e4m3(weight, scales, block if self.granularity == "block" else None),
            "weight_scale": scales.reshape(self._scale_shape((rows, width))),
        }

    def decode(self, tensors: Tensors) -> Tensor:
        weight, scales = tensors["weight"], tensors["weight_scale"]
        block = self._block((weight.shape[0], weight.shape[1]))
        return decode.e4m3(
            weight, scales.reshape(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])), block
        )

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
            return {"format": "naive-quantized", "weights": {**weights, "block_structure": [BLOCK, BLOCK]}}
        return {"format": "float-quantized", "weights": weights}

    def _block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, width = max(1, shape[0]), max(1, shape[1])
        return {"tensor": (rows, width), "channel": (1, width), "block": (BLOCK, BLOCK)}[self.granularity]

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        blocks = (math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK))
        return {"tensor": (1,), "channel": (shape[0], 1), "block": blocks}[self.granularity]
