"""`trim`: a smaller copy of a stacked checkpoint, the beginning of its files."""

from __future__ import annotations

import math
import shutil
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress import planning, sizes
from compress.eval.card import CHART, Facts, card, layer_chart
from compress.eval.origin import front_matter
from compress.eval.report import Report
from compress.formats import manifest
from compress.formats.checkpoint import Checkpoint
from compress.formats.files import write_text
from compress.formats.shard import Announced, ShardWriter, file_bytes, write_index
from compress.job import Job, check_apart
from compress.layout import SHARD_BYTES, Block, copied, copy_side_files, shards
from compress.planning import Packed
from compress.prepare import summarize
from compress.run import read_report
from compress.source import read_json
from compress.store import Files


def trim(
    model: Path, out: Path, size: int | str, overwrite: bool = False, shard_bytes: int = SHARD_BYTES, command: str = ""
) -> int:
    """Writes the copy of `model` whose weight files take `size` bytes ("4GiB") at most, and less than a block less.

    Returns their bytes. Raises ValueError for a checkpoint without stacked weights, and for a size below the first
    block of every weight, naming that.
    """
    check_apart(out, model)
    copy = _Copy(model, size, shard_bytes)
    source = manifest.file_sha256(model / manifest.NAME)
    recipe = {"trim": source, "size": copy.room, "shard_bytes": shard_bytes, "command": command}
    with Job(out, recipe, overwrite) as job:
        if not job.finished:
            try:
                copy.write(job, command)
            except ValueError:
                job.discard()  # the input is at fault: nothing of this run can be used again
                raise
        job.finish()
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


class _Copy:
    """What is taken over: every tensor up to the last block that fits."""

    def __init__(self, model: Path, size: int | str, shard_bytes: int) -> None:
        self.model, self.room, self.shard_bytes = model, sizes.parse(size), shard_bytes
        self.checkpoint = Checkpoint(model)
        self.specs = Files(self.checkpoint).specs
        config = read_json(model / "config.json").get("quantization_config") or {}
        self.stacked: dict[str, Packed] = {}
        if config.get("quant_method") == "compress":
            modules = planning.from_config(config, self.specs)
            self.stacked = {m: packed for m, packed in modules.items() if packed.scheme.stacked}
        if not self.stacked or not (model / manifest.NAME).exists():
            raise ValueError(f"{model}: was not written with scheme bitstack, so there are no blocks to leave out")
        locals = planning.local_tensors(self.specs, self.stacked)
        self.block: dict[str, Block] = {
            name: (module, self.stacked[module].scheme.block_of(local))
            for module, names in locals.items()
            for local, name in names.items()
        }
        self.manifest = manifest.unseal(model / manifest.NAME)
        self.names = self._fitting(size)

    def _fitting(self, said: int | str) -> list[str]:
        groups: dict[Block | None, list[str]] = {}
        for name in self.specs:
            block = self.block.get(name)
            groups.setdefault(block if block and block[1] else None, []).append(name)
        blocks = [block for block in groups if block]

        def first(count: int) -> list[str]:
            left_out = set(blocks[count:])
            return [name for block, names in groups.items() if block not in left_out for name in names]

        fitting = bisect_right(range(len(blocks) + 1), self.room, key=lambda count: self._size(first(count))) - 1
        if fitting < 0:
            least = self._size(first(0))
            raise ValueError(
                f"size {said} is too small: with one block of each weight it takes {least} bytes "
                f"({sizes.show(least)}); give that or more"
            )
        return first(fitting)

    def _size(self, names: list[str]) -> int:
        """What the files of these tensors take."""
        return sum(file_bytes(self._announced(group)) for group in self._layout(names).values())

    def _layout(self, names: list[str]) -> dict[str, list[str]]:
        layout = shards([copied(name, self.specs[name]) for name in names], self.shard_bytes)
        return {file: [unit.source for unit in group] for file, group in layout.items()}

    def _announced(self, names: list[str]) -> list[Announced]:
        return [(name, self.specs[name].dtype, self.specs[name].shape) for name in names]

    def write(self, job: Job, command: str) -> None:
        """All files of the copy."""
        layout = self._layout(self.names)
        records: dict[str, dict[str, Any]] = {}
        headers = {}
        for file, group in layout.items():
            done = job.recall(file)
            if done is None:
                done = self._write_shard(job.checkpoint / file, group)
                job.note(file, done)
            records |= done["records"]
            headers[file] = done["header_sha256"]
        if len(layout) > 1:
            places = {name: record["file"] for name, record in records.items()}
            write_index(job.checkpoint, places, sum(record["bytes"] for record in records.values()))
        shutil.copyfile(self.model / "config.json", job.checkpoint / "config.json")
        copy_side_files(self.model, job.checkpoint)
        report = self._report(records)
        write_text(job.checkpoint / manifest.REPORT, manifest.seal(report.to_dict()))
        recipe = self.manifest["recipe"]
        about = front_matter(report.model, self.model, report.scheme)
        facts = Facts(command, about, recipe["versions"], recipe["calibration"], None)
        if chart := layer_chart(report):
            write_text(job.checkpoint / CHART, chart)
        write_text(job.checkpoint / "README.md", card(report, facts))
        document = {**self.manifest, "gates": [], "trimmed": {"size": self.room}, "tensors": records}
        document["files"] = manifest.describe_files(job.checkpoint, headers)
        write_text(job.checkpoint / manifest.NAME, manifest.seal(document))

    def _write_shard(self, path: Path, names: list[str]) -> dict[str, Any]:
        with ShardWriter(path, self._announced(names)) as writer:
            for name in names:
                writer.add(name, self.checkpoint.read(name))
                self.checkpoint.release(name)
                if writer.records[name]["sha256"] != self.manifest["tensors"][name]["sha256"]:
                    raise ValueError(f"{self.model}: {name} is not what {manifest.NAME} says; get a whole copy")
        return {"records": writer.records, "header_sha256": writer.header_sha256}

    def _report(self, records: dict[str, dict[str, Any]]) -> Report:
        """That of the whole, with the sizes and errors of what is left of it, and without its scores."""
        before = read_report(self.model)
        lines = [self._line(line, records) for line in before.tensors]
        changed = {**summarize(lines), "tensors": lines, "evaluation": None}
        whole = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
        note = f"trimmed to files of {sizes.show(self.room)} from {sizes.show(whole)}; not scored again"
        return replace(before, **changed, notes=[*before.notes, note])

    def _line(self, line: dict[str, Any], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
        module = line["name"]
        kept = [name for name, (owner, _) in self.block.items() if owner == module and name in records]
        if not kept:
            return line
        size = sum(records[name]["bytes"] for name in kept)
        error, output_error = self.manifest["stack"][module][max(self.block[name][1] for name in kept)]
        bits = 8 * size / math.prod(line["shape"])
        changed = {"bytes": size, "bits_per_weight": bits, "relative_error": error, "output_error": output_error}
        return {**line, **changed}
