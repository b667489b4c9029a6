"""int4 and its other widths: group-wise integers in the compressed-tensors `pack-quantized` layout.

Weight-only, round to nearest with MSE-optimal clipping (`rtn.py`). Calibrated methods are not there yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compress import rtn
from compress.formats import bitpack
from compress.kernels import decode
from compress.scheme import Scheme, Spec, Tensors


@dataclass(frozen=True)
class Int4(Scheme):
    """Integers of 2 to 8 bits in groups along in_features: w = (q - zero) * scale, rounded to nearest.

    clip=mse searches each group's scale (and zero) for the least squared error; absmax spans the group's range.
    """

    name = "int4"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    method: Literal["rtn"] = "rtn"
    clip: Literal["mse", "absmax"] = "mse"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.name}: bits is {self.bits}; give 2 to 8")
        if self.group_size < 1:
            raise ValueError(f"{self.name}: group_size is {self.group_size}; give 1 or more, for example 128")

    def fit(self, shape: tuple[int, ...]) -> Int4:
        """A group that does not divide in_features gives way to the next that does.

        Halves down to 32 come first, because kernels elsewhere know them; then divisors down to 16; then the row.
        """
        width = shape[1]
        if width == 0 or width % self.group_size == 0:
            return self
        halves = [self.group_size >> i for i in range(self.group_size.bit_length()) if self.group_size >> i >= 32]
        candidates = [*halves, *range(min(self.group_size, width), 15, -1), width]
        return replace(self, group_size=next(group for group in candidates if width % group == 0))

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        rows, width = shape
        groups = width // self.group_size
        specs = {
            "weight_packed": Spec(torch.int32, (rows, math.ceil(width * self.bits / 32))),
            "weight_scale": Spec(dtype, (rows, groups)),
            "weight_shape": Spec(torch.int64, (2,)),
        }
        if not self.symmetric:  # packed along out_features, as compressed-tensors does
            specs["weight_zero_point"] = Spec(torch.int32, (math.ceil(rows * self.bits / 32), groups))
        return specs

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        rows, groups = specs["weight_scale"].shape
        return Spec(specs["weight_scale"].dtype, (rows, groups * self.group_size))

    def encode(self, weight: Tensor) -> Tensors:
        grid = rtn.quantize(weight, self.bits, self.group_size, self.symmetric, self.clip)
        tensors = {
            "weight_packed": grid.packed,
            "weight_scale": grid.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if grid.zeros is not None:
            tensors["weight_zero_point"] = bitpack.pack(grid.zeros.T.contiguous(), self.bits).T.contiguous()
        return tensors

    def decode(self, tensors: Tensors) -> Tensor:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        rows, groups = scales.shape
        zeros = None
        if not self.symmetric:
            zeros = bitpack.unpack(tensors["weight_zero_point"].T.contiguous(), self.bits, rows).T
        return decode.groups(packed, scales, zeros, self.bits, self.group_size)

    @property
    def interchange(self) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        return {"format": "pack-quantized", "weights": weights}


@dataclass(frozen=True)
class Int8(Int4):
    """The 8-bit preset of `int4`."""

    name = "int8"
    bits: int = 8
