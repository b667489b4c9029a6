"""Checkpoint in, plan applied one tensor at a time, checkpoint out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.change import Change, unchanged
from compress.formats.files import replacing, write_text
from compress.formats.shard import ShardWriter, write_index
from compress.job import Job
from compress.layout import SHARD_BYTES, Block, Unit, copy_side_files, shards, units
from compress.planning import Packed, Plan, weight_shape
from compress.scheme import Scheme, Spec, Tensors
from compress.source import Source

ERROR_VALUES = 1 << 18  # values compared at once: what a core's cache holds

Progress = Callable[[int, str], None]  # source bytes just done, name of the tensor


@dataclass(frozen=True)
class TensorReport:
    """One line of the report: a compressed module, or a tensor that was copied (scheme None)."""

    name: str
    shape: tuple[int, ...]
    scheme: str | None
    bytes: int
    original_bytes: int
    bits_per_weight: float
    relative_error: float | None = None  # |W - W'| / |W|, Frobenius
    output_error: float | None = None  # |X (W - W')| / |X W| on the calibration text
    note: str | None = None
    seconds: float | None = None  # that its encoding took, calibration apart

    @classmethod
    def measured(cls, name: str, spec: Spec, note: str | None = None) -> TensorReport:
        """Of a tensor that the source does not have."""
        return cls(name, spec.shape, None, spec.bytes, 0, _bits(spec.bytes, math.prod(spec.shape)), note=note)


ADDED = "added"  # what became of a tensor that is none of the source
_SIDES = ("in.", "out.")


def changes_stored(inputs: Change | None, outputs: Change | None) -> Tensors:
    """Changes of a module's channels as tensors, by names that no tensor of a scheme has."""
    sides = zip(_SIDES, (inputs, outputs), strict=True)
    return {f"{side}{name}": tensor for side, change in sides if change for name, tensor in change.tensors.items()}


def changes_read(tensors: Tensors) -> tuple[Change | None, Change | None]:
    """The inverse of `changes_stored`; there may be other tensors with them."""
    found = [{n.removeprefix(side): t for n, t in tensors.items() if n.startswith(side)} for side in _SIDES]
    inputs, outputs = (Change(**named) if named else None for named in found)
    return inputs, outputs


@dataclass(frozen=True)
class Fitted:
    """A module that calibration has encoded, or another tensor that it has changed: where its tensors lie, and what the
    report says of it."""

    file: Path
    output_error: float | None
    note: str | None
    errors: Sequence[tuple[float, float | None]] | None = None  # relative and output error with 1, 2, ... blocks
    importance: float | None = None  # of its output error squared, beside that of other modules (`stack.py`)
    seconds: float | None = None  # that its encoding took

    def tensors(self, name: str, keep: Callable[[str], bool] = lambda local: True) -> Tensors:
        """Of a module, by local name; of a tensor that is no weight of a linear, itself, under an empty name."""
        return self._read(name, lambda local: not local.startswith(_SIDES) and keep(local))

    def changes(self, module: str) -> tuple[Change | None, Change | None]:
        """What calibration has done to the channels that a module reads, and to those that it makes."""
        return changes_read(self._read(module, lambda local: local.startswith(_SIDES)))

    def _read(self, module: str, keep: Callable[[str], bool]) -> Tensors:
        with safe_open(self.file, "pt") as file:
            names = [name.rpartition("|") for name in file.keys()]
            locals = [local for owner, _, local in names if owner == module and keep(local)]
            return {local: file.get_tensor(f"{module}|{local}") for local in locals}

    @staticmethod
    def save(file: Path, modules: Mapping[str, Tensors]) -> None:
        """Writes the tensors of several modules."""
        stored = {f"{m}|{local}": tensor.clone() for m, made in modules.items() for local, tensor in made.items()}
        with replacing(file) as unfinished:
            save_file(stored, unfinished)


@dataclass(frozen=True)
class Written:
    """What was written: stored tensors, shards (file -> SHA-256 of its header), source hashes, the report's lines."""

    records: dict[str, dict[str, Any]]
    shards: dict[str, str]
    source_sha256: dict[str, list[str]]
    reports: list[dict[str, Any]]
    seconds: float  # in all runs that had a part in it


def write(
    job: Job,
    source: Source,
    plan: Plan,
    tied: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    fitted: Mapping[str, Fitted] | None = None,
    order: Sequence[Block] = (),
) -> Written:
    """Writes shards, index, config.json and side files to the job's checkpoint directory, going on where it stopped.

    fitted: the modules that calibration has encoded, and all stacked ones; the others are encoded now. order: of the
    later blocks of stacked ones.
    """
    layout = shards(units(source, plan, tied, order), shard_bytes)
    job.check_room(sum(unit.bytes for group in layout.values() for unit in group))
    records: dict[str, dict[str, Any]] = {}
    headers, hashes, reports, seconds = {}, {}, [], 0.0
    for file, group in layout.items():
        done = job.recall(file)
        if done is None:
            done = _write_shard(job.checkpoint / file, source, plan, group, fitted or {}, progress)
            job.note(file, done)
        elif progress:
            for unit in group:
                progress(unit.original_bytes, unit.source)
        records.update(done["records"])
        headers[file] = done["header_sha256"]
        hashes.update(done["source_sha256"])
        reports += done["reports"]
        seconds += done["seconds"]
    _check_written(layout, records)
    if len(layout) > 1:
        names = {name: record["file"] for name, record in records.items()}
        write_index(job.checkpoint, names, sum(record["bytes"] for record in records.values()))
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if plan.modules or plan.kv_cache or plan.base:
        config["quantization_config"] = plan.to_config() if plan.modules or plan.kv_cache else plan.base
    write_text(job.checkpoint / "config.json", json.dumps(config, indent=2) + "\n")
    copy_side_files(source.path, job.checkpoint)
    return Written(records, headers, hashes, reports, seconds)


def _check_written(layout: dict[str, list[Unit]], records: dict[str, dict[str, Any]]) -> None:
    """What was written is what was planned, tensor by tensor; anything else is a fault of ours."""
    written = {name: record["bytes"] for name, record in records.items()}
    for unit in (unit for group in layout.values() for unit in group):
        found = {name: written.pop(name) for name in unit.specs if name in written}
        planned = {name: spec.bytes for name, spec in unit.specs.items()}
        fits = sum(found.values()) <= unit.bytes if unit.sized_by_data else found == planned
        if not found or not fits:
            raise RuntimeError(f"{unit.source}: planned {unit.bytes} bytes as {planned}, wrote {found}")
    if written:
        raise RuntimeError(f"{next(iter(written))}: written and not planned")


def _write_shard(
    path: Path,
    source: Source,
    plan: Plan,
    group: list[Unit],
    fitted: Mapping[str, Fitted],
    progress: Progress | None,
) -> dict[str, Any]:
    announced = [(name, spec.dtype, spec.shape) for unit in group for name, spec in unit.specs.items()]
    hashes: dict[str, list[str]] = {}
    reports: list[dict[str, Any]] = []
    started = time.monotonic()
    with ShardWriter(path, announced) as writer, ThreadPoolExecutor(1) as pool:
        for unit in group:
            if unit.measured:
                reports += [asdict(report) for report in _write_measured(writer, unit, fitted[unit.source])]
                continue
            if unit.block:
                _add_block(writer, source, plan, unit, fitted[unit.modules[0]])
                continue
            hashing = pool.submit(source.hashes, unit.source)  # beside the encoding
            reports += [asdict(report) for report in _write_unit(writer, source, plan, unit, fitted)]
            hashes[unit.source] = hashing.result()
            source.release(unit.source)
            if progress:
                progress(unit.original_bytes, unit.source)
    return {
        "records": writer.records,
        "header_sha256": writer.header_sha256,
        "source_sha256": hashes,
        "reports": reports,
        "seconds": time.monotonic() - started,
    }


def _write_measured(writer: ShardWriter, unit: Unit, fitted: Fitted) -> Iterator[TensorReport]:
    for local, tensor in sorted(fitted.tensors(unit.source).items()):
        name = f"{unit.source}.{local}"
        writer.add(name, tensor)
        yield TensorReport.measured(name, unit.specs[name], fitted.note)


def _write_unit(
    writer: ShardWriter, source: Source, plan: Plan, unit: Unit, fitted: Mapping[str, Fitted]
) -> Iterator[TensorReport]:
    spec = source.specs[unit.source]
    if not unit.modules:
        folded = fitted.get(unit.source)
        writer.add(unit.source, source.read(unit.source) if folded is None else folded.tensors(unit.source)[""])
        bits = _bits(spec.bytes, math.prod(spec.shape))
        note = None if folded is None else folded.note
        yield TensorReport(unit.source, spec.shape, None, spec.bytes, spec.bytes, bits, note=note)
        return
    for module in unit.modules:
        yield _write_module(writer, source, plan, module, fitted.get(module))
    if not plan.interchange:
        writer.add(unit.source, torch.empty(0, dtype=torch.uint8))


def _write_module(writer: ShardWriter, source: Source, plan: Plan, module: str, fitted: Fitted | None) -> TensorReport:
    packed = plan.modules[module]
    scheme, weight = packed.scheme, read_weight(source, packed)
    if scheme.stacked:
        assert fitted is not None
        return _write_first_block(writer, plan, module, weight, fitted)
    check_finite(weight, module, packed)
    started, shape = time.monotonic(), tuple(weight.shape)
    tensors = scheme.encode(weight) if fitted is None else fitted.tensors(module)
    seconds = time.monotonic() - started if fitted is None else fitted.seconds
    _add(writer, plan, module, Spec(weight.dtype, shape), tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    decoded = scheme.decode(tensors)
    if fitted is not None and any(changes := fitted.changes(module)):
        decoded = unchanged(decoded, *changes)
    error = _error(module, scheme, weight, decoded)
    unseen = "rounded to nearest: the calibration text does not reach it" if scheme.needs_calibration else None
    found = (None, unseen) if fitted is None else (fitted.output_error, fitted.note)
    return TensorReport(
        module, shape, scheme.name, size, weight.nbytes, _bits(size, weight.numel()), error, *found, seconds
    )


def _write_first_block(writer: ShardWriter, plan: Plan, module: str, weight: Tensor, fitted: Fitted) -> TensorReport:
    """The line is of all blocks."""
    scheme, shape = plan.modules[module].scheme, tuple(weight.shape)
    _add(
        writer,
        plan,
        module,
        Spec(weight.dtype, shape),
        fitted.tensors(module, lambda local: not scheme.block_of(local)),
    )
    size = scheme.bytes(shape, weight.dtype)
    assert fitted.errors is not None
    error, output_error = fitted.errors[-1]
    bits = _bits(size, weight.numel())
    found = (error, output_error, fitted.note, fitted.seconds)
    return TensorReport(module, shape, scheme.name, size, weight.nbytes, bits, *found)


def _add_block(writer: ShardWriter, source: Source, plan: Plan, unit: Unit, fitted: Fitted) -> None:
    module = unit.modules[0]
    packed, spec = plan.modules[module], source.specs[unit.source]
    tensors = fitted.tensors(module, lambda local: packed.scheme.block_of(local) == unit.block)
    _add(writer, plan, module, Spec(spec.dtype, weight_shape(packed, spec)), tensors, unit.block)


def _add(writer: ShardWriter, plan: Plan, module: str, original: Spec, tensors: Tensors, block: int = 0) -> None:
    """Writes the tensors of a module, of a stacked one those of a block. Any other than were planned are our fault."""
    scheme, planned = plan.modules[module].scheme, plan.stored_specs(module, original)
    due = {local for local in planned if scheme.block_of(local) == block}
    if not scheme.sized_by_data and tensors.keys() != due:
        raise RuntimeError(f"{module}: planned {sorted(due)}, made {sorted(tensors)}")
    for local, tensor in tensors.items():
        name, spec = planned[local]
        made = Spec(tensor.dtype, tuple(tensor.shape))
        if made != spec and not (scheme.sized_by_data and made.dtype == spec.dtype and made.bytes <= spec.bytes):
            raise RuntimeError(f"{name}: planned {spec}, made {made}")
        writer.add(name, tensor)


def _error(module: str, scheme: Scheme, weight: Tensor, decoded: Tensor) -> float:
    """The relative error of what was written; of a lossless scheme the proof that there is none."""
    if not scheme.lossless:
        return relative_error(weight, decoded)
    if not same_bits(weight, decoded):
        raise RuntimeError(f"{module}: {scheme.name} does not give back what it was given; nothing is kept")
    return 0.0


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit: NaN equals itself, and 0 is not -0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def read_weight(source: Source, packed: Packed) -> Tensor:
    """The weight that `packed` stands for: (out_features, in_features) of a linear."""
    weight = source.read(packed.source, packed.index)
    return weight.T.contiguous() if packed.transposed else weight


def check_finite(weight: Tensor, module: str, packed: Packed) -> None:
    if packed.scheme.lossless or not weight.numel():
        return
    low, high = torch.aminmax(weight)  # one pass, nothing allocated; NaN shows in both
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise ValueError(
            f"{packed.source}: holds NaN or infinity, which {packed.scheme.name} cannot store; repair the checkpoint, "
            f"or leave it out with --exclude '{module}'"
        )


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """|weight - decoded| / |weight| in float64 sums over chunks, 0 for an all-zero weight that comes back."""
    rows = max(1, ERROR_VALUES // max(1, weight.shape[-1]))
    error = norm = 0.0
    for a, b in zip(weight.split(rows), decoded.split(rows), strict=True):
        reference = a.float()
        difference = reference - b.float()
        error += torch.linalg.vector_norm(difference).item() ** 2
        norm += torch.linalg.vector_norm(reference).item() ** 2
    return math.sqrt(error / norm) if norm else math.sqrt(error)


def _bits(size: int, weights: int) -> float:
    return 8 * size / weights if weights else 0.0
