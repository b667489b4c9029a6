"""Fisher information of weights (SqueezeLLM [2306.07629]): mean over samples of the squared gradient of their loss.

Its diagonal, and its value along each weight, which coarse grids make shorter as a whole. The next tokens are drawn
from what the model itself predicts, and are not the text's: then the gradient is zero on average, and its square is the
curvature of the KL divergence (Kunstner et al. [1905.12558]). On text that the model does not predict well, the text's
own make it ten times as large, and larger in other layers.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.backwards import Backwards
from compress.change import Change
from compress.job import Job
from compress.progress import Progress
from compress.source import Source
from compress.structure import Linear
from compress.walk import is_whole, tensors_of

STAGE = "differentiating"
ALONG = "along"


@dataclass(frozen=True)
class Squares:
    """What was measured, in files of a job, which notes the seconds of all runs that had a part in it."""

    files: list[Path]

    def of(self, module: str) -> Tensor | None:
        """(out_features, in_features) float32; None where the loss does not depend on it, or it lies elsewhere."""
        return self._read(module)

    def along(self, module: str) -> float | None:
        """Of the factor of a weight as a whole."""
        found = self._read(f"{module}|{ALONG}")
        return None if found is None else found.item()

    def _read(self, name: str) -> Tensor | None:
        for file in self.files:
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():
                    found: Tensor = tensors.get_tensor(name)
                    return found
        return None


def measure(
    job: Job,
    source: Source,
    linears: Mapping[str, Linear],
    samples: Tensor,
    device: str,
    progress: Progress | None = None,
) -> Squares:
    """Of those of `linears` that lie in blocks, and of the head. samples: (n, length) int64 tokens, 2 or more each.

    An interrupted run goes on at the block that it had come to. Raises ValueError for gradients that are not finite.
    """
    folder, started = job.scratch / STAGE, time.monotonic()
    new: dict[str, Any] = {"source": source.identity(), "blocks": [], "left": None, "seconds": 0.0}
    known = job.recall(STAGE) or new
    if known["source"] != new["source"]:  # measured with the channels of weights in another order
        known = new
    model = Backwards(source, linears, samples, folder, device)
    model.leave(known["blocks"])
    if not (model.ready(_between(known["left"], model)) and all(map(is_whole, _files(job, model, known["left"])))):
        known = new
        model = Backwards(source, linears, samples, folder, device)

    def note(left: int | None) -> None:
        seconds = known["seconds"] + time.monotonic() - started
        job.note(STAGE, {**new, "blocks": model.order[:-1], "left": left, "seconds": seconds})

    while known["left"] is None and (block := model.next()) is not None:
        model.open(block)
        model.close(block)
        model.leave([block])
        note(None)
    steps = len(model.order)
    for step in reversed(range(steps if known["left"] is None else known["left"])):
        save_file(_squares(model, step, len(samples)), tensors_of(job, STAGE, model.order[step]))
        note(step)
        model.forget(step + 1)
        if progress:
            progress(STAGE, steps - step, steps, model.order[step] or "head")
    shutil.rmtree(folder, ignore_errors=True)
    return Squares(_files(job, model, 0))


def changed(squares: Tensor, outputs: Change | None) -> Tensor:
    """Those of a weight (out_features, in_features) whose output channels are changed; where these are rotated each
    gets the mean of those that are together."""
    if outputs is None:
        return squares
    scale = None if outputs.scale is None else outputs.scale**-2  # what is made smaller has the larger gradient
    squares = Change(scale, outputs.order).made(squares.T).T
    if outputs.rotation is None:
        return squares
    size = int(outputs.rotation)
    means: Tensor = squares.unflatten(0, (-1, size)).mean(1)
    return means.repeat_interleave(size, 0)


def _squares(model: Backwards, step: int, samples: int) -> dict[str, Tensor]:
    """Means over the samples, by module; and those of the squared derivatives along the weights, by longer names."""
    sums: dict[str, Tensor] = {}
    for gradients in model.gradients(step):
        for module, (gradient, derivative) in gradients.items():
            along = f"{module}|{ALONG}"
            sums[along] = sums.get(along, torch.zeros(1)) + derivative**2
            square = gradient.square()
            sums[module] = square if module not in sums else sums[module].add_(square)
    for module, total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(
                f"{module}: the gradient of the loss has NaN or infinity in it; leave out sensitivity=fisher or "
                "--target-size"
            )
    return {module: total.div_(samples).cpu().contiguous() for module, total in sums.items()}


def _between(left: int | None, model: Backwards) -> int | None:
    """The step whose gradients the next one needs: none before the first and after the last."""
    return left if left != len(model.order) else None


def _files(job: Job, model: Backwards, left: int | None) -> list[Path]:
    """What was made when so many steps are left."""
    return [] if left is None else [tensors_of(job, STAGE, block) for block in model.order[left:]]
