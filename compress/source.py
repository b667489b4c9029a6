"""A checkpoint as plain named weights, whatever it is stored as: what `quantize` reads and `export` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import planning
from compress.formats.checkpoint import Checkpoint
from compress.scheme import Spec, Tensors


class Source:
    """The tensors of a checkpoint directory under the names they have uncompressed.

    Packed weights (ours, compressed-tensors weight-only, transformers' fp8) are decoded when they are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.checkpoint = Checkpoint(path)
        self.stored = {name: Spec(entry.dtype, entry.shape) for name, entry in self.checkpoint.entries.items()}
        self.packed: dict[str, planning.Packed] = {}
        self.locals: dict[str, dict[str, str]] = {}
        quantization = self.config.get("quantization_config")
        if quantization:
            if not isinstance(quantization, dict):
                raise ValueError(f"{path}/config.json: quantization_config is not a JSON object")
            try:
                self.packed = planning.from_config(quantization, self.stored)
                self.locals = planning.local_tensors(self.stored, self.packed)
            except (AttributeError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{path}/config.json: quantization_config is not whole ({error!r})") from None
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        self.backing: dict[str, list[str]] = {}  # name -> the stored tensors it is made of
        self.specs = self._specs()
        self._check_float8()

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor, or slice `index` of it along the first dimension."""
        modules = self._modules.get(name)
        if modules is None:
            return self.checkpoint.read(name, index)
        if index is not None:
            return self.decode(modules[index])
        if self.packed[modules[0]].index is None:
            return self.decode(modules[0])
        whole = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        for i, module in enumerate(modules):
            whole[i] = self.decode(module)
        return whole

    def identity(self) -> list[list[object]]:
        """Name, size and time of every file: what tells that a source is still the same."""
        files = (path for path in sorted(self.path.iterdir()) if path.is_file())
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]

    def is_packed(self, name: str) -> bool:
        """Whether reading `name` decodes it into new memory."""
        return name in self._modules

    def tensors(self, module: str) -> Tensors:
        """The stored tensors of a packed module by local name."""
        return {local: self.checkpoint.read(name) for local, name in self.locals[module].items()}

    def decode(self, module: str) -> Tensor:
        """The weight of a packed module as it lies in the uncompressed checkpoint."""
        packed = self.packed[module]
        weight = packed.scheme.decode(self.tensors(module))
        weight = weight.to(self._dtype(weight.dtype))
        return weight.T.contiguous() if packed.transposed else weight

    def release(self, name: str) -> None:
        """Drops the pages that reading `name` mapped."""
        for stored in self.backing[name]:
            self.checkpoint.release(stored)

    def _specs(self) -> dict[str, Spec]:
        owner = {name: module for module, names in self.locals.items() for name in names.values()}
        sources = {packed.source for packed in self.packed.values()}
        self._modules: dict[str, list[str]] = {}
        for module, packed in self.packed.items():
            self._modules.setdefault(packed.source, []).append(module)
        specs: dict[str, Spec] = {}
        for name, spec in self.stored.items():
            if name not in owner:
                if not (0 in spec.shape and name in sources):  # the tripwire of our own layout
                    specs[name], self.backing[name] = spec, [name]
                continue
            source = self.packed[owner[name]].source
            specs.setdefault(source, self._packed_spec(source))
            self.backing.setdefault(source, []).append(name)
        return specs

    def _packed_spec(self, source: str) -> Spec:
        modules = self._modules[source]
        packed = self.packed[modules[0]]
        original = packed.scheme.original({local: self.stored[n] for local, n in self.locals[modules[0]].items()})
        shape = original.shape[::-1] if packed.transposed else original.shape
        return Spec(self._dtype(original.dtype), shape if packed.index is None else (len(modules), *shape))

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32 scales do not make a float32 model: the config says what the weights were."""
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        named = half.get(str(self.config.get("dtype") or self.config.get("torch_dtype")))
        return named if dtype == torch.float32 and named else dtype

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
