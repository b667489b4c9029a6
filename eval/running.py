"""How a model is run to be scored: in which dtype, and whole or one block after the other."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from compress import sizes
from compress.blocks import Blocks
from compress.eval.fidelity import check_finite
from compress.eval.predictions import Pass, Progress
from compress.hf import CompressQuantizer, load
from compress.source import Source

Dtype = Literal["auto", "stored", "float32"]
_SHARE = 0.8  # of the memory that weights may take; the rest is for logits, activations and the libraries


@dataclass(frozen=True)
class Running:
    """float32: else in the dtype that is stored. streamed: block by block, which is always in float32."""

    device: str
    float32: bool
    streamed: bool

    @property
    def dtype(self) -> str:
        return "float32" if self.float32 else "stored"


def choose(path: Path, device: str, dtype: Dtype = "auto", max_memory: int | str | None = None) -> Running:
    """How to run the largest model of a comparison.

    float32 where the CPU has no instructions for the stored dtype: it then multiplies ten times as fast, and weights
    are the same, since bf16 and fp16 values are float32 values. Streamed where the weights would take more than four
    fifths of the device's memory, or more than max_memory. The same machine decides alike whatever else it runs.
    """
    if dtype not in ("auto", "stored", "float32"):
        raise ValueError(f"dtype: {dtype}; choose auto, stored or float32")
    try:
        source = Source(path)
    except ValueError:  # what another library packed in its own way, it runs
        return Running(device, dtype == "float32", False)
    specs = (source.stored if source.packed else source.specs).values()
    stored = sum(spec.bytes for spec in specs)
    wide = stored if source.packed else sum(4 * math.prod(spec.shape) for spec in specs)
    room = sizes.parse(max_memory) if max_memory is not None else int(_SHARE * memory_bytes(device))
    float32 = dtype == "float32" or (dtype == "auto" and not _multiplies(source, device))
    if float32 and wide > room and stored <= room and dtype == "auto":
        float32 = False
    streamed = (wide if float32 else stored) > room
    return Running(device, float32 or streamed, streamed)


def is_compressed(path: Path) -> bool:
    """Whether it is stored otherwise than it is run block by block: packed, or by another library."""
    try:
        return bool(Source(path).packed)
    except ValueError:
        return True


def loaded(path: str | Path, how: Running, **loading: Any) -> Any:
    """The model in memory. Linears that are packed stay so; they are decoded to the stored dtype when they run.

    loading: more that `compress.load` is to be given.
    """
    model = load(path, device=how.device, **loading)
    quantizer = getattr(model, "hf_quantizer", None)
    if how.float32 and (quantizer is None or isinstance(quantizer, CompressQuantizer)):
        torch.nn.Module.to(model, torch.float32)  # what another library packed is its own to run
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # as packed experts run: others sum, and so round, in another order
    return model


def streamed(path: Path, windows: torch.Tensor, folder: Path, device: str, progress: Progress | None) -> Iterator[Pass]:
    """As `fidelity.passes`, by a model whose blocks are in memory one at a time. folder: for activations."""
    end, started = 0, time.perf_counter()
    for logits in outputs(path, windows, folder, device, progress):
        check_finite(logits, end, str(path))
        end += len(logits)
        yield end, logits, time.perf_counter() - started
        started = time.perf_counter()


def outputs(
    path: Path, samples: torch.Tensor | Sequence[torch.Tensor], folder: Path, device: str, progress: Progress | None
) -> Iterator[torch.Tensor]:
    """The logits of samples, as `Blocks` takes them, batch by batch, by a model whose blocks are in memory one at a
    time."""
    try:
        blocks = Blocks(Source(path), {}, samples, folder, device)
        for done in range(1, len(blocks.names) + 1):
            if (block := blocks.next()) is None:
                break
            blocks.open(block)
            blocks.close(block)
            blocks.leave([block])
            if progress:
                progress("block by block", done, len(blocks.names))
    except ValueError as error:
        reason = str(error).partition("; ")[0]  # what follows is advice on calibration
        raise ValueError(f"{path} does not fit into the memory (--original-memory), and {reason}") from None
    yield from blocks.logits()


def memory_bytes(device: str) -> int:
    """All the memory of a device, or of the part of it that this process is confined to."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return int(torch.cuda.get_device_properties(kind).total_memory)
    sizes_found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            sizes_found.append(int(limit.read_text()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(sizes_found)


def _multiplies(source: Source, device: str) -> bool:
    """Whether the device has instructions for what most of the weights are stored in."""
    stored: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        stored[spec.dtype] = stored.get(spec.dtype, 0) + spec.bytes
    most = max(stored, key=lambda dtype: stored[dtype])
    if torch.device(device).type != "cpu" or most not in (torch.bfloat16, torch.float16):
        return True
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    name = "bf16" if most == torch.bfloat16 else "fp16"
    if platform.machine() in ("arm64", "aarch64"):
        return any(value for key, value in found.items() if name in key)
    return any(found.get(f"{unit}_{name}") for unit in ("amx", "avx512"))
