"""Where a loss comes from: the original with one layer at a time as it was compressed, all others as they were.

That takes a pass over the text for each layer. The sum of these divergences is not that of all layers together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.against import unchanged_weight
from compress.eval import fidelity
from compress.eval.predictions import Progress
from compress.formats import manifest
from compress.source import Source
from compress.stream import restored
from compress.structure import Linear, Structure

TOKENS = 4096  # that each layer is measured on


def check(out: Path) -> None:
    """Raises ValueError for a directory without a manifest, which says what became of each layer."""
    if not (out / manifest.NAME).exists():
        raise ValueError(f"{out}: no {manifest.NAME}; layers are compared only in what `compress quantize` wrote")


def sensitivity(
    out: Path, original: Any, windows: Tensor, folder: Path, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A line for each compressed linear layer: `name`, `kl` and `kl_stderr` in nats, most first.

    original: the uncompressed model, in memory; its weights are put back. windows: (n, length) int64, of which the
    first 4096 tokens are used. folder: for its predictions. Layers that a lossless scheme coded are left out.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    predictions = folder / "layers.zip"
    fidelity.record(original, windows, predictions)
    document = manifest.unseal(out / manifest.NAME)
    ledger, packed = document["ledger"], restored(Source(out), document)
    linears = Structure(original, packed.specs).linears
    names = [m for m, packed_as in packed.packed.items() if m in linears and not packed_as.scheme.lossless]
    lines = []
    for done, module in enumerate(names):
        linear = linears[module]
        weight = turned(packed.read(linear.source, linear.index), linear)
        weight = turned(unchanged_weight(weight, ledger[linear.source], module), linear)
        with _in_place_of(place(original, linear, linears.values()), weight):
            found = fidelity.compare(original, windows, predictions, 1)
        lines.append({"name": module, "kl": found.kl_mean, "kl_stderr": found.kl_stderr})
        packed.release(linear.source)
        if progress:
            progress("layers", done + 1, len(names))
    return sorted(lines, key=lambda line: -line["kl"])


@contextlib.contextmanager
def _in_place_of(parameter: Tensor, weight: Tensor) -> Iterator[None]:
    """The weight, in place of a layer's own within the block."""
    before = parameter.clone()
    parameter.copy_(weight)
    try:
        yield
    finally:
        parameter.copy_(before)


def turned(weight: Tensor, linear: Linear) -> Tensor:
    """Between the way it is stored, which is also that of the model's parameter, and (out_features, in_features)."""
    return weight.T if linear.transposed else weight


def place(model: Any, linear: Linear, linears: Iterable[Linear]) -> Tensor:
    """The part of a parameter of the model that a layer is: a view. linears: all of the model."""
    if linear.expert is None:
        parameter: Tensor = model.get_parameter(f"{linear.path}.weight").data
        return parameter
    stack: Tensor = model.get_parameter(linear.path).data[linear.expert]
    parts = sorted(other.part for other in linears if (other.path, other.expert) == (linear.path, linear.expert))
    return stack.chunk(len(parts), 1 if linear.transposed else 0)[parts.index(linear.part)]
