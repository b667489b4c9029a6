"""Checkpoints that the DFloat11 project publishes (arXiv:2504.11651; its package, 0.2 to 0.5): read, never written.

A unit is a module with one stream: a linear or embedding with its own weight, or a block with those of the children
that config.json lists. `encoded_exponent` has the exponents in Huffman codes, `sign_mantissa` the other eight bits of
every value; a weight is decoded from the blocks of the stream that it lies in, on all cores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.dfloat11 import GAP_BITS, POINTERS, THREAD_BYTES, decode
from compress.scheme import Spec, Tensors
from compress.store import Store
from compress.structure import Structure

KEY = "dfloat11_config"
LOCALS = ("encoded_exponent", "sign_mantissa", "luts", "output_positions", "gaps")
_SPLITS = "split_positions"  # where the weights part: all but the first start, and the shapes say it too


@dataclass(frozen=True)
class Unit:
    """shapes: the weights of its stream by name, in their order. threads: how many of them are a block."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    threads: int

    @property
    def bounds(self) -> list[int]:
        """Where each weight starts in the stream, and where the last one ends."""
        return [0, *np.cumsum([math.prod(shape) for shape in self.shapes.values()]).tolist()]

    def check(self, specs: Mapping[str, Spec]) -> None:
        """Raises ValueError, saying what is wrong, where these headers do not belong together. specs: by local name."""
        missing = [local for local in LOCALS if local not in specs]
        if missing:
            raise ValueError(f"{self.name}: no {missing[0]} is stored; download the checkpoint again")
        codes, values, entries, positions, gaps = (math.prod(specs[local].shape) for local in LOCALS)
        blocks = positions // 4 - 1
        # One that holds the end of the last code and nothing else is counted where bits are filled up, else not.
        needed = -(-codes // (THREAD_BYTES * self.threads)) - blocks
        if any(specs[local].dtype != torch.uint8 for local in LOCALS):
            problem = "not all of its tensors are uint8"
        elif values != self.bounds[-1]:
            problem = f"it has {values} values, and by config.json its weights have {self.bounds[-1]}"
        elif specs["luts"].shape[1:] != (256,) or not 512 <= entries <= 256 * (256 - POINTERS + 2):
            problem = f"luts has shape {specs['luts'].shape}"
        elif positions % 4 or blocks < 0 or needed not in (0, 1) or 8 * gaps < GAP_BITS * self.threads * blocks:
            problem = f"{positions} bytes of output_positions and {gaps} of gaps do not fit {codes} bytes of codes"
        else:
            return
        raise ValueError(f"{self.name}: {problem}; download the checkpoint again")

    def decode(self, tensors: Tensors, weight: str) -> Tensor:
        """tensors: the unit's by local name, headers checked. Raises ValueError where they are damaged."""
        index = list(self.shapes).index(weight)
        start, stop = self.bounds[index : index + 2]
        try:
            if _SPLITS in tensors and tensors[_SPLITS].tolist() != self.bounds[1:-1]:
                raise ValueError(f"split_positions are not {self.bounds[1:-1]}")
            return decode(tensors, self.threads, start, stop).view(self.shapes[weight])
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; download the checkpoint again") from None


class Units:
    """The tensors of another store with the weights of its units in place of what these store. See `store.Store`."""

    def __init__(self, below: Store, config: Any, structure: Structure) -> None:
        """config: `dfloat11_config` of config.json. Raises ValueError for a checkpoint that is not whole."""
        self._below = below
        self._names: dict[str, dict[str, str]] = {}  # unit -> {local name: name below}
        for name in below.specs:
            module, _, local = name.rpartition(".")
            if local in (*LOCALS, _SPLITS):
                self._names.setdefault(module, {})[local] = name
        units = read_units(config, self._names, structure)
        owned = {name for names in self._names.values() for name in names.values()}
        self.specs = {name: spec for name, spec in below.specs.items() if name not in owned}
        self.backing = {name: below.backing[name] for name in self.specs}
        self._units: dict[str, Unit] = {}
        for unit in units:
            names = self._names[unit.name]
            unit.check({local: below.specs[name] for local, name in names.items()})
            for weight, shape in unit.shapes.items():
                if weight in self.specs:
                    raise ValueError(f"{weight} is stored twice, in {unit.name} too; keep one of the files")
                self.specs[weight], self._units[weight] = Spec(torch.bfloat16, shape), unit
                self.backing[weight] = [stored for name in names.values() for stored in below.backing[name]]
        _check_whole(self.specs, structure)

    def read(self, name: str, index: int | None = None) -> Tensor:
        if name not in self._units:
            return self._below.read(name, index)
        unit = self._units[name]
        tensors = {local: self._below.read(stored) for local, stored in self._names[unit.name].items()}
        whole = unit.decode(tensors, name)
        return whole if index is None else whole[index]

    def release(self, name: str) -> None:
        below = self._names[self._units[name].name].values() if name in self._units else (name,)
        for stored in below:
            self._below.release(stored)

    def is_packed(self, name: str) -> bool:
        return name in self._units or self._below.is_packed(name)


def read_units(config: Any, names: Iterable[str], structure: Structure) -> list[Unit]:
    """The units of these names. Raises ValueError where config.json does not say what they are."""
    try:
        (threads,), size = config["threads_per_block"], config["bytes_per_thread"]
        patterns = {re.compile(key): [f".{child}" for child in value] for key, value in config["pattern_dict"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"config.json: {KEY} is not whole ({error!r})") from None
    if size != THREAD_BYTES or not isinstance(threads, int) or threads % 8 or not 0 < threads <= 1024:
        raise ValueError(f"config.json: {KEY} has {threads} threads of {size} bytes, which no known version wrote")
    units = []
    for name in names:
        # Their loader takes the last pattern that matches, their writer every one; only one is sure.
        children = [value for pattern, value in patterns.items() if pattern.fullmatch(name)]
        if len(children) != 1:
            raise ValueError(f"{name}: {len(children)} patterns of {KEY} in config.json match it, not one")
        weights = [f"{name}{child}.weight" for child in children[0] or [""]]
        units.append(Unit(name, {weight: _shape(weight, structure) for weight in weights}, threads))
    return units


def _shape(weight: str, structure: Structure) -> tuple[int, ...]:
    target, pattern = structure.target(weight)
    if pattern is not None or target not in structure.parameters:
        raise ValueError(
            f"{weight}: its shape is not stored, and the model of config.json has no parameter of its own for it"
        )
    return tuple(structure.parameters[target].shape)


def _check_whole(names: Iterable[str], structure: Structure) -> None:
    """Nothing but the model tells that the file of a unit is missing."""
    found = {structure.target(name)[0] for name in names}
    tied = structure.tied()
    found |= {a for a, b in tied.items() if b in found} | {b for a, b in tied.items() if a in found}
    for name, _ in structure.model.named_parameters():
        if name not in found:
            raise ValueError(f"no file holds {name}; the checkpoint is incomplete, download it again")
