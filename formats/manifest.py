"""compress.json: what a directory was made of, and a SHA-256 for everything in it. Reads and checks without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

NAME = "compress.json"
REPORT = "report.json"  # holds times, so it seals itself and the rest of the directory stays reproducible
CHUNK = 1 << 24
WEIGHTS = (".safetensors", ".safetensors.index.json")  # a loader would take tensors from these


def seal(document: dict[str, Any]) -> str:
    """The document as JSON text with a last key `sha256` over all that comes before it."""
    body = json.dumps(document, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**document, "sha256": digest}, indent=1, ensure_ascii=False) + "\n"


def unseal(path: Path) -> dict[str, Any]:
    """Reads a sealed document. Raises ValueError where a byte of it has changed."""
    try:
        text = path.read_bytes().decode()
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not as it was written ({error})") from None
    if not isinstance(document, dict) or document.pop("sha256", None) is None:
        raise ValueError(f"{path.name}: not as it was written (it has no SHA-256 of its own)")
    if seal(document) != text:
        raise ValueError(f"{path.name}: its bytes do not match its own SHA-256")
    return dict(document)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe_files(directory: Path, shards: dict[str, str]) -> dict[str, dict[str, Any]]:
    """name -> size and hash of every file but the two sealed ones. shards: file name -> SHA-256 of its header."""
    files: dict[str, dict[str, Any]] = {}
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        if name in (NAME, REPORT, NAME + ".tmp"):  # the last is what an interruption left; it is about to be replaced
            continue
        digest = {"header_sha256": shards[name]} if name in shards else {"sha256": file_sha256(path)}
        files[name] = {"bytes": path.stat().st_size, **digest}
    return files


def verify(directory: Path) -> list[str]:
    """What is wrong with the directory, one line each; empty when every byte is as it was written."""
    if not directory.is_dir():
        raise ValueError(f"{directory} does not exist, or is no directory")
    try:
        manifest = unseal(directory / NAME)
    except FileNotFoundError:
        raise ValueError(f"{directory}: no {NAME} there, so there is nothing to check it against") from None
    except ValueError as error:
        return [str(error)]
    problems = []
    if (directory / REPORT).exists():
        try:
            unseal(directory / REPORT)
        except ValueError as error:
            problems.append(str(error))
    else:
        problems.append(f"{REPORT}: missing")
    for name, known in manifest["files"].items():
        problems += _check_file(directory / name, name, known, manifest["tensors"])
    extra = [p.relative_to(directory).as_posix() for p in _files(directory) if p.name.endswith(WEIGHTS)]
    return problems + [f"{name}: not part of what was written" for name in extra if name not in manifest["files"]]


def _check_file(path: Path, name: str, known: dict[str, Any], tensors: dict[str, Any]) -> Iterator[str]:
    if not path.is_file():
        yield f"{name}: missing"
        return
    size = path.stat().st_size
    if size != known["bytes"]:
        yield f"{name}: has {size} bytes, {known['bytes']} were written"
    if "header_sha256" in known:
        yield from _check_shard(path, name, known, {n: t for n, t in tensors.items() if t["file"] == name})
    elif size == known["bytes"] and file_sha256(path) != known["sha256"]:
        yield f"{name}: its bytes have changed"


def _check_shard(path: Path, name: str, known: dict[str, Any], tensors: dict[str, Any]) -> Iterator[str]:
    with path.open("rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        header = f.read(min(length, known["bytes"]))
        if hashlib.sha256(prefix + header).hexdigest() != known["header_sha256"]:
            yield f"{name}: its header has changed"
            yield from _compare_names(name, header, tensors.keys())
            return
        for tensor, entry in json.loads(header).items():
            if tensor == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            f.seek(8 + length + start)
            digest = hashlib.sha256()
            for _ in range(start, end, CHUNK):
                digest.update(f.read(min(CHUNK, 8 + length + end - f.tell())))
            if digest.hexdigest() != tensors[tensor]["sha256"]:
                yield f"{name}: tensor {tensor} has changed"


def _compare_names(name: str, header: bytes, tensors: Set[str]) -> Iterator[str]:
    """What a rewritten shard lacks and has too many, as far as its header can be read."""
    try:
        found = set(json.loads(header)) - {"__metadata__"}
    except (ValueError, TypeError, RecursionError):
        return
    yield from (f"{name}: tensor {absent} is missing" for absent in sorted(tensors - found))
    yield from (f"{name}: tensor {extra} is not part of what was written" for extra in sorted(found - tensors))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
