"""The option `activations` of fp8 and int8: how the inputs of a linear layer are quantized.

none: not at all. dynamic: when the model runs, with a scale for each token. static: with one scale, from calibration.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from compress.stats import Stats

Activations = Literal["none", "dynamic", "static"]


def input_scale(name: str, weight: Tensor, stats: Stats | None, largest: float) -> Tensor:
    """The static scale, (1,) in the dtype of the (out_features, in_features) weight: it takes the largest input that
    calibration saw to `largest`.

    name: of the scheme. Raises ValueError without calibration, or where that was of another layer or not finite.
    """
    if stats is None:
        raise ValueError(
            f"{name}: activations=static needs calibration data; give --calibration, or take activations=dynamic"
        )
    if stats.absmax.shape != weight.shape[1:]:
        raise ValueError(f"{name}: {len(stats.absmax)} channels were calibrated, and in_features is {weight.shape[1]}")
    scale = (stats.absmax.max() / largest).to(weight.dtype)
    if not scale.isfinite():
        raise ValueError(
            f"{name}: the largest input in calibration is {stats.absmax.max()}; give data on which the model is finite"
        )
    return (scale if scale > 0 else scale.new_ones(())).reshape(1)  # inputs that were all zeros


def form(kind: str, activations: Activations, group_size: int | None = None) -> dict[str, Any] | None:
    """The `input_activations` of a compressed-tensors config group. kind: "float" or "int"."""
    shared = {"num_bits": 8, "type": kind, "symmetric": True}
    if activations == "none":
        return None
    if activations == "static":
        return {**shared, "strategy": "tensor", "dynamic": False}
    if group_size is not None:
        return {**shared, "strategy": "group", "group_size": group_size, "dynamic": True}
    return {**shared, "strategy": "token", "dynamic": True}
