"""`export`: a compressed checkpoint as a plain one that anything loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import __version__
from compress.formats.files import write_text
from compress.formats.shard import ShardWriter, write_index
from compress.job import Job, check_apart
from compress.layout import SHARD_BYTES, Unit, copied, copy_side_files, shards
from compress.scheme import Spec
from compress.source import Source

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ORIGINAL = "original"  # the tensors and dtypes from before a lossless coding


def export(
    model: Path,
    out: Path,
    to: str = "bf16",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Decodes every weight of `model` and writes it in `to`, one of bf16, fp16, fp32. Integer tensors stay as they are.

    to="original" undoes a lossless coding: every tensor as it was, packed by others or not. Raises ValueError for an
    unknown form, for "original" where nothing was coded without loss, for tensors that are not those that
    compress.json describes, and where a value does not fit into fp16.
    """
    if to not in (*DTYPES, ORIGINAL):
        raise ValueError(f"form {to!r} is unknown; choose one of {', '.join((*DTYPES, ORIGINAL))}")
    check_apart(out, model)
    source = Source(model, foreign=to != ORIGINAL)
    if to == ORIGINAL and not source.is_coded:
        raise ValueError(f"{model}: no lossless scheme coded it, so there is nothing to undo")
    if to == ORIGINAL and source.is_mixed:
        raise ValueError(f"{model}: not all was coded without loss, so the original is not in it; export --to bf16")
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
                _write(job, source, DTYPES.get(to), shard_bytes, progress)
            except ValueError:
                job.discard()  # the input is at fault: nothing of this run can be used again
                raise
        job.finish()


def _write(job: Job, source: Source, dtype: torch.dtype | None, shard_bytes: int, progress: Progress | None) -> None:
    group = [copied(name, Spec(_target(spec, dtype), spec.shape)) for name, spec in source.specs.items()]
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
    write_text(job.checkpoint / "config.json", json.dumps(_config(source, dtype), indent=2) + "\n")
    copy_side_files(source.path, job.checkpoint)
    if (source.path / "compress.json").exists():  # its card tells of packed weights
        note = f"The weights of `{source.path.name}`, decoded by `compress export --to {_name(dtype)}`.\n"
        write_text(job.checkpoint / "README.md", f"# {source.path.name}\n\n{note}")


def _config(source: Source, dtype: torch.dtype | None) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if dtype is None:
        return config if source.base is None else {**config, "quantization_config": source.base}
    config.pop("torch_dtype", None)
    return {**config, "dtype": str(dtype).removeprefix("torch.")}


def _name(dtype: torch.dtype | None) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), ORIGINAL)


def _target(spec: Spec, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype and spec.dtype.is_floating_point else spec.dtype


def _write_shard(path: Path, source: Source, part: list[Unit]) -> None:
    announced = [(name, spec.dtype, spec.shape) for unit in part for name, spec in unit.specs.items()]
    with ShardWriter(path, announced) as writer:
        for unit in part:
            source.hashes(unit.source)  # a user throws the packed copy away, trusting this one
            tensor = source.read(unit.source)
            writer.add(unit.source, _cast(unit.source, tensor, unit.specs[unit.source].dtype))
            source.release(unit.source)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and tensor.numel() and not cast.isfinite().all() and tensor.isfinite().all():
        raise ValueError(f"{name}: has values that do not fit into fp16; export to bf16 or fp32")
    return cast
