"""`--target-size`: which of several schemes each weight gets, so that all tensors fit and the predicted loss is least.

The KL divergence that an error of weights causes is predicted to the second order, as HAWQ-V2 [1911.03852] predicts the
loss: half the squared errors times the curvature, which is the Fisher information, and of that the diagonal (SqueezeLLM
[2306.07629]). But a grid of 2 bits also makes weights a seventh shorter as a whole, and that costs several times what
errors of this size in no direction do: this part of an error counts with the curvature in its own direction.

Errors are those of `encode` without data, since to encode each candidate with it would take many times as long. What
GPTQ will leave of them depends on how much the inputs of a layer have in common, and hardly on the candidate: so it is
known from their Hessian (`gptq.remaining`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress import fisher, gptq, sizes
from compress.allocate import Option, allocate, loss, uniform
from compress.blocks import Blocks
from compress.candidates import Candidate
from compress.fold import fused
from compress.hollow import OUTSIDE
from compress.job import Job
from compress.pipeline import ERROR_VALUES, check_finite, read_weight
from compress.planning import weight_shape
from compress.prepare import Prepared
from compress.progress import Progress
from compress.samples import Samples
from compress.scheme import Scheme
from compress.statistics import HESSIAN, Statistics
from compress.stats import Stats
from compress.walk import tensors_of, walk

STAGE = "choosing"
INPUTS = "inputs"  # the stage before
Known = Callable[[str], tuple[Tensor | None, float | None]]  # the Fisher information of a module, and along it
# An expert that few tokens came to counts with this part of the mean curvature of its set, or more if it has more.
LEAST = 0.1


class Target:
    """What there is to choose, from headers. Raises ValueError where nothing is, and where nothing fits."""

    def __init__(self, prepared: Prepared) -> None:
        assert prepared.target_bytes is not None
        self.prepared, self.asked = prepared, prepared.target_bytes
        self.sets: dict[str, list[str]] = {}  # whose weights get the same
        for module in prepared.open:
            self.sets.setdefault(fused(prepared.structure.linears[module]), []).append(module)
        if not self.sets:
            raise ValueError("--target-size: rules and candidates leave no weight to choose for")
        self.bytes = [[sum(column) for column in zip(*map(self._bytes, m), strict=True)] for m in self.sets.values()]
        first = sum(column[0] for column in self.bytes)
        self.fixed = prepared.forecast().totals["bytes"] - first
        least, self.most = (self.fixed + sum(map(pick, self.bytes)) for pick in (min, max))
        if self.asked < least:
            raise ValueError(
                f"target size {self.asked} ({sizes.show(self.asked)}) is too small: with the smallest candidates all "
                f"tensors take {least} bytes ({sizes.show(least)}); give that or more, or name smaller ones"
            )
        if prepared.plan.kv_cache:  # said now, and not when all is measured
            turns = enumerate(self.sets.values())
            count = len(prepared.candidates)
            prepared.chosen({m: prepared.candidates[i % count] for i, modules in turns for m in modules})

    def _bytes(self, module: str) -> list[int]:
        """Of a weight with each candidate, which may leave it as it is."""
        linear = self.prepared.structure.linears[module]
        spec = self.prepared.source.specs[linear.source]
        shape = weight_shape(linear, spec)
        return [
            math.prod(shape) * spec.dtype.itemsize if scheme is None else scheme.bytes(shape, spec.dtype)
            for scheme in self._schemes(module)
        ]

    def _schemes(self, module: str) -> list[Scheme | None]:
        found = [plan.modules.get(module) for plan in self.prepared.plans]
        return [None if packed is None else packed.scheme for packed in found]

    def choose(self, job: Job, text: Samples | Statistics, device: str, progress: Progress | None = None) -> Prepared:
        """What is to be carried out, and notes in the job what the report says of it.

        An interrupted run goes on at the set that it had come to.
        """
        known = job.recall(STAGE)
        if known is None:
            known_of, started = self._known(job, text, device, progress), time.monotonic()
            lines = self._lines(job, known_of, self._remaining(job, text, device, progress), progress)
            length = text.tokens.shape[1] if isinstance(text, Samples) else text.calibration["seq_len"]
            known = self._chosen(lines, length - 1)
            job.note(STAGE, {**known, "seconds": time.monotonic() - started})
        numbers = zip(self.sets.values(), known["chosen"], strict=True)
        return self.prepared.chosen({m: self.prepared.candidates[n] for modules, n in numbers for m in modules})

    def _known(self, job: Job, text: Samples | Statistics, device: str, progress: Progress | None) -> Known:
        if isinstance(text, Statistics):
            return lambda module: (text.fisher(module), text.along(module))
        linears = {module: self.prepared.structure.linears[module] for module in self.prepared.weighted}
        found = fisher.measure(job, self.prepared.source, linears, text.tokens, device, progress)
        return lambda module: (found.of(module), found.along(module))

    def _remaining(
        self, job: Job, text: Samples | Statistics, device: str, progress: Progress | None
    ) -> dict[str, float]:
        """What GPTQ leaves of the errors of modules that it may be used on, and that text comes to."""
        wanting = [module for module in self.prepared.open if any(map(_compensates, self._schemes(module)))]

        def found(stats: Mapping[str, Stats | None]) -> dict[str, float]:
            hessians = {m: known.hessian for m in wanting if m in stats and (known := stats[m]) is not None}
            distinct = {id(hessian): hessian for hessian in hessians.values() if hessian is not None}
            left = {key: gptq.remaining(hessian) for key, hessian in distinct.items()}
            return {module: left[id(hessian)] for module, hessian in hessians.items()}

        if isinstance(text, Statistics):
            each = [found({module: text.stats(module, [HESSIAN], device)}) for module in wanting]
            return {module: part for known in each for module, part in known.items()}

        def visit(blocks: Blocks, block: str) -> dict[str, Any]:
            blocks.open(block)
            modules = blocks.linears(block)
            noted = found(blocks.measure(block, modules) if modules else {})
            if block != OUTSIDE:
                blocks.close(block)
            place = tensors_of(job, INPUTS, block)
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file({}, place)
            return noted

        linears = {module: self.prepared.structure.linears[module] for module in wanting}
        start = partial(Blocks, self.prepared.source, linears, text.tokens, job.scratch / INPUTS, device)
        visited = walk(job, INPUTS, start, visit, progress) if wanting else {}
        shutil.rmtree(job.scratch / INPUTS, ignore_errors=True)
        return {module: part for noted in visited.values() for module, part in noted.items()}

    def _lines(
        self, job: Job, known_of: Known, remaining: Mapping[str, float], progress: Progress | None
    ) -> dict[str, dict[str, Any]]:
        """Of each weight: its number of values, the mean of its curvature (None where that was not measured), and with
        each candidate its squared error and the same times the curvature, both as far as they remain."""
        lines: dict[str, dict[str, Any]] = {}
        for number, (name, modules) in enumerate(self.sets.items()):
            step = f"{STAGE}-{number}"
            noted = job.recall(step)
            if noted is None:
                noted = {m: self._line(m, *known_of(m), remaining.get(m, 1.0)) for m in modules}
                job.note(step, noted)
            lines |= noted
            if progress:
                progress(STAGE, number + 1, len(self.sets), name)
        return lines

    def _line(self, module: str, squares: Tensor | None, along: float | None, remaining: float) -> dict[str, Any]:
        packed = next(plan.modules[module] for plan in self.prepared.plans if module in plan.modules)
        weight = read_weight(self.prepared.source, packed)
        check_finite(weight, module, packed)
        schemes = self._schemes(module)
        parts = [remaining if _compensates(scheme) else 1.0 for scheme in schemes]
        found = [_errors(weight, scheme, squares, along) for scheme in schemes]
        errors = [(part * plain, part * weighted) for part, (plain, weighted) in zip(parts, found, strict=True)]
        self.prepared.source.release(packed.source)
        mean = None if squares is None else squares.mean(dtype=torch.float64).item()
        return {"values": weight.numel(), "squares": mean, "errors": errors}

    def _chosen(self, lines: Mapping[str, Mapping[str, Any]], tokens: int) -> dict[str, Any]:
        """tokens: of a sample. The gradient is that of their mean loss: squared, that of a single one is so many times
        as large, where these are independent."""
        options = [
            [Option(size, tokens / 2 * cost) for size, cost in zip(*columns, strict=True)]
            for columns in zip(self.bytes, self._losses(lines), strict=True)
        ]
        room = self.asked - self.fixed
        chosen = allocate(options, room)
        _, shared = self.prepared.described
        names = [Candidate.of(candidate, shared).text for candidate in self.prepared.candidates]
        taken = [names[number] for modules, number in zip(self.sets.values(), chosen, strict=True) for _ in modules]
        size = sum(option[number].bytes for option, number in zip(options, chosen, strict=True))
        same = uniform(options, room)
        report = {
            "bytes": self.asked,
            "candidates": names,
            "weights": {name: taken.count(name) for name in names},
            "bits_per_weight": 8 * size / sum(line["values"] for line in lines.values()),
            "predicted_kl": loss(options, chosen),
            "uniform": None
            if same is None
            else {"candidate": names[same], "predicted_kl": loss(options, [same] * len(options))},
        }
        return {"chosen": chosen, "report": report, "note": self._note()}

    def _losses(self, lines: Mapping[str, Mapping[str, Any]]) -> list[list[float]]:
        """Squared errors times curvature, of each set with each candidate."""
        linears, everywhere = self.prepared.structure.linears, _mean(lines.values())
        found = []
        for modules in self.sets.values():
            mean = _mean([lines[module] for module in modules])
            unseen = LEAST * mean if mean is not None else 1.0 if everywhere is None else everywhere
            losses = [0.0] * len(self.prepared.candidates)
            for line, linear in ((lines[module], linears[module]) for module in modules):
                least = 0.0 if linear.expert is None and line["squares"] is not None else unseen
                for number, (plain, weighted) in enumerate(line["errors"]):
                    losses[number] += max(weighted, least * plain)
            found.append(losses)
        return found

    def _note(self) -> str | None:
        if self.asked < self.most:
            return None
        return f"target size: all candidates fit, the largest of them take {sizes.show(self.most)}"


def _compensates(scheme: Scheme | None) -> bool:
    return scheme is not None and scheme.needs_hessian


def _errors(weight: Tensor, scheme: Scheme | None, squares: Tensor | None, along: float | None) -> tuple[float, float]:
    """The sum of squared errors, and the same times the curvature. weight: (out_features, in_features)."""
    if scheme is None:
        return 0.0, 0.0
    ones = torch.ones(weight.shape[1])
    stats = Stats(0, ones, ones, ones) if scheme.needs_ranges else None  # ranges of inputs do nothing to the weight
    decoded, rows = scheme.decode(scheme.encode(weight, stats)), max(1, ERROR_VALUES // weight.shape[1])
    # products of weights and errors with themselves and each other, plain and times the curvature: ww, we, ee
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(0, len(weight), rows):
        part = slice(i, i + rows)
        w = weight[part].float()
        e = decoded[part].float() - w
        products = torch.stack([w * w, w * e, e * e])
        sums[0] += products.sum((1, 2))
        if squares is not None:
            sums[1] += products.mul_(squares[part]).sum((1, 2))
    (ww, we, ee), (fww, fwe, fee) = sums.tolist()
    longer = we / ww if ww else 0.0  # what the error makes the weight longer by, the rest being orthogonal to it
    return ee, max(0.0, fee - 2 * longer * fwe + longer**2 * fww) + longer**2 * (along or 0.0)


def _mean(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Of the curvature of all values for which it was measured."""
    known = [(line["values"], line["squares"]) for line in lines if line["squares"] is not None]
    return sum(count * mean for count, mean in known) / sum(count for count, _ in known) if known else None
