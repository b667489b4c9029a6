"""The memory that a run will need, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compress.hollow import decoder_blocks
from compress.planning import Plan, weight_shape
from compress.scheme import Spec
from compress.structure import Structure

TRAINED_BYTES = 13  # for a weight: its index, itself and its gradient decoded, its place


def calibration_bytes(plan: Plan, structure: Structure, specs: Mapping[str, Spec]) -> int:
    """At most what a block takes in float32, as it is and as it was, with a Hessian for each layer that wants one and
    what is missing to it and with what is trained, or with gradients and their squares; beside it the head, where
    gradients come from it, and embeddings whose channels are reordered, which are then no longer mapped. Activations
    are not counted, which lie in files but for one batch, or while gradients are taken for one sample."""
    if not plan.needs_calibration:
        return 0
    model, linears = structure.model, structure.linears
    sizes = {name: 4 * sum(p.numel() for p in block.parameters()) for name, block in decoder_blocks(model).items()}
    for module, packed in plan.modules.items():
        scheme = packed.scheme
        if module in linears and (scheme.needs_hessian or scheme.needs_fisher or scheme.refines):
            block = next((name for name in sizes if linears[module].path.startswith(f"{name}.")), "")
            rows, width = weight_shape(packed, specs[packed.source])
            fitted = 4 * width * (width + 2 * rows) if scheme.needs_hessian else 0
            trained = (4 + TRAINED_BYTES) * rows * width if scheme.refines else 0
            measured = 8 * rows * width if scheme.needs_fisher else 0
            sizes[block] = sizes.get(block, 0) + max(fitted + trained, measured)
    schemes = [packed.scheme for packed in plan.modules.values()]
    head = model.get_output_embeddings()
    beside = 4 * head.weight.numel() if head is not None and any(scheme.needs_fisher for scheme in schemes) else 0
    if any("order" in scheme.folds for scheme in schemes):
        size = max((spec.dtype.itemsize for spec in specs.values()), default=0)
        beside += 2 * size * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    return max(sizes.values(), default=0) + beside
