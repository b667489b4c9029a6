"""Calibration: text runs through the model, and each block is measured and compressed before the next one is run.

So a layer is fitted to the inputs that it will see, which come from compressed layers. In memory are one block, its
statistics and one batch of activations; the rest lies in files of the job, from where an interrupted run goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress import awq
from compress.blocks import OUTSIDE, Blocks
from compress.fold import Fold, folded_norm, scaled
from compress.gptq import NotPositiveDefinite
from compress.job import Job
from compress.pipeline import INPUTS, OUTPUTS, Fitted, check_finite, read_weight
from compress.planning import Plan
from compress.scheme import Tensors
from compress.source import Source
from compress.stats import Stats
from compress.structure import Linear

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is

ROWS = 512  # of a weight that AWQ's search looks at


@dataclass(frozen=True)
class Calibration:
    """Where the text comes from, and how much of it is run: the arguments of `samples.draw`."""

    source: str = "builtin"
    samples: int = 128
    seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.seq_len is not None and self.seq_len < 2):
            raise ValueError(f"{self}: give 1 sample or more, of 2 tokens or more")


@dataclass(frozen=True)
class Calibrated:
    """fitted: what was made of each module; and, by their names, of other tensors that a scale was folded into."""

    fitted: dict[str, Fitted]
    seconds: float  # in all runs that had a part in it


def calibrate(
    job: Job,
    source: Source,
    plan: Plan,
    linears: Mapping[str, Linear],
    samples: Tensor,
    device: str | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Fits every linear that a lossy scheme is planned for and that the text reaches.

    samples: (n, length) int64 tokens. device: where blocks run; None for cuda where there is one, else cpu.
    """
    planned = {m: linears[m] for m, packed in plan.modules.items() if m in linears and not packed.scheme.lossless}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    blocks = Blocks(source, planned, samples, job.scratch / "activations", device)
    known = {block: job.recall(_step(block)) for block in (*blocks.names, OUTSIDE)}
    done = {block: noted for block, noted in known.items() if noted is not None}
    blocks.leave(block for block in done if block != OUTSIDE)
    if not (blocks.ready() and all(_is_whole(_file(job, block)) for block in done)):
        blocks, done = Blocks(source, planned, samples, job.scratch / "activations", device), {}
    while (block := blocks.next()) is not None:
        done[block] = _Block(job, source, plan, planned, blocks, block).fit()
        blocks.leave([block])
        if progress:
            progress("calibrating", len(done), len(blocks.names))
    if OUTSIDE not in done and blocks.linears(OUTSIDE):
        done[OUTSIDE] = _Block(job, source, plan, planned, blocks, OUTSIDE).fit()
    lines = {block: noted["lines"] for block, noted in done.items()}
    fitted = {name: Fitted(_file(job, block), **line) for block in lines for name, line in lines[block].items()}
    return Calibrated(fitted, sum(noted["seconds"] for noted in done.values()))


class _Block:
    """One block while it is compressed."""

    def __init__(
        self, job: Job, source: Source, plan: Plan, linears: Mapping[str, Linear], blocks: Blocks, block: str
    ) -> None:
        self._job, self._source, self._blocks, self._block = job, source, blocks, block
        self._packed = {module: plan.modules[module] for module in blocks.linears(block)}
        self._modules = {linears[module].path: module for module in self._packed if linears[module].expert is None}
        self._coded = {packed.source for packed in plan.modules.values()}
        self._inputs: dict[str, Tensor] = {}  # module -> what its input channels are multiplied with,
        self._outputs: dict[str, Tensor] = {}  # and its output channels divided by
        self._made: dict[str, Tensors] = {}
        self._lines: dict[str, dict[str, Any]] = {}

    def fit(self) -> dict[str, Any]:
        """Returns what the report says of each module, and of each tensor that a scale was folded into; and seconds."""
        blocks, block, started = self._blocks, self._block, time.monotonic()
        blocks.open(block)
        hessians = {module for module, packed in self._packed.items() if packed.scheme.needs_hessian}
        stats = blocks.measure(block, hessians) if self._packed else {}
        for module, measured in stats.items():
            if measured is not None and not measured.second_moment.isfinite().all():
                raise ValueError(f"{module}: its inputs hold NaN or infinity on the calibration text; repair the model")
        if block != OUTSIDE and any(packed.scheme.wants_scaled_inputs for packed in self._packed.values()):
            for fold in blocks.folds(block):
                self._scale(fold, stats)
        for module in self._packed:
            stored = self._encode(module, stats[module])
            if block != OUTSIDE:
                blocks.set(module, stored)
        Fitted.save(_file(self._job, block), self._made)
        if block != OUTSIDE:
            blocks.close(block)
        done = {"lines": self._lines, "seconds": time.monotonic() - started}
        self._job.note(_step(block), done)
        return done

    def _scale(self, fold: Fold, stats: Mapping[str, Stats | None]) -> None:
        """Folds the scale that suits the readers, if all of them want one and encoding them with it errs less."""
        readers = [self._modules.get(path) for path in fold.readers]
        modules = [module for module in readers if module is not None]
        measured = [stats[module] for module in modules]
        if len(modules) < len(readers) or not all(self._packed[m].scheme.wants_scaled_inputs for m in modules):
            return
        first = measured[0]
        producer = self._modules.get(fold.producer)
        norm = self._blocks.stored(f"{fold.producer}.weight") if self._blocks.is_norm(fold.producer) else None
        bias = self._blocks.stored(f"{fold.producer}.bias")
        if first is None or first.hessian is None or (producer is None and norm is None):
            return
        if norm in self._coded or bias in self._coded:  # another scheme stores it as it is in the source
            return
        weights = {module: _some_rows(read_weight(self._source, self._packed[module])).float() for module in modules}
        rounded = [self._stored(module) for module in modules]
        mean = fold.columns(fold.channels(first.absmean))
        columns = awq.search(list(weights.values()), rounded, first.hessian, mean)
        try:
            if self._loss(weights, columns, first) >= self._loss(weights, torch.ones_like(columns), first):
                return
        except NotPositiveDefinite:
            return
        scale = fold.channels(columns)
        if norm is not None:
            stored, scale = folded_norm(self._source.read(norm), scale, fold.offset)
            self._copy(f"{fold.producer}.weight", stored)
        if producer is not None:
            self._outputs[producer] = scale
        if bias is not None:
            before = self._source.read(bias)
            self._copy(f"{fold.producer}.bias", (before.float() / scale).to(before.dtype))
        self._inputs |= dict.fromkeys(modules, fold.columns(scale))

    def _copy(self, parameter: str, tensor: Tensor) -> None:
        self._blocks.put(parameter, tensor)
        name = self._blocks.stored(parameter)
        assert name is not None
        self._made[name] = {"": tensor}
        self._lines[name] = {"output_error": None, "note": "scaled for the weights that read it"}

    def _stored(self, module: str, stats: Stats | None = None) -> awq.Rounded:
        """What a weight is once it has been encoded; without stats rounded to nearest."""
        scheme, dtype = self._packed[module].scheme, self._source.specs[self._packed[module].source].dtype
        return lambda weight: scheme.decode(scheme.encode(weight.to(dtype), stats)).float()

    def _loss(self, weights: Mapping[str, Tensor], columns: Tensor, stats: Stats) -> float:
        """The output error of layers that read the same input, encoded with their columns scaled."""
        assert stats.hessian is not None
        loss = 0.0
        for module, weight in weights.items():
            found = self._stored(module, stats.scaled(1 / columns))(weight * columns) / columns
            loss += awq.energy(found - weight, stats.hessian)
        return loss

    def _encode(self, module: str, stats: Stats | None) -> Tensor:
        """Makes the module's tensors and its line. Returns the weight that they stand for."""
        packed, note = self._packed[module], None
        weight = read_weight(self._source, packed)
        check_finite(weight, module, packed)
        inputs, outputs = self._inputs.get(module), self._outputs.get(module)
        scales = {INPUTS: inputs, OUTPUTS: outputs}
        weight = scaled(weight, inputs, outputs)
        if stats is not None and inputs is not None:
            stats = stats.scaled(1 / inputs)
        try:
            tensors = packed.scheme.encode(weight, stats)
        except NotPositiveDefinite as error:
            tensors, note = packed.scheme.encode(weight), f"rounded to nearest: {error}"
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        decoded = packed.scheme.decode(tensors)
        error_of_output = None if stats is None else output_error(weight, decoded, stats)
        if stats is None:
            note = "rounded to nearest: nothing was measured at its input"
        self._made[module] = tensors | {name: scale for name, scale in scales.items() if scale is not None}
        self._lines[module] = {"output_error": error_of_output, "note": note}
        return decoded


def _some_rows(weight: Tensor) -> Tensor:
    """Rows all over a weight, as many as it takes to tell what suits their columns."""
    return weight[:: max(1, len(weight) // ROWS)]


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _step(block: str) -> str:
    return f"calibrated-{block or 'outside'}"


def _file(job: Job, block: str) -> Path:
    return job.scratch / f"{block or 'outside'}.safetensors"


def output_error(weight: Tensor, decoded: Tensor, stats: Stats) -> float:
    """|X (W - W')^T| / |X W^T| on the inputs X of `stats`; without a Hessian, as if channels were independent."""

    def energy(matrix: Tensor) -> float:
        if stats.hessian is None:
            return float((matrix.square() @ stats.second_moment).sum())
        matrix = matrix.to(stats.hessian.device)
        return float(((matrix @ stats.hessian) * matrix).sum())

    reference = energy(weight.float())
    error = max(0.0, energy(weight.float() - decoded.float()))
    return math.sqrt(error / reference) if reference > 0 else math.sqrt(error)
