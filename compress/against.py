"""`verify`: whether a directory is as it was written, and what it gives back beside the model it was made of."""

from __future__ import annotations

import hashlib
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.change import DTYPES, unchanged
from compress.formats import manifest
from compress.pipeline import ADDED, changes_read, relative_error, same_bits
from compress.scheme import Spec
from compress.source import Source
from compress.stream import restored


@dataclass(frozen=True)
class Comparison:
    """One tensor of the original: equal bit for bit, or at a relative error; `problem` says what must not be."""

    name: str
    action: str  # coded, copied, folded, tied
    equal: bool
    relative_error: float
    problem: str | None = None


@dataclass(frozen=True)
class Verification:
    """problems: what is wrong, a line each. tensors: of every tensor of the original, where it was compared."""

    problems: list[str]
    tensors: list[Comparison]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(out: Path, model: Path | None = None) -> Verification:
    """Checks every byte of `out` against its manifest, and, if that is right, every tensor against those of `model`.

    Raises ValueError where `out` has no manifest.
    """
    problems, lines = manifest.verify(out), []
    if model is not None and not problems:
        lines = list(compare(out, model))
        problems = [f"{line.name}: {line.problem}" for line in lines if line.problem]
    return Verification(problems, lines)


def compare(out: Path, model: Path) -> Iterator[Comparison]:
    """A line for every tensor of `model`. Raises ValueError where `out` has no manifest."""
    document = manifest.unseal(out / manifest.NAME)
    ledger = document["ledger"]
    coded = Source(out, foreign=False)
    foreign = not coded.is_coded or coded.is_mixed  # without loss, all is as it was stored
    original, packed = Source(model, foreign), restored(Source(out, foreign), document)
    for name in original.specs:
        yield _compare(name, ledger.get(name), original, packed)
        original.release(name)
        if name in packed.specs:
            packed.release(name)
    added = {name for name, entry in ledger.items() if entry["action"] == ADDED}
    for name in sorted(ledger.keys() - original.specs.keys() - added):
        yield Comparison(name, ledger[name]["action"], False, 1.0, "the original does not have it")


def _compare(name: str, entry: dict[str, Any] | None, original: Source, packed: Source) -> Comparison:
    if entry is None:
        return Comparison(name, "absent", False, 1.0, "not accounted for in the manifest")
    action = str(entry["action"])
    kept = str(entry["to"]) if action == "tied" else name
    if kept not in packed.specs:
        return Comparison(name, action, False, 1.0, f"{kept} is not in the compressed directory")
    if packed.specs[kept] != original.specs[name]:
        return Comparison(name, action, False, 1.0, _sizes(original.specs[name], packed.specs[kept]))
    a, b = original.read(name), _unchanged(packed.read(kept), entry)
    equal = same_bits(a, b)
    error = 0.0 if equal or not a.is_floating_point() else relative_error(_matrix(a), _matrix(b))
    schemes = [p.scheme for p in packed.packed.values() if p.source == name]
    exact = action in ("copied", "tied") or (action == "coded" and all(scheme.lossless for scheme in schemes))
    return Comparison(name, action, equal, error, _problem(entry, equal or not exact, original))


def _sizes(there: Spec, here: Spec) -> str:
    shapes = ("x".join(map(str, spec.shape)) + f" {spec.dtype}".replace("torch.", "") for spec in (there, here))
    return "{} there, and {} here: not the model that this was made of".format(*shapes)


def _unchanged(weight: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """Without the changes of channels that calibration folded into it."""
    for changes in entry.get("changes", {}).values():
        stored = {name: _vector(name, text) for name, text in changes.items()}
        weight = unchanged(weight, *changes_read(stored)).to(weight.dtype)
    return weight


def unchanged_weight(weight: torch.Tensor, entry: dict[str, Any], module: str) -> torch.Tensor:
    """weight: of one module, (out_features, in_features); entry: of its source in the ledger."""
    changes = entry.get("changes", {}).get(module, {})
    return _unchanged(weight, {"changes": {module: changes}})


def _vector(name: str, text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(b64decode(text)), dtype=DTYPES[name.rpartition(".")[2]])


def _problem(entry: dict[str, object], as_promised: bool, original: Source) -> str | None:
    read = entry.get("read", {})
    assert isinstance(read, dict)
    for stored, known in read.items():
        if stored not in original.stored or hashlib.sha256(original.checkpoint.raw(stored)).hexdigest() != known:
            return "the original is not the one that was compressed"
    if not as_promised:
        return "should be as in the original and is not"
    return None


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
