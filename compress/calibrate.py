"""Calibration: text runs through the model, and each block is measured and compressed before the next one is run.

So a layer is fitted to the inputs that it will see, which come from compressed layers, those of its own block among
them. Where Hessians are wanted, the original model runs beside, and says what should have come out (`gptaq.py`). In
memory are one block of each, statistics and one batch of activations; the rest lies in files of the job, from where an
interrupted run goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import fisher, gptaq, refine
from compress.blocks import Beside, Blocks
from compress.change import Change, changed, unchanged
from compress.fold import Fold, folded_norm
from compress.folding import Folding
from compress.gptq import NotPositiveDefinite
from compress.hollow import OUTSIDE
from compress.job import Job
from compress.kv_scales import Largest
from compress.pipeline import Fitted, changes_stored, check_finite, read_weight, relative_error
from compress.planning import Plan
from compress.progress import Progress
from compress.scheme import Tensors
from compress.source import Source
from compress.stack import errors_by_blocks, first_blocks
from compress.statistics import Recorded, Statistics
from compress.stats import Stats
from compress.structure import Linear, Structure
from compress.walk import tensors_of, walk

STAGE = "calibrating"
Tell = Callable[[str, float | None], None]  # module, error of its output
MEASURED_BLOCKS = 2  # of a stacked weight, when its block is run with it to see what its errors do there


@dataclass(frozen=True)
class Calibration:
    """Where the text comes from, and how much of it is run: the arguments of `samples.draw`."""

    source: str = "builtin"
    samples: int = 128
    seq_len: int | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("calibration: no source; name a .txt or .jsonl file, a dataset id, builtin or self")
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
    structure: Structure,
    text: Tensor | Statistics,
    device: str | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Fits every linear that a lossy scheme is planned for and that the text reaches.

    text: (n, length) int64 tokens, or what was measured on some. device: where blocks run; None for cuda where there is
    one, else cpu.
    """
    linears = structure.linears
    planned = {m: linears[m] for m, packed in plan.modules.items() if m in linears and not packed.scheme.lossless}
    schemes = [plan.modules[module].scheme for module in planned]
    fitted_to = any(scheme.needs_hessian or scheme.refines for scheme in schemes)

    weighted = {module: linears[module] for module in planned if plan.modules[module].scheme.needs_fisher}
    squares = fisher.Squares([])
    if weighted and not isinstance(text, Statistics):
        squares = fisher.measure(job, source, weighted, text, where(device), progress)

    def start() -> _Models:
        if isinstance(text, Statistics):
            return _Models(Recorded(text, source, structure, planned, where(device)))
        folders = ("activations", "original")[: 1 + fitted_to]
        return _Models(*(Blocks(source, planned, text, job.scratch / folder, where(device)) for folder in folders))

    def visit(models: _Models, block: str) -> dict[str, Any]:
        squared = text.fisher if isinstance(text, Statistics) else squares.of
        made = _Block(job, source, plan, planned, models, block, squared)
        return made.fit(_telling(progress, models.blocks, block, len(planned)) if progress else None)

    done = walk(job, STAGE, start, visit)
    lines = {block: noted["lines"] for block, noted in done.items()}
    fitted = {name: Fitted(_file(job, block), **line) for block in lines for name, line in lines[block].items()}
    return Calibrated(fitted, sum(noted["seconds"] for noted in done.values()))


def _telling(progress: Progress, blocks: Blocks | Recorded, block: str, total: int) -> Tell:
    """Tells of every layer of a block when it is fitted: block, layer, the error of its output."""
    names = blocks.names
    place = names.index(block) if block != OUTSIDE else len(names)
    done = sum(len(blocks.linears(name)) for name in names[:place])
    counted = f"block {place + 1} of {len(names)}" if block != OUTSIDE else "outside of blocks"

    def tell(module: str, error: float | None) -> None:
        nonlocal done
        done += 1
        said = "no data" if error is None else f"error {error:.4f}"
        progress(STAGE, done, total, f"{counted}, {module.removeprefix(f'{block}.')}: {said}")

    return tell


class _Models:
    """The model that is compressed, and where layers are fitted to its outputs the one that stays as it is."""

    def __init__(self, blocks: Blocks | Recorded, original: Blocks | None = None) -> None:
        self.blocks, self.original = blocks, original
        self._all = (blocks,) if original is None else (blocks, original)

    @property
    def names(self) -> list[str]:
        return self.blocks.names

    def next(self) -> str | None:
        return self.blocks.next()

    def linears(self, block: str) -> list[str]:
        return self.blocks.linears(block)

    def leave(self, blocks: list[str]) -> None:
        for model in self._all:
            model.leave(blocks)

    def ready(self) -> bool:
        return all(model.ready() for model in self._all)

    def open(self, block: str) -> None:
        for model in self._all:
            model.open(block)

    def close_original(self, block: str) -> None:
        if self.original:
            self.original.close(block)

    def close(self, block: str, attentions: Iterable[str]) -> dict[str, Largest]:
        """Returns what the attention modules of the compressed model cached."""
        return self.blocks.close(block, attentions)

    def stages(self, block: str) -> list[list[str]]:
        """What is measured together, one after the other: all at once where nothing is made good."""
        if self.original is None or isinstance(self.blocks, Recorded):
            return [self.linears(block)]
        return self.blocks.stages(block)

    def beside(self, block: str, outputs: Callable[[str], Change | None]) -> Beside | None:
        return None if self.original is None else Beside(self.original, self.original.sums(block), outputs)


def where(device: str | None) -> str:
    """Where blocks run."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class _Block:
    """One block while it is compressed."""

    def __init__(
        self,
        job: Job,
        source: Source,
        plan: Plan,
        linears: Mapping[str, Linear],
        models: _Models,
        block: str,
        squares: Callable[[str], Tensor | None],
    ) -> None:
        """squares: the Fisher information of a module, as it is in the source."""
        self._job, self._source, self._models, self._block, self._squares = job, source, models, block, squares
        self._blocks = models.blocks
        self._packed = {module: plan.modules[module] for module in self._blocks.linears(block)}
        self._modules = {linears[module].path: module for module in self._packed if linears[module].expert is None}
        self._attentions = {p: name for name, p in plan.kv_cache.items() if block and p.startswith(f"{block}.")}
        self._coded = {packed.source for packed in plan.modules.values()}
        self._before: Tensor | None = None  # what the block gives before its weights are compressed
        self._notes: dict[str, str] = {}
        self._made: dict[str, Tensors] = {}
        self._lines: dict[str, dict[str, Any]] = {}
        self._refined: dict[str, tuple[Tensor, Stats]] = {}  # what is to be trained: the weight, and its inputs

    def fit(self, tell: Tell | None = None) -> dict[str, Any]:
        """Returns what the report says of each module, and of each tensor that was changed with them; and seconds."""
        models, blocks, block, started = self._models, self._blocks, self._block, time.monotonic()
        models.open(block)
        schemes = {module: packed.scheme for module, packed in self._packed.items()}
        kinds = {kind for scheme in schemes.values() for kind in scheme.folds} if block != OUTSIDE else set()
        stats = self._measure([*schemes]) if kinds or not models.original else {}
        folding = Folding(self._source, self._packed, stats)
        if kinds:
            folds = blocks.folds(block, kinds)
            for fold in folds:
                self._fold(fold, folding)
            if not folds:
                self._notes |= dict.fromkeys(
                    self._packed, "channels stay as they are: none is known to be free to change"
                )
            for module in folding.changed:
                blocks.set(module, self._weight(module, folding).float())
        if block != OUTSIDE and any(scheme.stacked for scheme in schemes.values()):
            self._before = blocks.output(block)
        beside = models.beside(block, folding.outputs)
        for stage in models.stages(block):
            measured = self._measure(stage, beside) if beside and stage else {}
            for module in stage:
                found = measured[module] if beside else folding.stats(module)
                if found is None and schemes[module].needs_ranges:
                    found = self._ranges_of_others(module, measured if beside else stats)
                    self._notes[module] = "the calibration text does not reach it: ranges are those of other experts"
                stored = self._encode(module, found, folding)
                if block != OUTSIDE:
                    blocks.set(module, stored)
                if tell:
                    tell(module, self._lines[module]["output_error"])
        if block != OUTSIDE:
            models.close_original(block)
            self._refine()
            for path, largest in models.close(block, self._attentions).items():
                self._keep_scales(self._attentions[path], largest)
        Fitted.save(_file(self._job, block), self._made)
        return {"lines": self._lines, "seconds": time.monotonic() - started}

    def _ranges_of_others(self, module: str, measured: Mapping[str, Stats | None]) -> Stats:
        """Of an expert that no token came to: the largest inputs of those that read the same width."""
        width = read_weight(self._source, self._packed[module]).shape[1]
        single = set(self._modules.values())
        experts = [stats for other, stats in measured.items() if other not in single]
        others = [stats for stats in experts if stats is not None and len(stats.absmax) == width]
        if module in single or not others:
            raise ValueError(
                f"{module}: the calibration text does not reach it, and its inputs must be known; give more text, or "
                f"leave it out with --exclude '{module}'"
            )
        moments, means, most = (
            torch.stack([getattr(stats, name) for stats in others]) for name in ("second_moment", "absmean", "absmax")
        )
        return Stats(0, moments.mean(0), means.mean(0), most.amax(0))

    def _measure(self, modules: list[str], beside: Beside | None = None) -> Mapping[str, Stats | None]:
        schemes = {module: self._packed[module].scheme for module in modules}
        hessians = {module for module, scheme in schemes.items() if scheme.needs_hessian}
        folded = set(self._modules.values())  # experts are not folded into
        samples = {module for module, scheme in schemes.items() if scheme.needs_sample and module in folded}
        return self._blocks.measure(self._block, hessians, samples, modules, beside) if modules else {}

    def _weight(self, module: str, folding: Folding) -> Tensor:
        """What is to be encoded."""
        weight = read_weight(self._source, self._packed[module])
        return changed(weight, folding.inputs(module), folding.outputs(module))

    def _keep_scales(self, attention: str, cached: Largest) -> None:
        self._made[attention] = cached.scales(attention)
        self._lines[attention] = {"output_error": None, "note": "for a KV cache in fp8: from the calibration text"}

    def _fold(self, fold: Fold, folding: Folding) -> None:
        """Changes what a fold may, where that helps and nothing stands in the way."""
        readers = [self._modules[path] for path in fold.readers if path in self._modules]
        norm = self._blocks.stored(f"{fold.producers[0]}.weight") if self._blocks.is_norm(fold) else None
        if not all(path in self._modules for path in fold.attending):
            fold = replace(fold, attending=())
        producers = [self._modules[path] for path in fold.producers if path in self._modules]
        biases = {path: self._blocks.stored(f"{path}.bias") for path in (*fold.producers, *fold.attending)}
        if len(readers) < len(fold.readers) or (norm is None and len(producers) < len(fold.producers)):
            return
        if {norm, *biases.values()} & self._coded:  # another scheme stores it as it is in the source
            return
        if fold.heads and self._attentions and isinstance(self._blocks, Recorded):
            return  # the values that were measured for the cache are those of the original
        chosen = folding.choose(fold, producers, readers)
        if chosen is None:
            return
        change, gain = chosen
        self._blocks.check(self._block, fold, change)
        if norm is not None:
            assert change.scale is not None
            stored, scale = folded_norm(self._source.read(norm), change.scale, fold.offset)
            self._copy(f"{fold.producers[0]}.weight", stored)
            change = Change(scale)
        made = fold.outputs(change)
        outputs = {self._modules[path]: change for path, change in made.items() if path in self._modules}
        folding.make(fold, change, gain, outputs, readers)
        for path, name in biases.items():
            if name is not None and path in made:
                before = self._made[name][""] if name in self._made else self._source.read(name)
                self._copy(f"{path}.bias", made[path].made(before.float()).to(before.dtype))

    def _copy(self, parameter: str, tensor: Tensor) -> None:
        self._blocks.put(parameter, tensor)
        name = self._blocks.stored(parameter)
        assert name is not None
        self._made[name] = {"": tensor}
        self._lines[name] = {"output_error": None, "note": "changed with the weights that read it"}

    def _encode(self, module: str, stats: Stats | None, folding: Folding) -> Tensor:
        """Makes the module's tensors and its line. Returns the weight that they stand for."""
        packed, note = self._packed[module], self._notes.get(module) or folding.note(module)
        check_finite(read_weight(self._source, packed), module, packed)
        weight = self._weight(module, folding)
        if stats is not None and packed.scheme.needs_fisher:
            squares = self._squares(module)
            if squares is None:
                note = note or "weighted by its inputs: no gradient of the loss was measured"
            else:
                stats = replace(stats, fisher=fisher.changed(squares, folding.outputs(module)))
        started = time.monotonic()
        try:
            tensors = packed.scheme.encode(weight, stats)
        except NotPositiveDefinite as error:
            assert stats is not None
            stats, note = replace(stats, hessian=None, missing=None), f"rounded to nearest: {error}"
            tensors = packed.scheme.encode(weight, stats)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None
        seconds = time.monotonic() - started
        decoded = packed.scheme.decode(tensors)
        error_of_output = output_error(weight, decoded, stats) if stats is not None and stats.tokens else None
        changes = folding.inputs(module), folding.outputs(module)
        stacked = self._stacked(module, weight, tensors, stats, changes) if packed.scheme.stacked else {}
        if stats is None and packed.scheme.needs_calibration:
            note = "rounded to nearest: nothing was measured at its input"
        self._made[module] = tensors | changes_stored(*changes)
        self._lines[module] = {"output_error": error_of_output, "note": note, "seconds": seconds, **stacked}
        if packed.scheme.refines and stats is not None:
            self._refined[module] = weight, stats
        return decoded

    def _refine(self) -> None:
        """Trains what was made of the block together, and keeps that where the block's output gets nearer."""
        blocks, original, block = self._blocks, self._models.original, self._block
        if not self._refined or original is None or isinstance(blocks, Recorded):
            return
        schemes = {module: self._packed[module].scheme for module in self._refined}
        layers = {
            module: scheme.trainable(self._refined[module][0].to(blocks.device), self._made[module])
            for module, scheme in schemes.items()
        }
        before = refine.error(blocks, original, block)
        refine.train(blocks, original, block, layers, max(scheme.refines for scheme in schemes.values()))
        made = {module: schemes[module].trained(self._made[module], layer) for module, layer in layers.items()}
        for module, tensors in made.items():
            blocks.set(module, schemes[module].decode(tensors))
        after = refine.error(blocks, original, block)
        said = f"error of the block's output {before:.4f}, refined {after:.4f}"
        for module, (weight, stats) in self._refined.items():
            line = self._lines[module]
            line["note"] = "; ".join(filter(None, (line["note"], said + ("" if after < before else ", not kept"))))
            if after < before:
                self._made[module] |= made[module]
                line["output_error"] = output_error(weight, schemes[module].decode(made[module]), stats)
            else:
                blocks.set(module, schemes[module].decode(self._made[module]))

    def _stacked(
        self,
        module: str,
        weight: Tensor,
        tensors: Tensors,
        stats: Stats | None,
        changes: tuple[Change | None, Change | None],
    ) -> dict[str, Any]:
        """What the order of the blocks of a weight is decided by. changes: that were made to it before."""
        scheme, original = self._packed[module].scheme, read_weight(self._source, self._packed[module])

        def error(decoded: Tensor) -> float:
            return relative_error(original, unchanged(decoded, *changes))

        if stats is None:
            return {"errors": errors_by_blocks(scheme, tensors, error)}
        errors = errors_by_blocks(scheme, tensors, error, lambda decoded: output_error(weight, decoded, stats))
        count = min(MEASURED_BLOCKS, len(errors))
        before = errors[count - 1][1]
        if self._before is None or not before:
            return {"errors": errors}
        self._blocks.set(module, scheme.decode(first_blocks(scheme, tensors, count)))
        after = self._blocks.output(self._block)
        assert after is not None
        change = (after - self._before).square().sum(-1)
        relative = change / self._before.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return {"errors": errors, "importance": relative.mean().item() / before**2}


def _file(job: Job, block: str) -> Path:
    return tensors_of(job, STAGE, block)


def output_error(weight: Tensor, decoded: Tensor, stats: Stats) -> float:
    """|X (T - W')^T| / |X W^T| on the inputs X of `stats`, where T is GPTAQ's target, or W where the original model was
    not run beside; without a Hessian, as if channels were independent."""
    wanted = weight.float() if stats.hessian is None else gptaq.target(weight, stats)
    reference = stats.energy(weight.float())
    error = max(0.0, stats.energy(wanted - decoded.to(wanted)))
    return math.sqrt(error / reference) if reference > 0 else math.sqrt(error)
