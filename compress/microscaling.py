"""What mxfp4, mxfp8 and nvfp4 share: small floats in blocks along in_features, an 8-bit scale for each block.

The scale is searched: of a few neighbours of the one that the format's rule gives, the one with the least squared
error, where calibration has measured the inputs weighted by their second moments. With method=gptq the values are then
rounded as GPTQ has it, on these scales. Before that, reorder and hadamard change the channels between two layers, where
that makes the calibrated error smaller and no layer's larger (`folding.py`): in order of size they share a block with
their like, and mixed they have no outliers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from compress import gptaq
from compress.fold import Kind
from compress.formats.compiled import float_bits, jit
from compress.formats.threads import in_threads
from compress.gptq import compensate
from compress.scheme import Scheme, Spec
from compress.stats import Stats

LANES = 64  # at most so many blocks are searched together; a lane each, so that the order of a sum is fixed


@dataclass(frozen=True)
class Element:
    """A float of few bits, without infinity: its mantissa bits, least normal number, largest and lowest number."""

    mantissa_bits: int
    least: float
    largest: float
    lowest: float


E2M1 = Element(1, 1.0, 6.0, -6.0)
E4M3 = Element(3, 2.0**-6, 448.0, -448.0)


@dataclass(frozen=True)
class Microscaling(Scheme):
    """Blocks of `block` neighbours along in_features. `dtype` is the weight's, which the layout has no place for."""

    block: ClassVar[int]
    element: ClassVar[Element]
    search: bool = True
    method: Literal["rtn", "gptq"] = "rtn"
    reorder: bool = False
    hadamard: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @property
    def needs_calibration(self) -> bool:
        return self.method == "gptq" or bool(self.folds)

    @property
    def needs_hessian(self) -> bool:
        return self.needs_calibration

    @property
    def folds(self) -> frozenset[Kind]:
        wanted: dict[Kind, bool] = {"order": self.reorder, "rotation": self.hadamard}
        return frozenset(kind for kind, is_wanted in wanted.items() if is_wanted)

    def for_dtype(self, dtype: torch.dtype) -> Microscaling:
        name: Any = str(dtype).removeprefix("torch.")
        return dataclasses.replace(self, dtype=name)

    def takes(self, spec: Spec) -> bool:
        return super().takes(spec) and spec.shape[-1] % self.block == 0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def _compensated(self, weight: Tensor, scales: Tensor, stats: Stats | None) -> Tensor:
        """The weight, or with method=gptq what is stored in its place, in float32: each value a code times its scale.

        scales: (out_features, blocks) float32.
        """
        if stats is None or stats.hessian is None or self.method == "rtn":
            return weight
        return compensate_on(scales, self.block, self.element, gptaq.target(weight, stats), stats.hessian)

    def _check(self, weight: Tensor) -> None:
        if weight.shape[1] % self.block:
            raise ValueError(
                f"{self.name}: in_features {weight.shape[1]} is not a multiple of {self.block}, the values of a block; "
                "store this weight as it is, or with int4 or fp8"
            )


def compensate_on(scales: Tensor, block: int, element: Element, weight: Tensor, hessian: Tensor) -> Tensor:
    """`gptq.compensate` with numbers of an element type times the scale of their block.

    scales: (out_features, blocks) float32, each for `block` columns, the last perhaps for fewer. Returns float32 on the
    CPU.
    """
    columns = scales.T.contiguous().to(hessian.device)

    def nearest(column: Tensor, number: int) -> Tensor:
        scale = columns[number // block]
        return rounded(column / scale, element) * scale

    return compensate(weight.float().to(hessian.device), hessian, nearest).cpu()


def rounded(values: Tensor, element: Element) -> Tensor:
    """The nearest numbers of an element type, half to even, from its lowest to its largest."""
    magnitudes = values.clamp(element.lowest, element.largest).abs()
    exponents = torch.frexp(magnitudes.clamp(min=element.least)).exponent
    steps = torch.ldexp(torch.ones_like(magnitudes), exponents - 1 - element.mantissa_bits)
    return torch.copysign((magnitudes / steps).round() * steps, values)


def weighting(stats: Stats | None) -> Tensor | None:
    """(in_features,): what the squared error of each column counts. Mean squares of the inputs, all raised by their
    median: the small ones differ from text to text, the large ones do not."""
    return None if stats is None else (stats.second_moment + stats.second_moment.median()).float()


def search(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    steps: Sequence[int],
    top: int,
    element: Element,
    weights: Tensor | None,
) -> Tensor:
    """Of the scales numbered codes + step, each block's with the least squared error; of equal ones the first.

    weight: (out_features, in_features) bf16, fp16 or fp32, on the CPU. codes: (out_features, blocks) uint8, numbers in
    `scales`, which holds positive float32 in ascending order up to `top`. weights: (in_features,) float32, of the
    errors; None for all alike. Returns numbers like `codes`.
    """
    rows, blocks = codes.shape
    if not codes.numel():
        return codes
    tiles = -(-blocks // LANES)
    lanes, size = -(-blocks // tiles), weight.shape[1] // blocks
    importance = np.zeros((tiles * lanes, size), np.float32)
    importance[:blocks] = 1 if weights is None else weights.reshape(blocks, size).numpy()
    importance = np.ascontiguousarray(importance.reshape(tiles, lanes, size).transpose(0, 2, 1))
    source, shift = float_bits(weight)
    found = codes.numpy().copy()
    offsets = np.array(steps, np.int64)
    # One and a half, so that values of either sign stay in the same octave when it is added.
    to_step = 1.5 * 2.0 ** (23 - element.mantissa_bits)
    kind = tuple(map(np.float32, (to_step, element.least, element.largest, element.lowest)))
    arguments = (source, shift, scales.numpy(), (1 / scales).numpy(), offsets, top, kind, importance, found)
    in_threads(_search_rows, rows, weight.numel(), *arguments)
    return torch.from_numpy(found)


@jit
def _search_rows(start, stop, source, shift, scales, units, steps, top, kind, importance, codes):  # type: ignore[no-untyped-def]
    """importance: (tiles, values of a block, lanes). codes: (rows, blocks), replaced by the best."""
    tiles, size, lanes = importance.shape
    tile = np.zeros((size, lanes), np.float32)
    first = np.zeros(lanes, np.int64)
    work = (_lane(lanes), _lane(lanes), _lane(lanes), _lane(lanes), _lane(lanes))
    for row in range(start, stop):
        for t in range(tiles):
            best = codes[row, t * lanes : (t + 1) * lanes]
            first[: best.shape[0]] = best
            _load(source[row, t * lanes * size :], shift, best.shape[0], units, first, tile)
            _search_tile(tile, first, scales, units, steps, top, kind, importance[t], best, work)


@jit
def _lane(lanes):  # type: ignore[no-untyped-def]
    return np.zeros(lanes, np.float32)


@jit
def _load(source, shift, count, units, first, tile):  # type: ignore[no-untyped-def]
    """Values in units of each block's first scale: then their squares neither overflow nor vanish."""
    size = tile.shape[0]
    for k in range(count):
        unit = units[first[k]]
        part = source[k * size : (k + 1) * size]
        for i in range(size):
            tile[i, k] = np.uint32(np.uint32(part[i]) << shift).view(np.float32) * unit


@jit
def _search_tile(tile, first, scales, units, steps, top, kind, importance, best, work):  # type: ignore[no-untyped-def]
    ratios, inverses, errors, least, chosen = work
    least[:] = np.float32(np.inf)
    for step in steps:
        for k in range(best.shape[0]):
            code = min(max(first[k] + step, 0), top)
            ratios[k] = scales[code] * units[first[k]]
            inverses[k] = units[code] * scales[first[k]]
        _errors(tile, kind, importance, ratios, inverses, errors)
        for k in range(chosen.shape[0]):  # without a branch, which would be guessed wrong
            better = errors[k] < least[k]
            error, kept = least[k], chosen[k]
            least[k] = errors[k] if better else error
            chosen[k] = np.float32(step) if better else kept
    for k in range(best.shape[0]):
        best[k] = min(max(first[k] + np.int64(chosen[k]), 0), top)


@jit
def _errors(tile, kind, importance, ratios, inverses, errors):  # type: ignore[no-untyped-def]
    """Weighted sums of squared errors of each lane's values, rounded at inverses[k] times their size."""
    to_step, least, largest, lowest = kind
    errors[:] = np.float32(0)
    for i in range(tile.shape[0]):
        for k in range(tile.shape[1]):
            value = np.float32(min(max(tile[i, k] * inverses[k], lowest), largest))
            power = np.uint32(np.float32(value).view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
            # Where float32's own steps are the element's, the addition rounds, half to even.
            large = max(power, least) * to_step
            difference = tile[i, k] - ((value + large) - large) * ratios[k]
            errors[k] += difference * difference * importance[i, k]
