"""Multiplying with integers and small floats with scales, where a kernel does it without decoding them first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.kernels import prepared
from compress.kernels.prepared import Prepared


def runs_on(device: torch.device) -> bool:
    return prepared.runs_triton(device)


@dataclass(frozen=True)
class OnGpu(Prepared):
    """A weight for the kernels of `kernels.groups_triton`, its dtype, and what activations are divided by."""

    weight: Any
    dtype: torch.dtype
    input_scale: Tensor | None = None

    def decode(self) -> Tensor:
        from compress.kernels import groups_triton  # imports triton, which a machine without a GPU need not have

        found: Tensor = groups_triton.decode(self.weight, self.dtype)
        return found

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        from compress.kernels import groups_triton

        few = x.numel() <= groups_triton.FUSED_TOKENS * x.shape[-1]
        return groups_triton.linear(x, self.weight, bias) if few and self.weight.fits else None


def on_gpu(
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    bits: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    **kind: Any,
) -> OnGpu | None:
    """Prepares a weight for the GPU that its tensors are on; None where the kernels do not run.

    The arguments are those of `groups_triton.prepare`, and the weight's dtype.
    """
    if not runs_on(codes.device) or 0 in shape:
        return None
    from compress.kernels import groups_triton

    return OnGpu(groups_triton.prepare(codes, scales, shape, bits, block, **kind), dtype)
