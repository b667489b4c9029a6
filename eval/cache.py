"""What scoring the original gave, kept between runs: a second scheme then costs half.

It lies in COMPRESS_CACHE, else in `compress` of XDG_CACHE_HOME, else in ~/.cache/compress. Names are hashes of all that
decides a result: the bytes of the original's files, the tokens, how it ran and the versions. What was used longest ago
goes when there is more than COMPRESS_CACHE_LIMIT (10GiB). Everything in it can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from compress import __version__, sizes
from compress.eval.predictions import Progress
from compress.formats import files, manifest

LIMIT = "10GiB"
_STALE_SECONDS = 24 * 3600
# What a model's predictions depend on: weights, config and tokenizer.
_DECISIVE = (".safetensors", ".json", ".model", ".txt", ".jinja")


class Cache:
    """A folder of results by key. One that cannot be written is replaced by a folder that is thrown away."""

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def path(self, kind: str, key: dict[str, Any]) -> Path:
        """Where the result of a key lies, if there is one; `kind` begins its name and is its suffix: tasks.json."""
        stem, _, suffix = kind.partition(".")
        return self.folder / f"{stem}-{digest({**key, **_versions()})}.{suffix}"

    @contextlib.contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """Where to write what becomes `path` when the block ends without an exception."""
        handle, name = tempfile.mkstemp(".unfinished", path.stem, self.folder)
        os.close(handle)
        try:
            yield Path(name)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)

    def recall(self, path: Path) -> Any:
        """The JSON that `keep` wrote; None where there is none, or where a byte of it has changed."""
        try:
            value = manifest.unseal(path)["value"]
        except (OSError, ValueError, KeyError):
            return None
        touch(path)
        return value

    def keep(self, path: Path, value: Any) -> None:
        """Writes JSON so that damage to it is found."""
        with self.replacing(path) as unfinished:
            unfinished.write_text(manifest.seal({"value": value}), encoding="utf-8")

    def trim(self) -> None:
        """Removes what was used longest ago, until the limit holds, and what crashed runs left."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process trims too
                status = path.stat()
                if path.suffix == ".unfinished" and time.time() - status.st_mtime > _STALE_SECONDS:
                    path.unlink()
                elif path.suffix != ".unfinished":
                    found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if self.limit_bytes is None or total <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


@contextlib.contextmanager
def opened(enabled: bool = True) -> Iterator[Cache]:
    """The user's cache, trimmed when the block ends; with enabled=False one that is gone then."""
    with contextlib.ExitStack() as stack:
        folder = files.cache_folder() if enabled else None
        if folder is not None and not _is_writable(folder):
            folder = None
        if folder is None:
            yield Cache(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-"))))
            return
        cache = Cache(folder, sizes.parse(os.environ.get("COMPRESS_CACHE_LIMIT", LIMIT)))
        try:
            yield cache
        finally:
            cache.trim()


def touch(path: Path) -> None:
    """Says that a result was used."""
    with contextlib.suppress(OSError):
        os.utime(path)


def digest(key: Any) -> str:
    """32 hex digits of a JSON value; of what is none, as text."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]


def fingerprint(model: Path, cache: Cache, progress: Progress | None = None) -> str:
    """A hash of the content of a model's files. A file is read once for each size and time of change."""
    memo_path = cache.folder / "hashes.json"
    known = cache.recall(memo_path)
    memo: dict[str, list[Any]] = known if isinstance(known, dict) else {}
    files = [path for path in sorted(model.iterdir()) if path.suffix in _DECISIVE and path.is_file()]
    files = [path for path in files if path.name not in (manifest.NAME, manifest.REPORT)]
    hashes, read = {}, False
    for done, path in enumerate(files):
        status = path.stat()
        place, state = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        if memo.get(place, [])[:2] != state:
            memo[place], read = [*state, manifest.file_sha256(path)], True
        hashes[path.name] = memo[place][2]
        if progress and read:
            progress("hashing the original", done + 1, len(files))
    if read:
        cache.keep(memo_path, memo)
    return digest(hashes)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _versions() -> dict[str, str]:
    return {"compress": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
