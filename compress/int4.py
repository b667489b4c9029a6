"""int4 and its other widths: group-wise integers in the compressed-tensors `pack-quantized` layout.

Weight-only. Scales with MSE-optimal clipping (`rtn.py`), after AWQ's (`awq.py`); integers rounded to nearest, or with
GPTQ (`gptq.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compress import descent, gptaq, gptq, rtn
from compress.fold import Kind
from compress.formats import bitpack
from compress.kernels import cpu, decode, groups
from compress.kernels.cpu import Product
from compress.kernels.op import Packed
from compress.kernels.prepared import Prepared
from compress.kernels.rows import Rows
from compress.scheme import Scheme, Spec, Tensors
from compress.stats import Stats


@dataclass(frozen=True)
class Int4(Scheme):
    """Integers of 2 to 8 bits in groups along in_features: w = (q - zero) * scale.

    method: awq scales channels by how much they carry, gptq makes good the error of each column with the later ones,
    both on calibration data; rtn rounds to nearest.
    clip=mse searches each group's scale (and zero) for the least squared error; absmax spans the group's range.
    """

    name = "int4"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    method: Literal["awq+gptq", "gptq", "awq", "rtn"] = "awq+gptq"
    clip: Literal["mse", "absmax"] = "mse"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self.name}: bits is {self.bits}; give 2 to 8")
        if self.group_size < 1:
            raise ValueError(f"{self.name}: group_size is {self.group_size}; give 1 or more, for example 128")

    @property
    def needs_calibration(self) -> bool:
        return self.method != "rtn"

    @property
    def needs_hessian(self) -> bool:
        return self.method != "rtn"

    @property
    def folds(self) -> frozenset[Kind]:
        return frozenset(["scale"] if "awq" in self.method else [])

    def fit(self, shape: tuple[int, ...]) -> Int4:
        """A group that does not divide in_features gives way to the next that does.

        Halves down to 32 come first, because kernels elsewhere know them; then divisors down to 16, or to half of the
        group where that is less; then the row.
        """
        width = shape[1]
        if width == 0 or width % self.group_size == 0:
            return self
        halves = [self.group_size >> i for i in range(self.group_size.bit_length()) if self.group_size >> i >= 32]
        least = min(16, (self.group_size + 1) // 2)
        candidates = [*halves, *range(min(self.group_size, width), least - 1, -1), width]
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

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        if stats is not None and stats.hessian is not None and "gptq" in self.method:
            grid = self._compensated(weight, gptaq.target(weight, stats), stats.hessian)
        else:
            grid = rtn.quantize(weight, self.bits, self.group_size, self.symmetric, self.clip)
        tensors = {
            "weight_packed": grid.packed,
            "weight_scale": grid.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if grid.zeros is not None:
            tensors["weight_zero_point"] = bitpack.pack(grid.zeros.T.contiguous(), self.bits).T.contiguous()
        return tensors

    def _compensated(self, weight: Tensor, target: Tensor, hessian: Tensor) -> rtn.Grid:
        """The integers that GPTQ chooses for a target on its own grid, and both as they are after descent."""
        rounded = target.to("cpu", weight.dtype)
        grid = rtn.quantize(rounded, self.bits, self.group_size, self.symmetric, self.clip)
        scales, most = grid.scales.T.float().contiguous().to(hessian.device), 2**self.bits - 1
        zeros = torch.full_like(scales, 2 ** (self.bits - 1)) if grid.zeros is None else grid.zeros.T.to(scales)
        codes = torch.empty_like(target.T, memory_format=torch.contiguous_format)

        def nearest(column: Tensor, number: int) -> Tensor:
            scale, zero = scales[number // self.group_size], zeros[number // self.group_size]
            code = (column / scale).round_().add_(zero).clamp_(0, most)
            codes[number] = code
            return code.sub_(zero).mul_(scale)

        gptq.compensate(target, hessian, nearest)
        found = descent.Grid(codes, scales, zeros, most, weight.dtype)
        descent.descend(target, gptq.damped(hessian), found)
        packed = bitpack.pack(codes.to(torch.uint8).T.contiguous().cpu(), self.bits)
        return replace(grid, packed=packed, scales=scales.T.to("cpu", weight.dtype).contiguous())

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        return decode.groups(packed, scales, self._zeros(tensors), self.bits, self.group_size)

    def loop(self, tensors: Tensors) -> Rows | None:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        return decode.groups_rows(packed, scales, self._zeros(tensors), self.bits, self.group_size)

    def rows(self, tensors: Any, index: Tensor) -> Tensor:
        flat = index.flatten()
        if isinstance(tensors, Packed):
            found = groups.decode(tensors.weight.chosen(flat))
            return found.view(*index.shape, found.shape[1])
        if "weight_packed" not in tensors:
            return super().rows(tensors, index)
        zeros, stored = self._zeros(tensors), (tensors["weight_packed"][flat], tensors["weight_scale"][flat])
        found = decode.groups(*stored, None if zeros is None else zeros[flat], self.bits, self.group_size)
        return found.view(*index.shape, found.shape[1])

    def prepare(self, tensors: Tensors) -> Any:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        shape, zeros = (len(scales), scales.shape[1] * self.group_size), self._zeros(tensors)
        block = (1, self.group_size)
        found = groups.on_gpu(packed, scales, shape, scales.dtype, self.bits, block, zeros=zeros)
        return found or super().prepare(tensors)

    def product(self, tensors: Tensors) -> Product | None:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        columns = scales.shape[1] * self.group_size
        return cpu.integers(packed, scales, self._zeros(tensors), self.bits, self.group_size, columns)

    def _zeros(self, tensors: Tensors) -> Tensor | None:
        """(out_features, groups) uint8."""
        if self.symmetric:
            return None
        zeros, rows = tensors["weight_zero_point"].T.contiguous(), len(tensors["weight_scale"])
        return bitpack.unpack(zeros, self.bits, rows).T.contiguous()

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
