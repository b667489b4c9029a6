"""Saved statistics (`--stats FILE`): what calibration measures of the uncompressed model, in one safetensors file.

Each block is given what the uncompressed blocks before it give, so the file does not depend on a scheme, and serves any
of them without another pass. It holds, for every distinct input of linear layers, means, maxima and, where asked for,
the upper triangle of the Hessian; the Fisher information of each weight, where asked for; the folds of each block; and
the largest keys and values of each attention module.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress import fisher, kv_scales, stream
from compress.blocks import Beside, Blocks
from compress.change import Change
from compress.fold import KINDS, Fold, Kind, is_norm
from compress.formats.files import sync_directory
from compress.formats.shard import ShardWriter
from compress.hollow import OUTSIDE
from compress.job import Job
from compress.kv_scales import Largest
from compress.progress import Progress
from compress.samples import Samples
from compress.source import Source
from compress.stats import Stats
from compress.structure import Structure
from compress.walk import Noted, tensors_of, walk

VERSION = 3  # 3: the Fisher information is that of what the model says
ABOUT = "compress.statistics"  # the key of the metadata that has all but the tensors
STAGE = "measuring"
ANOTHER = "it stays as it is, so name another, or remove it"
MEANS = ("second_moment", "absmean", "absmax")
HESSIAN, SAMPLE, FISHER, CACHED = "hessian", "sample", "fisher", "cached"
LACKING = {
    HESSIAN: "holds no Hessians, and {} is fitted with one; name a new file, which then has them, or set method=rtn",
    SAMPLE: "holds no samples, and {} quantizes its inputs; name a new file, which then has them, or set smooth=false",
    FISHER: "holds no Fisher information, and {} is weighted by it; name a new file, which then has it, or leave out "
    "sensitivity=fisher or --target-size",
}


class Statistics:
    """An opened file. Raises ValueError where `path` is none that `measure` wrote, or not all of one.

    calibration: source, samples, seq_len and the SHA-256 of the tokens. parts: what it holds beside means and maxima.
    follows: whether the model computes the same with the residual stream in another order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._modules: dict[str, str | None] = {}  # -> the one whose input is the same; None where no token came
        self._tokens: dict[str, int] = {}
        try:
            self._take(_read_about(path))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"stats {path}: is no whole file of statistics ({error!r} is missing); {ANOTHER}"
            ) from None
        self._read = lru_cache(2)(self._read_stats)  # layers that share an input come one after the other

    def _take(self, about: dict[str, Any]) -> None:
        self._model: dict[str, str] = dict(about["model"])
        self.calibration: dict[str, Any] = dict(about["calibration"])
        self.parts = frozenset(about["parts"])
        self.follows = bool(about["stream"])
        self._order, self._sides = torch.empty(0, dtype=torch.int64), dict[str, int]()
        self.blocks: dict[str, Noted] = dict(about["blocks"])
        for noted in self.blocks.values():
            self._modules |= noted["modules"]
            self._tokens |= noted["tokens"]

    def check(self, source: Source, samples: Samples | None, wanted: Mapping[str, Collection[str]]) -> None:
        """Raises ValueError where it is not of this model, not of these tokens, or lacks a part that modules want."""
        model = identity(source)
        if model != self._model:
            what = "weights or config" if model["type"] == self._model["type"] else f"type ({self._model['type']})"
            raise ValueError(f"stats {self.path}: measured on a model of other {what}; name a new file for this one")
        if samples is not None and samples.sha256 != self.calibration["sha256"]:
            told = ", ".join(f"{self.calibration[key]} {key}" for key in ("samples", "seq_len"))
            raise ValueError(
                f"stats {self.path}: measured on other tokens ({self.calibration['source']}, {told}); leave out "
                "--calibration, --samples and --seq-len to use them, or name a new file"
            )
        for part, modules in wanted.items():
            if modules and part not in self.parts:
                raise ValueError(f"stats {self.path}: {LACKING[part].format(next(iter(modules)))}")

    def stats(self, module: str, parts: Collection[str], device: str = "cpu") -> Stats | None:
        """What was measured at the input of a linear layer; None where no token came. device: where a Hessian goes."""
        leader = self._modules.get(module)
        if leader is None:
            return None
        return self._read(leader, frozenset(parts) & self.parts, device, self._sides.get(module) == 1)

    def reordered(self, order: Sequence[int], sides: Mapping[str, int]) -> Statistics:
        """Of the model with the channels of its residual stream in this order. sides: those of `stream.sides`."""
        other = copy.copy(self)
        other._order, other._sides = torch.tensor(order), dict(sides)
        other._read = lru_cache(2)(other._read_stats)
        return other

    def folds(self, block: str, kinds: Collection[Kind] = KINDS) -> list[Fold]:
        known = (_tuples(fold) for fold in self.blocks[block]["folds"] if fold["kind"] in kinds)
        return [Fold(**fold) for fold in known]

    def cached(self, path: str) -> Largest:
        """What an attention module cached. path: its name in the model."""
        with safe_open(self.path, "pt") as file:
            name = f"{path}|{CACHED}"
            return Largest(file.get_tensor(name) if name in file.keys() else None)

    def fisher(self, module: str) -> Tensor | None:
        """(out_features, in_features) float32, of a weight; None where the loss does not depend on it."""
        with safe_open(self.path, "pt") as file:
            name = f"{module}|{FISHER}"
            squares = file.get_tensor(name) if name in file.keys() else None
        side = self._sides.get(module)
        return squares if squares is None or side is None else squares.index_select(side, self._order)

    def along(self, module: str) -> float | None:
        """The Fisher information of the factor of a weight as a whole."""
        with safe_open(self.path, "pt") as file:
            name = f"{module}|{fisher.ALONG}|{FISHER}"
            return file.get_tensor(name).item() if name in file.keys() else None

    def _read_stats(self, leader: str, parts: frozenset[str], device: str, ordered: bool) -> Stats:
        with safe_open(self.path, "pt") as file:
            means = {part: file.get_tensor(f"{leader}|{part}") for part in MEANS}
            if not all(mean.isfinite().all() for mean in means.values()):
                raise ValueError(f"stats {self.path}: {leader} is not finite, so the file is damaged; name a new one")
            whole = unpack(file.get_tensor(f"{leader}|{HESSIAN}")).to(device) if HESSIAN in parts else None
            sampled = f"{leader}|{SAMPLE}" if SAMPLE in parts else ""
            sample = file.get_tensor(sampled) if sampled in file.keys() else None
        found = Stats(self._tokens[leader], hessian=whole, sample=sample, **means)
        return found.ordered(self._order) if ordered else found


class Recorded:
    """Stands for `Blocks` where all was measured before: nothing runs, and no weights are held.

    linears: the layers that are asked for. device: where Hessians go.
    """

    def __init__(
        self, saved: Statistics, source: Source, structure: Structure, linears: Collection[str], device: str
    ) -> None:
        self._saved, self._model, self._device = saved, structure.model, device
        self._linears = {
            block: [module for module in noted["modules"] if module in linears] for block, noted in saved.blocks.items()
        }
        placed = filter(structure.is_placed, source.specs)
        self._stored = {structure.target(name)[0]: name for name in placed}
        self._left: set[str] = set()

    @property
    def names(self) -> list[str]:
        return [block for block in self._saved.blocks if block != OUTSIDE]

    def next(self) -> str | None:
        return next((block for block in self.names if block not in self._left), None)

    def leave(self, blocks: Iterable[str]) -> None:
        self._left.update(blocks)

    def ready(self) -> bool:
        return True

    def linears(self, block: str) -> list[str]:
        return self._linears.get(block, [])

    def measure(
        self,
        block: str,
        hessians: Container[str] = (),
        samples: Container[str] = (),
        modules: Iterable[str] | None = None,
        beside: Beside | None = None,
    ) -> Mapping[str, Stats | None]:
        """Read one by one, when they are looked up."""

        def read(module: str) -> Stats | None:
            parts = [part for part, wanted in ((HESSIAN, hessians), (SAMPLE, samples)) if module in wanted]
            return self._saved.stats(module, parts, self._device)

        return _Read(self._linears[block], read)

    def folds(self, block: str, kinds: Collection[Kind] = KINDS) -> list[Fold]:
        return self._saved.folds(block, kinds)

    def close(self, block: str, attentions: Iterable[str] = ()) -> dict[str, Largest]:
        return {path: self._saved.cached(path) for path in attentions}

    def stored(self, parameter: str) -> str | None:
        return self._stored.get(parameter)

    def is_norm(self, fold: Fold) -> bool:
        return is_norm(self._model, fold)

    def output(self, block: str) -> None:
        """Nothing runs."""

    def open(self, block: str) -> None: ...
    def check(self, block: str, fold: Fold, change: Change) -> None: ...
    def put(self, parameter: str, tensor: Tensor) -> None: ...
    def set(self, module: str, weight: Tensor) -> None: ...


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With tuples for JSON's lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


class _Read(Mapping[str, Stats | None]):
    def __init__(self, modules: list[str], read: Callable[[str], Stats | None]) -> None:
        self._modules, self._of = modules, read

    def __getitem__(self, module: str) -> Stats | None:
        return self._of(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def identity(source: Source) -> dict[str, str]:
    """What tells models apart: their type, and one SHA-256 for weights and config, whatever files they lie in."""
    aside = ("transformers_version", "_name_or_path")  # which do not change what it computes
    config = {key: value for key, value in source.config.items() if key not in aside}
    weights = {}
    for name in sorted(source.specs):
        weights[name] = source.hashes(name)
        source.release(name)
    text = json.dumps([config, weights], sort_keys=True)
    return {"type": str(source.config.get("model_type")), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_place(path: Path, *directories: Path) -> None:
    """Raises ValueError where a file cannot be written at `path`, or lies in one of `directories`."""
    if path.is_dir() or not path.name:
        raise ValueError(f"stats {path}: is a directory; name a file")
    inside = [directory for directory in directories if directory.resolve() in path.resolve().parents]
    if inside:
        raise ValueError(f"stats {path}: lies in {inside[0]}; name a file elsewhere")
    if not path.exists() and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ValueError(f"stats {path}: {path.parent} is no directory that can be written to")


def measure(
    job: Job,
    source: Source,
    structure: Structure,
    samples: Samples,
    parts: Collection[str],
    path: Path,
    device: str,
    progress: Progress | None = None,
) -> None:
    """Writes the statistics of a model to `path`, which is there when they are complete.

    samples: what runs through it. parts: of HESSIAN, SAMPLE and FISHER those that are wanted beside means and maxima.

    Raises FileExistsError, and leaves that file as it is, where one has this name by then.
    """

    def visit(blocks: Blocks, block: str) -> Noted:
        blocks.open(block)
        modules = blocks.linears(block)
        sampled = [m for m in modules if structure.linears[m].expert is None] if SAMPLE in parts else ()
        stats = blocks.measure(block, modules if HESSIAN in parts else (), sampled) if modules else {}
        folds = [] if block == OUTSIDE else [asdict(fold) for fold in blocks.folds(block)]
        attentions = [name for name in caches if block and name.startswith(f"{block}.")]
        cached = {} if block == OUTSIDE else blocks.close(block, attentions)
        leaders: dict[int, str] = {}
        named = {m: None if s is None else leaders.setdefault(id(s), m) for m, s in stats.items()}
        distinct = {leader: stat for leader in leaders.values() if (stat := stats[leader]) is not None}
        shapes = _save(tensors_of(job, STAGE, block), distinct, cached)
        tokens = {leader: stat.tokens for leader, stat in distinct.items()}
        return {"modules": named, "tokens": tokens, "folds": folds, "shapes": shapes}

    squares = fisher.Squares([])
    if FISHER in parts:
        squares = fisher.measure(job, source, structure.linears, samples.tokens, device, progress)
    caches = kv_scales.scaled(structure.model)
    start = partial(Blocks, source, structure.linears, samples.tokens, job.scratch / "activations", device)
    blocks = walk(job, STAGE, start, visit, progress)
    about = {
        "version": VERSION,
        "model": identity(source),
        "calibration": samples.to_dict(),
        "parts": sorted(parts),
        "stream": stream.follows(source, structure, samples.tokens, job.scratch / "stream", device),
        "blocks": blocks,
    }
    _join(path, [tensors_of(job, STAGE, block) for block in blocks], squares.files, about)
    shutil.rmtree(job.scratch)


def _save(file: Path, stats: Mapping[str, Stats], cached: Mapping[str, Largest]) -> dict[str, list[int]]:
    """Writes what was measured of one block. Returns names and shapes."""
    parts = {f"{leader}|{part}": getattr(stat, part) for leader, stat in stats.items() for part in MEANS}
    parts |= {f"{path}|{CACHED}": most.found for path, most in cached.items() if most.found is not None}
    parts |= {f"{leader}|{SAMPLE}": stat.sample for leader, stat in stats.items() if stat.sample is not None}
    hessians = {f"{leader}|{HESSIAN}": stat.hessian for leader, stat in stats.items() if stat.hessian is not None}
    shapes = {name: list(part.shape) for name, part in parts.items()}
    shapes |= {name: [len(whole) * (len(whole) + 1) // 2] for name, whole in hessians.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(file, _announced(shapes)) as writer:
        for name, part in parts.items():
            writer.add(name, part.cpu())
        for name, whole in hessians.items():
            writer.add(name, pack(whole.cpu()))
    return shapes


def _join(path: Path, files: list[Path], squares: list[Path], about: dict[str, Any]) -> None:
    """squares: files of Fisher information, by module."""
    shapes = {name: shape for noted in about["blocks"].values() for name, shape in noted["shapes"].items()}
    for file in squares:
        with safe_open(file, "pt") as tensors:
            shapes |= {f"{name}|{FISHER}": tensors.get_slice(name).get_shape() for name in tensors.keys()}
    whole = path.with_name(f"{path.name}.partial")
    with ShardWriter(whole, _announced(shapes), {ABOUT: json.dumps(about)}) as writer:
        for file in (*files, *squares):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    writer.add(f"{name}|{FISHER}" if file in squares else name, tensors.get_tensor(name))
    if path.exists():
        raise FileExistsError(f"stats {path}: another run has written it meanwhile; run this again to use it")
    os.replace(whole, path)
    sync_directory(path.parent)


def _announced(shapes: Mapping[str, list[int]]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, torch.float32, tuple(shape)) for name, shape in shapes.items()]


def _read_about(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(ABOUT)
        about = None if text is None else json.loads(text)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"stats {path}: is no whole file of statistics ({error}); {ANOTHER}") from None
    if not isinstance(about, dict):
        raise ValueError(f"stats {path}: is no file of statistics; {ANOTHER}")
    if about["version"] != VERSION:
        raise ValueError(
            f"stats {path}: is of version {about['version']}, and this compress reads {VERSION}; {ANOTHER}"
        )
    return about


def pack(matrix: Tensor) -> Tensor:
    """matrix: (n, n), symmetric. Returns the rows of its upper triangle, (n * (n + 1) / 2,)."""
    return torch.cat([row[i:] for i, row in enumerate(matrix)])


def unpack(packed: Tensor) -> Tensor:
    """The (n, n) matrix that `pack` was given."""
    n = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    matrix, start = packed.new_empty(n, n), 0
    for i in range(n):
        matrix[i, i:] = matrix[i:, i] = packed[start : start + n - i]
        start += n - i
    return matrix
