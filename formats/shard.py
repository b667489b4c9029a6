"""Writing safetensors: tensors are appended one at a time to a file that gets its name when it is complete."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from compress.formats.checkpoint import DTYPES, INDEX
from compress.formats.files import sync_directory, write_text

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


Announced = tuple[str, torch.dtype, tuple[int, ...]]  # a tensor's name, dtype and greatest shape


def file_bytes(names: Iterable[Announced]) -> int:
    """What a file of these tensors takes, if they are as large as they are announced."""
    names = list(names)
    data = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in names)
    return 8 + _header_bytes(names) + data


def _header_bytes(names: Iterable[Announced], more: int = 0) -> int:
    """The room for a header, so that the data starts on a cache line. more: of what is said of the file."""
    room = 64 + more + sum(len(json.dumps(_header_item(*announced, 1 << 50, 1 << 50))) + 2 for announced in names)
    return room + -(8 + room) % 64


class ShardWriter:
    """Appends tensors to one safetensors file. The file gets its name, complete and synced, when the block ends well.

    names: the tensors that will come, with dtype and greatest shape; they fix how much room the header gets, so that
    the tensors can be written before the header is known. metadata: for the header, beside the format.
    """

    def __init__(
        self,
        path: Path,
        names: Iterable[Announced],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.records: dict[str, dict[str, object]] = {}
        about = {"format": "pt", **(metadata or {})}
        self._header_bytes = _header_bytes(names, len(json.dumps(about)) - len(json.dumps({"format": "pt"})))
        self._header: dict[str, object] = {"__metadata__": about}
        self._position = 0
        self.header_sha256 = ""

    def __enter__(self) -> ShardWriter:
        self._file = self.temporary.open("wb")
        self._file.seek(8 + self._header_bytes)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes the tensor and records its dtype, shape, size and SHA-256."""
        data = tensor_bytes(tensor)
        self._file.write(data)
        start, self._position = self._position, self._position + data.nbytes
        self._header.update(_header_item(name, tensor.dtype, tuple(tensor.shape), start, self._position))
        self.records[name] = {
            "file": self.path.name,
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "bytes": data.nbytes,
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:  # closing writes what is buffered, and on a full disk fails too
                if kind is None:
                    self._finish()
        except OSError:
            self.temporary.unlink(missing_ok=True)
            raise
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        os.replace(self.temporary, self.path)
        sync_directory(self.path.parent)

    def _finish(self) -> None:
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._header_bytes)
        assert len(header) == self._header_bytes, "a shape grew beyond what was announced"
        self._file.seek(0)
        prefix = struct.pack("<Q", len(header)) + header
        self._file.write(prefix)
        self.header_sha256 = hashlib.sha256(prefix).hexdigest()
        self._file.flush()
        os.fsync(self._file.fileno())


def _header_item(name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {name: {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}}


def write_index(directory: Path, files: dict[str, str], total_bytes: int) -> None:
    """files: tensor name -> shard. Writes the index that loaders look for beside more than one shard."""
    write_text(directory / INDEX, json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": files}, indent=2))
