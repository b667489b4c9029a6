"""Going through a model block by block, noting each when it is done: an interrupted run goes on with the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError, safe_open

from compress.hollow import OUTSIDE
from compress.job import Job
from compress.progress import Progress

Noted = dict[str, Any]  # as JSON


class Walked(Protocol):
    """What is gone through: a model that runs (`Blocks`), or what was measured of one (`Recorded`)."""

    @property
    def names(self) -> list[str]: ...
    def next(self) -> str | None: ...
    def linears(self, block: str) -> list[str]: ...
    def leave(self, blocks: list[str]) -> None: ...
    def ready(self) -> bool: ...


B = TypeVar("B", bound=Walked)


def walk(
    job: Job, stage: str, start: Callable[[], B], visit: Callable[[B, str], Noted], progress: Progress | None = None
) -> dict[str, Noted]:
    """What `visit` has to say of each block that the model comes to, and of what is OUTSIDE.

    stage: what is done. start: a walk from the first block. visit: is given a block whose turn it is, and leaves its
    tensors in `tensors_of`.
    """
    blocks = start()
    known = {block: job.recall(_step(stage, block)) for block in (*blocks.names, OUTSIDE)}
    done = {block: noted for block, noted in known.items() if noted is not None}
    blocks.leave([block for block in done if block != OUTSIDE])
    if not (blocks.ready() and all(is_whole(tensors_of(job, stage, block)) for block in done)):
        blocks, done = start(), {}
    while (block := blocks.next()) is not None:
        done[block] = visit(blocks, block)
        job.note(_step(stage, block), done[block])
        blocks.leave([block])
        if progress:
            progress(stage, len(done), len(blocks.names), block)
    if OUTSIDE not in done and blocks.linears(OUTSIDE):
        done[OUTSIDE] = visit(blocks, OUTSIDE)
        job.note(_step(stage, OUTSIDE), done[OUTSIDE])
    return {block: done[block] for block in (*blocks.names, OUTSIDE) if block in done}


def tensors_of(job: Job, stage: str, block: str) -> Path:
    """Where what is made of a block lies until all is done."""
    return job.scratch / f"{stage}-{block or 'outside'}.safetensors"


def _step(stage: str, block: str) -> str:
    return f"{stage}-{block or 'outside'}"


def is_whole(file: Path) -> bool:
    """Whether what was written there can be read."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
