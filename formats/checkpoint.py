"""Reading safetensors checkpoints: headers first, one tensor at a time, never a pickle.

The files are mapped, so that a tensor costs no private memory until it is changed.
"""

from __future__ import annotations

import json
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `file`, and the bytes `start` to `end` of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


class Checkpoint:
    """The tensors of a directory of safetensors files.

    unlisted: also of files that the usual names and an index leave out. Raises ValueError, naming file and remedy, for
    a directory without a checkpoint, with pickles only, with a missing shard, or with a file whose header does not
    describe its bytes.
    """

    def __init__(self, path: Path, unlisted: bool = False) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        files = dict.fromkeys(weight_files(path)) | dict.fromkeys(
            sorted(path.glob("*.safetensors")) if unlisted else ()
        )
        for file in files:
            for name, entry in _read_header(file).items():
                if name in self.entries:
                    raise ValueError(f"{file}: tensor {name!r} is also in {self.entries[name].file.name}")
                self.entries[name] = entry
        self._check_index()
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or its slice `index` along the first dimension, mapped from the file."""
        entry = self.entries[name]
        shape = entry.shape if index is None else entry.shape[1:]
        start, count = entry.start, entry.bytes
        if index is not None:
            count //= entry.shape[0]
            start += index * count
        if count == 0:
            return torch.empty(shape, dtype=entry.dtype)
        data = torch.frombuffer(self._map(entry.file), dtype=torch.uint8, offset=start, count=count)
        if start % entry.dtype.itemsize:  # safetensors does not promise alignment
            data = data.clone()
        return data.view(entry.dtype).view(shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of the tensor as they are stored."""
        entry = self.entries[name]
        return memoryview(self._map(entry.file))[entry.start : entry.end]

    def __deepcopy__(self, memo: dict[int, object]) -> Checkpoint:
        return self  # what is mapped is never written to; a copied model may share it

    def release(self, name: str) -> None:
        """Drops the pages of `name` from this process; a later read maps them again."""
        entry = self.entries[name]
        page = mmap.ALLOCATIONGRANULARITY
        start = -(-entry.start // page) * page
        length = entry.end // page * page - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map(entry.file).madvise(mmap.MADV_DONTNEED, start, length)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which map the files themselves."""
        return {**self.__dict__, "_maps": {}}

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as f:
                # Copy-on-write: torch wants a writable buffer, and the file must stay as it is.
                self._maps[file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _check_index(self) -> None:
        index = self.path / INDEX
        if not index.exists():
            return
        absent = [name for name in _weight_map(index) if name not in self.entries]
        if absent:
            raise ValueError(f"{index}: names tensor {absent[0]!r}, which no shard holds; the checkpoint is incomplete")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, in the order of their names."""
    index = path / INDEX
    if index.exists():
        files = [path / file for file in sorted(set(_weight_map(index).values()))]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{path}: shard {file.name} is missing, {INDEX} names it; download it again")
        return files
    files = [path / SINGLE] if (path / SINGLE).exists() else sorted(path.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{path}: {pickles[0]} is a pickle, which can run code when it is read; convert it to safetensors first: "
            "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(DIR)"
        )
    raise ValueError(f"{path}: no *.safetensors file, so this is not a checkpoint")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error}); download it again") from None
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise ValueError(f"{index}: weight_map must give a file of this directory for every tensor")
    return weight_map


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value and value not in ("", "..")


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, "pt"):  # checks that the header describes exactly the bytes that follow
            pass
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); download it again") from None
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if info["dtype"] not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} has dtype {info['dtype']}, which is not supported")
        start, end = (8 + length + offset for offset in info["data_offsets"])
        entries[name] = Entry(DTYPES[info["dtype"]], tuple(info["shape"]), file, start, end)
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[0])))
