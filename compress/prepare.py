"""From a model and options to a resolved plan and its exact size, from headers where these decide it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress import hub, interchange, kv_scales, sizes
from compress.candidates import candidates
from compress.layout import Unit, tied_copies, units
from compress.memory import calibration_bytes
from compress.pipeline import TensorReport, read_weight
from compress.planning import Packed, Plan, resolve, weight_shape
from compress.recipe import Rules
from compress.registry import make
from compress.scheme import Scheme, Spec
from compress.source import Source
from compress.structure import Structure, build, read_config

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
WORKING_BYTES = 128 << 20  # chunks of the decoder and of the error measurement, and the header of a shard


@dataclass(frozen=True)
class Forecast:
    """What a run will write: the plan, a line for each tensor, totals, and what a user should know."""

    plan: Plan
    tensors: list[TensorReport]
    totals: dict[str, Any]
    peak_memory_bytes: int  # private memory beside the libraries and the scoring
    notes: list[str]


class Prepared:
    """A model directory with its plan: what `plan` prints and `quantize` carries out."""

    def __init__(
        self,
        model: str | Path,
        scheme: str,
        options: Mapping[str, Any],
        rules: Rules,
        cache: str | None = None,
        target_size: int | str | None = None,
    ) -> None:
        """cache: what the scales that are stored for the KV cache are for, one of `kv_scales.KINDS`.

        target_size: what all tensors may take. Then `scheme` names candidates, and `plan` is that of the first of them
        until one is `chosen` for each weight.
        """
        if target_size is None and "," in scheme:
            raise ValueError(f"scheme {scheme!r}: several are for --target-size, which chooses among them; name one")
        self.target_bytes = None if target_size is None else sizes.parse(target_size)
        self.candidates = (make(scheme, options),) if target_size is None else candidates(scheme, options)
        self.scheme = self.candidates[0]
        self._rules, self._cache_kind = rules, cache
        ruled = rules.read(self.scheme)
        self.path = hub.local_directory(model)
        lossless = all(s.lossless for s in (self.scheme, *(rule.scheme for rule in ruled)) if s is not None)
        self.source = Source(self.path, foreign=not lossless)  # what another packed is lossless only as it is
        config = read_config(self.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        self.structure = Structure(build(config), self.source.specs)
        self.tied = tied_copies(self.source, self.structure.tied(), lambda name: self.structure.target(name)[0])
        self.structure.leave_out(self.tied)
        self.plans = tuple(self._planned(candidate) for candidate in self.candidates)
        self.plan = self.plans[0]

    def chosen(self, schemes: Mapping[str, Scheme]) -> Prepared:
        """With these in the places that the first candidate would have, by module."""
        made = copy.copy(self)
        made.plan = self._planned(self.scheme, schemes)
        made.plans = (made.plan,)
        return made

    def _planned(self, scheme: Scheme, chosen_for: Mapping[str, Scheme] | None = None) -> Plan:
        plan = resolve(self.structure, self.source.specs, self._rules.read(scheme), scheme, chosen_for)
        return replace(plan, base=self.source.base, kv_cache=self._cache(plan))

    def _cache(self, plan: Plan) -> dict[str, str]:
        kind = self._cache_kind
        if kind is None:
            return {}
        planned = kv_scales.plan(self.structure, kind)
        if plan.interchange != interchange.METHOD or self.source.base is not None:
            raise ValueError(
                f"--kv-cache {kind}: the result is not in the compressed-tensors layout, "
                "which alone has a place for these scales; leave it out, or choose int4, int8 or fp8"
            )
        return planned

    @property
    def open(self) -> list[str]:
        """The linears that are to get one of several candidates, and no rule decides which."""
        return [m for m in self.structure.linears if len({plan.modules.get(m) for plan in self.plans}) > 1]

    @property
    def weighted(self) -> list[str]:
        """The linears of which the Fisher information is wanted: for the choice, or by a scheme that they may get."""
        wanting = {m for plan in self.plans for m, packed in plan.modules.items() if packed.scheme.needs_fisher}
        wanting.update(self.open)
        return [module for module in self.structure.linears if module in wanting]

    @property
    def needs_calibration(self) -> bool:
        """Whether text runs through the model."""
        return self.target_bytes is not None or self.plan.needs_calibration

    @property
    def described(self) -> tuple[str, dict[str, Any]]:
        """The scheme's name and its options; of candidates all names, and the options that they have in common."""
        fields = [candidate.to_dict() for candidate in self.candidates]
        names = dict.fromkeys(found.pop("scheme") for found in fields)
        shared = {key: value for key, value in fields[0].items() if all(f.get(key) == value for f in fields)}
        return ", ".join(names), shared

    @property
    def schemes(self) -> list[Scheme]:
        """Those of the plan, each once."""
        return list(dict.fromkeys(packed.scheme for packed in self.plan.modules.values()))

    def notes(self) -> list[str]:
        """What a user should know of the plan."""
        alike: dict[str, list[str]] = {}
        for module, note in self.plan.notes.items():
            alike.setdefault(note, []).append(module)
        notes = [f"{note} ({modules[0]}{_and_more(modules, 1)})" for note, modules in alike.items()]
        notes += [f"{copy}: tied to {kept}, stored once" for copy, kept in self.tied.items()]
        if self.source.base:
            method = self.source.base.get("quant_method")
            notes.append(f"the source is compressed already with {method}: its tensors are coded as they are stored")
        if self.source.packed:
            notes.append("the source is compressed already: sizes and errors are against its decoded weights")
        if self.plan.left:
            named = ", ".join(self.plan.left[:4]) + _and_more(self.plan.left, 4)
            notes.append(f"linear weights left as they are: {named}")
        if self.source.left_out:
            notes.append("the scales of the source's KV cache are left out; --kv-cache fp8 measures new ones")
        if self.plan.kv_cache:
            notes.append(
                f"scales for a KV cache in fp8 ({len(self.plan.kv_cache)} attention modules): vLLM has one with "
                "--kv-cache-dtype fp8; here keys and values are rounded as they would be in it"
            )
        if self.plan.modules and not self.plan.interchange:
            notes.append("no other library has a form for this plan: it is written in our own layout")
        if not self.plan.modules:
            notes.append("no weight was found to compress: weights are copied")
        return notes

    def forecast(self, progress: Progress | None = None) -> Forecast:
        """Bytes of every tensor, and of the peak. Where the size depends on the values, these are read."""
        planned = units(self.source, self.plan, self.tied)
        total, done = sum(unit.original_bytes for unit in planned), 0
        lines: list[TensorReport] = []
        for unit in planned:
            if unit.block:  # the line of its module has all blocks
                continue
            lines += self._lines(unit)
            done += unit.original_bytes
            if progress and unit.sized_by_data:
                progress("measuring", done, total)
        totals = summarize([vars(line) for line in lines])
        return Forecast(self.plan, lines, totals, self._peak(), self.notes())

    def _lines(self, unit: Unit) -> Iterable[TensorReport]:
        if unit.measured:
            yield from (TensorReport.measured(name, spec) for name, spec in unit.specs.items())
            return
        spec = self.source.specs[unit.source]
        if not unit.modules:
            yield _line(unit.source, spec, None, spec.bytes)
        for module in unit.modules:
            packed = self.plan.modules[module]
            weight = Spec(spec.dtype, weight_shape(packed, spec))
            if packed.scheme.sized_by_data:
                size = packed.scheme.measure(read_weight(self.source, packed))
            else:
                size = packed.scheme.bytes(weight.shape, weight.dtype)
            yield _line(module, weight, packed.scheme.name, size)
        if unit.sized_by_data:
            self.source.release(unit.source)

    def _peak(self) -> int:
        largest = max((self._working_bytes(packed) for packed in self.plan.modules.values()), default=0)
        return WORKING_BYTES + max(largest, calibration_bytes(self.plan, self.structure, self.source.specs))

    def _working_bytes(self, packed: Packed) -> int:
        """The packed tensors and the decoded copy that their error is measured on; mapped pages are not private."""
        spec = self.source.specs[packed.source]
        shape = weight_shape(packed, spec)
        copies = 1 + packed.transposed + self.source.is_packed(packed.source)
        size = copies * math.prod(shape) * spec.dtype.itemsize + packed.scheme.bytes(shape, spec.dtype)
        # float16 is encoded and decoded by way of a float32 copy
        return size + (4 * math.prod(shape) if spec.dtype == torch.float16 and not packed.scheme.lossless else 0)


def _and_more(names: Sequence[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def summarize(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """The totals of a report from its lines: bytes, ratio, bits per weight, parameters."""
    packed = [line for line in tensors if line["scheme"]]
    original, size = (sum(line[key] for line in tensors) for key in ("original_bytes", "bytes"))
    stored = [line for line in tensors if line["original_bytes"]]  # and not what calibration added
    parameters, weights = (sum(math.prod(line["shape"]) for line in lines) for lines in (stored, packed))
    return {
        "original_bytes": original,
        "bytes": size,
        "ratio": original / size if size else 1.0,
        "bits_per_weight": 8 * sum(line["bytes"] for line in packed) / weights if weights else None,
        "bits_per_weight_model": 8 * size / parameters if parameters else 0.0,
        "parameters": parameters,
    }


def _line(name: str, spec: Spec, scheme: str | None, size: int) -> TensorReport:
    weights = math.prod(spec.shape)
    return TensorReport(name, spec.shape, scheme, size, spec.bytes, 8 * size / weights if weights else 0.0)
