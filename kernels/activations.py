"""Activations in 8 bits: what a W8A8 linear layer multiplies with, in plain torch on any device.

Every value is divided by a scale, clamped, rounded to E4M3 or to an integer, and multiplied with the scale again. Each
step is rounded to the dtype of the activations, as compressed-tensors does it, so that the two agree to the last bit;
kernels that multiply in 8 bits round the quotient once, from float32.
"""

from typing import Any

import torch
from torch import Tensor

from compress.kernels.prepared import Prepared

E4M3_MAX = 448.0
INT8_MIN, INT8_MAX = -128.0, 127.0


def static_scale(tensors: Any) -> Tensor | None:
    """The scale of all activations that is stored beside a weight, if one is; None where each token has its own."""
    return tensors.input_scale if isinstance(tensors, Prepared) else tensors.get("input_scale")


def e4m3(x: Tensor, scale: Tensor | None = None, group_size: int | None = None) -> Tensor:
    """x: (..., in_features) bf16, fp16 or fp32. Returns x as E4M3 floats give it, in its shape and dtype.

    scale: (1,), for all of x. None: each token has its own, or each `group_size` values of a token, which must divide
    in_features; largest |x| / 448.
    """
    if group_size is not None:
        return e4m3(x.unflatten(-1, (x.shape[-1] // group_size, group_size)), scale).flatten(-2)
    scale = _spanning(x, E4M3_MAX) if scale is None else scale.to(x.dtype)
    # Clamped because torch 2.11 casts what lies beyond 448 to NaN.
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def int8(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x: (..., in_features) bf16, fp16 or fp32. Returns x as integers from -128 to 127 give it, in its shape and dtype.

    scale: (1,), for all of x. None: each token has its own, largest |x| / 127.5, half of what lies between the ends.
    """
    scale = _spanning(x, (INT8_MAX - INT8_MIN) / 2) if scale is None else scale.to(x.dtype)
    return (x / scale).clamp_(INT8_MIN, INT8_MAX).round_() * scale


def _spanning(x: Tensor, largest: float) -> Tensor:
    """(..., 1): the scale of each token."""
    # A tensor on the device: CUDA multiplies with the reciprocal of a number, which is rounded.
    scale = x.abs().amax(-1, keepdim=True) / x.new_full((), largest)
    return scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)
