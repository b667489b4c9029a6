"""Job: one output directory in the making, so that an interruption costs nothing and nothing half-written shows.

Everything is written to OUT.partial/checkpoint, with a journal beside it; the finished directory is renamed to OUT. The
same command finds the journal and goes on; another command starts afresh.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from compress.formats.checkpoint import sync_directory, write_text


class Job:
    """Holds OUT.partial while open. recipe: everything that decides the result, as JSON."""

    def __init__(self, out: Path, recipe: dict[str, Any], overwrite: bool = False) -> None:
        self.out, self.overwrite = out, overwrite
        self.partial = out.with_name(out.name + ".partial")
        self.checkpoint, self.journal = self.partial / "checkpoint", self.partial / "journal"
        self.fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self.resumed = False

    def __enter__(self) -> Job:
        if self.partial.exists() and not self.journal.is_dir():
            raise ValueError(f"{self.partial} is in the way and not ours; move it or choose another output")
        if not (self.journal / "done.json").exists():
            check_replace(self.out, self.overwrite)
        self.journal.mkdir(parents=True, exist_ok=True)
        self._lock = (self.journal / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"another run is writing {self.out}; wait for it or choose another output") from None
        self.resumed = self.recall("job") == {"fingerprint": self.fingerprint}
        if not self.resumed:
            check_replace(self.out, self.overwrite)
            self._clear()
            self.note("job", {"fingerprint": self.fingerprint})
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def finished(self) -> bool:
        """The directory has its name already; only the journal was left behind."""
        return self.resumed and self.recall("done") is not None and not self.checkpoint.exists() and self.out.exists()

    def note(self, name: str, value: dict[str, Any]) -> None:
        """Remembers a finished step."""
        write_text(self.journal / f"{name}.json", json.dumps(value))

    def recall(self, name: str) -> dict[str, Any] | None:
        """What was noted under `name`, if that step was finished."""
        try:
            noted: dict[str, Any] = json.loads((self.journal / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return noted

    def finish(self) -> None:
        """Gives the finished directory its name; what had that name goes only then."""
        self.note("done", {})
        if self.checkpoint.exists():
            old = self.partial / "replaced"
            if self.overwrite and self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.out, old)
            os.rename(self.checkpoint, self.out)
            sync_directory(self.out.parent)
        shutil.rmtree(self.partial)

    def discard(self) -> None:
        """Leaves no trace, for a run that cannot succeed."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.partial)

    def _clear(self) -> None:
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        for note in self.journal.glob("*.json*"):
            note.unlink()
        self.checkpoint.mkdir()


def check_apart(out: Path, model: Path) -> None:
    """Raises ValueError where writing `out` could touch `model`."""
    resolved, source = out.resolve(), model.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise ValueError(f"output {out} and model {model} lie inside one another; choose another output")


def check_replace(out: Path, overwrite: bool) -> None:
    """Raises ValueError where something of the user's already has the name `out`."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"output {out} exists and is not a directory; choose another")
    if not overwrite:
        raise ValueError(f"output {out} exists; choose another, or pass --overwrite to replace it when the new is done")
    if not (out / "config.json").exists():
        raise ValueError(f"output {out} exists and is no checkpoint, so --overwrite leaves it alone; choose another")
