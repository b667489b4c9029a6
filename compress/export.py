"""`export`: a compressed checkpoint as a plain one that anything loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from compress import __version__
from compress.formats.files import write_text
from compress.formats.shard import ShardWriter, write_index
from compress.job import Job, check_apart
from compress.layout import SHARD_BYTES, Unit, copy_side_files, shards
from compress.scheme import Spec
from compress.source import Source

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(
    model: Path,
    out: Path,
    to: str = "bf16",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Decodes every weight of `model` and writes it in `to`, one of bf16, fp16, fp32. Integer tensors stay as they are.

    Raises ValueError for an unknown form, and where a value does not fit into fp16.
    """
    if to not in DTYPES:
        raise ValueError(f"form {to!r} is unknown; choose one of {', '.join(DTYPES)}")
    check_apart(out, model)
    source = Source(model)
    recipe = {
        "export": str(model.resolve()),
        "to": to,
        "shard_bytes": shard_bytes,
        "files": source.identity(),
        "versions": [__version__, torch.__version__],
    }
    with Job(out, recipe, overwrite) as job:
        if not job.finished:
            try:
                _write(job, source, DTYPES[to], shard_bytes, progress)
            except ValueError:
                job.discard()  # the input is at fault: nothing of this run can be used again
                raise
        job.finish()


def _write(job: Job, source: Source, dtype: torch.dtype, shard_bytes: int, progress: Progress | None) -> None:
    group = [Unit(name, (), {name: Spec(_target(spec, dtype), spec.shape)}) for name, spec in source.specs.items()]
    layout = shards(group, shard_bytes)
    total, done = sum(unit.bytes for unit in group), 0
    job.check_room(total)
    files: dict[str, str] = {}
    for file, part in layout.items():
        if job.recall(file) is None:
            _write_shard(job.checkpoint / file, source, part)
            job.note(file, {})
        files |= dict.fromkeys((unit.source for unit in part), file)
        done += sum(unit.bytes for unit in part)
        if progress:
            progress("exporting", done, total)
    if len(layout) > 1:
        write_index(job.checkpoint, files, total)
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_text(job.checkpoint / "config.json", json.dumps(config, indent=2) + "\n")
    copy_side_files(source.path, job.checkpoint)
    if (source.path / "compress.json").exists():  # its card tells of packed weights
        note = f"The weights of `{source.path.name}`, decoded by `compress export --to {_name(dtype)}`.\n"
        write_text(job.checkpoint / "README.md", f"# {source.path.name}\n\n{note}")


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _target(spec: Spec, dtype: torch.dtype) -> torch.dtype:
    return dtype if spec.dtype.is_floating_point else spec.dtype


def _write_shard(path: Path, source: Source, part: list[Unit]) -> None:
    announced = [(name, spec.dtype, spec.shape) for unit in part for name, spec in unit.specs.items()]
    with ShardWriter(path, announced) as writer:
        for unit in part:
            tensor = source.read(unit.source)
            writer.add(unit.source, _cast(unit.source, tensor, unit.specs[unit.source].dtype))
            source.release(unit.source)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.numel() and not cast.isfinite().all() and tensor.isfinite().all():
        raise ValueError(f"{name}: has values that do not fit into fp16; export to bf16 or fp32")
    return cast
