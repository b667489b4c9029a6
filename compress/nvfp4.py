"""nvfp4: NVIDIA's 4-bit floats, E2M1 in blocks of 16 with an E4M3 scale each and one float32 scale for the tensor.

The compressed-tensors `nvfp4-pack-quantized` layout, weight-only: w = code * weight_scale / weight_global_scale. Of an
E4M3 scale's neighbours the best one is searched, which has the choice of "four over six" (arXiv:2512.02010), where a
block's largest value becomes 4 instead of 6, among others. Rotations are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.formats import float4, float8
from compress.formats.float4 import E2M1_MAX
from compress.formats.float8 import E4M3_MAX
from compress.kernels import cpu, decode, groups
from compress.kernels.cpu import Product
from compress.kernels.prepared import Prepared
from compress.kernels.rows import Rows
from compress.microscaling import E2M1, Microscaling, search, weighting
from compress.scheme import Spec, Tensors
from compress.stats import Stats

LARGEST = 0x7E  # the E4M3 byte of 448
ONE = 0x38
STEPS = (0, -1, -2, 1, 2, 3, 4, 5, 6)  # an octave has 8
# vLLM runs q, k and v, and gate and up, as one linear with one global scale (its issue 41045), so all should have the
# same. A power of two loses nothing, because E4M3 is as fine at any size. Blocks with a maximum of 6 * 2**-14 to
# 6 * 448 / 2**8 suit this one: 3.7e-4 to 10.5.
USUAL = 8


@dataclass(frozen=True)
class Nvfp4(Microscaling):
    """4-bit floats (E2M1) with an E4M3 scale for every 16 along in_features, and a scale for the tensor: NVFP4.

    search tries the E4M3 neighbours of each scale. On calibration data: method=gptq makes good the error of each column
    with the later ones; reorder sorts the channels between two layers, hadamard rotates those of value heads, both
    where that helps. dtype is filled in from the weight.
    """

    name = "nvfp4"
    block = 16
    element = E2M1

    def specs(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        rows, width = shape
        return {
            "weight_packed": Spec(torch.uint8, (rows, width // 2)),
            "weight_scale": Spec(torch.float8_e4m3fn, (rows, width // self.block)),
            "weight_global_scale": Spec(torch.float32, (1,)),
        }

    def original(self, specs: Mapping[str, Spec]) -> Spec:
        rows, half = specs["weight_packed"].shape
        return Spec(self.torch_dtype, (rows, 2 * half))

    def encode(self, weight: Tensor, stats: Stats | None = None) -> Tensors:
        self._check(weight)
        limit = torch.finfo(self.torch_dtype).max
        maxima = float8.absmax(weight, 1, self.block).clamp(max=limit)
        divisor = 2.0 ** _global_exponent(maxima)
        scales = float8.E4M3[: LARGEST + 1] / divisor  # positive, ascending
        top = int((scales * E2M1_MAX <= limit).sum()) - 1  # the largest scale whose 6 the dtype can hold
        codes = float8.to_e4m3(maxima / E2M1_MAX * divisor, torch.tensor(1.0)).view(torch.uint8).clamp(1, top)
        codes[maxima == 0] = ONE
        if self.search:
            codes = search(weight, codes, scales, STEPS, top, E2M1, weighting(stats))
        chosen = scales[codes.int()]
        return {
            "weight_packed": float4.pack(float4.to_e2m1(self._compensated(weight, chosen, stats), chosen)),
            "weight_scale": codes.view(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([divisor]),
        }

    def prepare(self, tensors: Tensors) -> Any:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        shape, block = (packed.shape[0], 2 * packed.shape[1]), (1, self.block)
        by = tensors["weight_global_scale"]
        found = groups.on_gpu(packed, scales, shape, self.torch_dtype, 4, block, "e2m1", divisor=by)
        return found or super().prepare(tensors)

    def decode(self, tensors: Any) -> Tensor:
        """tensors: as stored, or as `prepare` returns them."""
        if isinstance(tensors, Prepared):
            return tensors.decode()
        return decode.e2m1(*self._codes(tensors))

    def loop(self, tensors: Tensors) -> Rows | None:
        return decode.e2m1_rows(*self._codes(tensors))

    def _codes(self, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, int, torch.dtype]:
        """As `decode.e2m1` takes them."""
        scales = tensors["weight_scale"].view(torch.uint8)
        steps = float8.E4M3.to(scales.device) / tensors["weight_global_scale"].flatten()  # others write it as (1, 1)
        return tensors["weight_packed"], scales, steps, self.block, self.torch_dtype

    @property
    def row_tensors(self) -> frozenset[str]:
        return frozenset(["weight_packed", "weight_scale"])

    def product(self, tensors: Tensors) -> Product | None:
        packed, scales = tensors["weight_packed"], tensors["weight_scale"]
        factor, shape = 1 / float(tensors["weight_global_scale"]), (len(packed), 2 * packed.shape[1])
        return cpu.tables(packed, scales, float4.E2M1[None], self.block, shape, factor=factor)

    @property
    def interchange(self) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "group_size": self.block,
            "strategy": "tensor_group",
            "dynamic": False,
            "scale_dtype": "torch.float8_e4m3fn",
        }
        return {"format": "nvfp4-pack-quantized", "weights": weights}


def _global_exponent(maxima: Tensor) -> int:
    """Of the global scale. maxima: of the blocks. The usual one, where the largest scale is 1/8 to 448 by it."""
    largest = float(maxima.max()) / E2M1_MAX if maxima.numel() else 0.0
    if largest == 0 or 0.125 <= largest * 2**USUAL <= E4M3_MAX:
        return USUAL
    # float32 holds every scale divided by these.
    return max(-117, min(117, math.floor(math.log2(E4M3_MAX / largest))))
