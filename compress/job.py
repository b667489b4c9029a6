"""Job: one output directory in the making, so that an interruption costs nothing and nothing half-written shows.

Everything is written to OUT.partial/checkpoint, with a journal beside it; the finished directory is renamed to OUT. The
same command finds the journal and goes on; another command starts afresh. An output that is to be replaced lies at OUT,
or for the moment between two renames in OUT.partial/replaced, until the new one has its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from compress.formats.files import sync_directory, write_text


class Job:
    """Holds OUT.partial while open. recipe: everything that decides the result, as JSON."""

    def __init__(self, out: Path, recipe: dict[str, Any], overwrite: bool = False) -> None:
        self.out, self.overwrite = out.resolve(), overwrite
        self.partial = partial_of(out)
        self.checkpoint, self.journal = self.partial / "checkpoint", self.partial / "journal"
        self.replaced = self.partial / "replaced"
        self.scratch = self.partial / "scratch"  # what finished steps left for later ones
        self.fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self.resumed = False

    def __enter__(self) -> Job:
        if self.partial.is_symlink() or (self.partial.exists() and not self._is_ours()):
            raise ValueError(f"{self.partial} is in the way and not ours; move it or choose another output")
        if not self.partial.exists():
            check_replace(self.out, self.overwrite)
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
            self._lock = (self.journal / "lock").open("w")
        except OSError as error:
            raise OSError(f"output {self.out} cannot be written: {error.strerror}; choose another place") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another run is writing {self.out}; wait for it or choose another output") from None
        try:
            self._start()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Before the first step is finished there is nothing to go on with.
        if kind is not None and not any(note.stem != "job" for note in self.journal.glob("*.json")):
            self.discard()
        self._lock.close()

    @property
    def finished(self) -> bool:
        """The directory has its name already; only the journal was left behind."""
        return self.resumed and self._named()

    def note(self, name: str, value: dict[str, Any]) -> None:
        """Remembers a finished step."""
        write_text(self.journal / f"{name}.json", json.dumps(value))

    def recall(self, name: str) -> dict[str, Any] | None:
        """What was noted under `name`, if that step was finished."""
        try:
            noted: dict[str, Any] = json.loads((self.journal / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):  # one that cannot be read counts as not finished
            return None
        return noted

    def check_room(self, planned: int) -> None:
        """Raises OSError where the disk cannot hold `planned` bytes of tensors, what is there already counted in."""
        present = sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors"))
        free = shutil.disk_usage(self.checkpoint).free
        if planned - present > free:
            missing = f"{planned - present:,} more bytes are needed and {free:,} are free"
            raise OSError(f"{self.out.parent}: {missing}; make room and run it again")

    def finish(self) -> None:
        """Gives the finished directory its name; what had that name goes only then."""
        self.note("done", {})
        if self.checkpoint.exists():
            _sync(self.checkpoint)
            if self.out.is_dir() and any(self.out.iterdir()):
                check_replace(self.out, self.overwrite)
                shutil.rmtree(self.replaced, ignore_errors=True)
                os.rename(self.out, self.replaced)
            os.rename(self.checkpoint, self.out)
            sync_directory(self.out.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)
        self.discard()

    def discard(self) -> None:
        """Leaves no trace in OUT.partial: the run is over, or cannot succeed."""
        self._clear()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _start(self) -> None:
        """Goes on with what the same command left, or clears away what another one left."""
        same = self.recall("job") == {"fingerprint": self.fingerprint}
        self.resumed = same and (self.checkpoint.is_dir() or self._named())
        if not self.resumed:
            self._clear()
        try:
            if not self._named():
                check_replace(self.out, self.overwrite)  # _clear may have given an output back
        except ValueError:
            if not self.resumed:
                self.discard()
            raise
        if not self.resumed:
            self.checkpoint.mkdir()
            self.note("job", {"fingerprint": self.fingerprint})

    def _clear(self) -> None:
        """Empties OUT.partial but for the lock. The first step makes what is left unusable, were it the last one."""
        (self.journal / "job.json").unlink(missing_ok=True)
        # Between the two renames only: once the checkpoint has its name, what it replaced may be half removed.
        if self.replaced.exists() and self.checkpoint.exists() and not self.out.exists():
            os.rename(self.replaced, self.out)
        shutil.rmtree(self.replaced, ignore_errors=True)
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for note in self.journal.glob("*.json*"):
            note.unlink()

    def _named(self) -> bool:
        return (self.journal / "done.json").exists() and not self.checkpoint.exists() and self.out.exists()

    def _is_ours(self) -> bool:
        """An empty directory is what is left of a journal when its removal is interrupted."""
        return self.journal.is_dir() or (self.partial.is_dir() and not any(self.partial.iterdir()))


def partial_of(out: Path) -> Path:
    """Where `out` is written until it is complete: on the same disk, so that a rename gives it its name."""
    resolved = out.resolve()
    if not resolved.name:
        raise ValueError(f"output {out} is the root directory; choose a directory in it")
    return resolved.with_name(resolved.name + ".partial")


def check_apart(out: Path, model: Path) -> None:
    """Raises ValueError where writing `out` could touch `model`."""
    source = model.resolve()
    for place in (out.resolve(), partial_of(out)):
        if place == source or source in place.parents or place in source.parents:
            raise ValueError(f"output {place} and model {model} lie inside one another; choose another output")


def check_replace(out: Path, overwrite: bool) -> None:
    """Raises ValueError where something of the user's already has the name `out`."""
    if out.is_mount():
        raise ValueError(f"output {out} is a mount point, which cannot be renamed to; choose a directory in it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"output {out} exists and is not a directory; choose another")
    if not overwrite:
        raise ValueError(f"output {out} exists; choose another, or pass --overwrite to replace it when the new is done")
    if not (out / "config.json").exists():
        raise ValueError(f"output {out} exists and is no checkpoint, so --overwrite leaves it alone; choose another")


def _sync(directory: Path) -> None:
    """Puts every file on the disk itself, so that a power cut after the renames finds them whole."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(directory)
