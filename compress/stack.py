"""The stack: blocks of all stacked weights in one order, the one that gains most for its bytes first.

A checkpoint is written in that order, so that what fits into a budget is the beginning of its files. Blocks of one
weight stay in order; weights are free to differ. The score of a block is the output error that it takes away, weighted
with what an error of this weight does to the output of its decoder block, for each byte: one pass over the text, where
the paper measures a perplexity for each of all blocks (2410.23918, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from compress.job import Job
from compress.layout import Block, blocks_of
from compress.pipeline import Fitted, check_finite, read_weight, relative_error
from compress.planning import Plan, weight_shape
from compress.scheme import Scheme, Tensors
from compress.source import Source

# Measured (benchmarks/results/bitstack.md): at 1 and 2 bits errors are so large that the loss grows faster than with
# their square.
POWER = 4  # of a weight's output error in its score
DAMPING = 0.75  # and of its importance

Errors = list[tuple[float, float | None]]


def first_blocks(scheme: Scheme, tensors: Tensors, count: int) -> Tensors:
    """What is loaded of a weight with so many of its blocks."""
    return {local: tensor for local, tensor in tensors.items() if scheme.block_of(local) < count}


def errors_by_blocks(
    scheme: Scheme,
    tensors: Tensors,
    error: Callable[[Tensor], float],
    output_error: Callable[[Tensor], float] | None = None,
) -> Errors:
    """Of a weight with 1, 2, ... of its blocks: its error, and that of its outputs if that can be known."""
    errors: Errors = []
    for count in range(1, 2 + max(map(scheme.block_of, tensors))):
        decoded = scheme.decode(first_blocks(scheme, tensors, count))
        errors.append((error(decoded), None if output_error is None else output_error(decoded)))
    return errors


def fit_rest(job: Job, source: Source, plan: Plan, known: Mapping[str, Fitted]) -> dict[str, Fitted]:
    """Encodes the stacked weights that calibration has not: their order is known only when all of them are."""
    fitted = {}
    for number, (module, packed) in enumerate(plan.modules.items()):
        if not packed.scheme.stacked or module in known:
            continue
        step, file = f"stacked-{number}", job.scratch / f"stacked-{number}.safetensors"
        line = job.recall(step)
        if line is None or not file.exists():
            weight = read_weight(source, packed)
            check_finite(weight, module, packed)
            tensors = packed.scheme.encode(weight)
            job.scratch.mkdir(exist_ok=True)
            Fitted.save(file, {module: tensors})
            error = partial(relative_error, weight)
            line = {"errors": errors_by_blocks(packed.scheme, tensors, error), "note": None}
            if packed.scheme.needs_calibration:
                line["note"] = "scaled by no activations: the calibration text does not reach it"
            job.note(step, line)
            source.release(packed.source)
        fitted[module] = Fitted(file, None, **line)
    return fitted


def known_errors(fitted: Mapping[str, Fitted]) -> dict[str, Any]:
    """What the manifest says of stacked weights: module -> relative and output error with 1, 2, ... blocks."""
    return {module: found.errors for module, found in fitted.items() if found.errors is not None}


def order(source: Source, plan: Plan, fitted: Mapping[str, Fitted]) -> list[Block]:
    """All later blocks, by what they gain for each byte; without calibration level by level."""
    modules = [module for module, packed in plan.modules.items() if packed.scheme.stacked]
    known = [fitted[module].importance for module in modules]
    least = min((importance for importance in known if importance is not None), default=None)
    scored = []
    for position, module in enumerate(modules):
        found, sizes = fitted[module], _sizes(source, plan, module)
        importance = least if found.importance is None else found.importance
        if importance is None:  # the same error of a larger weight is taken to matter more
            importance = float(sum(sizes.values())) ** (1 / DAMPING)
        gains = gains_of(importance, found.errors or ())
        for block, score in zip(sizes, per_byte(gains, list(sizes.values())), strict=True):
            scored.append((-score, position, block))
    return [(modules[position], block) for _, position, block in sorted(scored)]


def gains_of(importance: float, errors: Sequence[tuple[float, float | None]]) -> list[float]:
    """What each later block takes away from the loss, in some unit that is the same for all modules."""
    known = [relative if output is None else output for relative, output in errors]
    return [importance**DAMPING * (a**POWER - b**POWER) for a, b in zip(known, known[1:], strict=False)]


def per_byte(gains: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """The gain of each block for a byte; of one that gains more than its predecessor, that of both together.

    So scores do not rise: what is read first opens the way to what gains more.
    """
    groups: list[tuple[float, int, int]] = []  # gain, bytes, blocks
    for gain, size in zip(gains, sizes, strict=True):
        groups.append((gain, size, 1))
        while len(groups) > 1 and groups[-2][0] * groups[-1][1] < groups[-1][0] * groups[-2][1]:
            last, before = groups.pop(), groups.pop()
            groups.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    return [gain / size for gain, size, blocks in groups for _ in range(blocks)]


def _sizes(source: Source, plan: Plan, module: str) -> dict[int, int]:
    """Bytes of every later block."""
    packed = plan.modules[module]
    spec = source.specs[packed.source]
    specs = packed.scheme.specs(weight_shape(packed, spec), spec.dtype)
    sizes = dict.fromkeys(blocks_of(source, plan, module)[1:], 0)
    for local, stored in specs.items():
        if block := packed.scheme.block_of(local):
            sizes[block] += stored.bytes
    return sizes
