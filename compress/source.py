"""A checkpoint as plain named weights, whatever it is stored as: what `quantize` reads and `export` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import dfloat11
from compress.formats.checkpoint import Checkpoint
from compress.planning import Packed
from compress.store import Decoded, Files, Store
from compress.structure import Structure, build, read_config


class Source:
    """The tensors of a checkpoint directory under the names they have uncompressed.

    Packed weights (ours, compressed-tensors weight-only, transformers' fp8, DFloat11's) are decoded when they are read.
    With `foreign=False` only what we or DFloat11 packed is: `base` is then the `quantization_config` of the rest.
    """

    def __init__(self, path: Path, foreign: bool = True) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        dfloat11_config = self.config.pop(dfloat11.KEY, None)
        self.checkpoint = Checkpoint(
            path, unlisted=dfloat11_config is not None
        )  # a DFloat11 unit has a file of its own
        self.packed: dict[str, Packed] = {}
        self.base: dict[str, Any] | None = None
        self._store: Store = Files(self.checkpoint)
        self.stored = self._store.specs
        if dfloat11_config is not None:
            self._decode_units(dfloat11_config)
        quantization = self.config.get("quantization_config") or None
        if quantization is not None and not isinstance(quantization, dict):
            raise ValueError(f"{path}/config.json: quantization_config is not a JSON object")
        if quantization and quantization.get("quant_method") == "compress":
            self._decode(quantization)
            quantization = quantization.get("base")
            if quantization is not None and not isinstance(quantization, dict):
                raise ValueError(f"{path}/config.json: quantization_config.base is not a JSON object")
        if quantization and foreign:
            self._decode(quantization)
        else:
            self.base = quantization
        self.specs, self.backing = self._store.specs, self._store.backing
        if foreign:
            self._check_float8()

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or slice `index` of it along the first dimension."""
        return self._store.read(name, index)

    def release(self, name: str) -> None:
        """Drops the pages that reading `name` mapped."""
        self._store.release(name)

    def is_packed(self, name: str) -> bool:
        """Whether reading `name` decodes it into new memory."""
        return self._store.is_packed(name)

    def identity(self) -> list[list[object]]:
        """Name, size and time of every file: what tells that a source is still the same."""
        files = (path for path in sorted(self.path.iterdir()) if path.is_file())
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    def _decode(self, quantization: dict[str, Any]) -> None:
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        try:
            self._store = Decoded(self._store, quantization, dtype)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{self.path}/config.json: quantization_config is not whole ({error!r})") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.packed |= self._store.packed

    def _decode_units(self, config: object) -> None:
        described = read_config(self.path)
        try:
            structure = Structure(build(described), ())  # the shapes of the weights are not stored
            self._store = dfloat11.Units(self._store, config, structure)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _check_float8(self) -> None:
        for name, spec in self.specs.items():
            if spec.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                raise ValueError(f"{self.path}: {name} is float8, but config.json does not say where its scale is")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, as one ValueError where it is missing or is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a checkpoint directory has one") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value
