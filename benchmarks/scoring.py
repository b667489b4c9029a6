"""Scoring beside plain lm-eval: wall time, and whether every item is scored alike.

    python benchmarks/scoring.py MODEL --include-path TASKS --tasks A,B --limit 100 [--folder DATA] -o RESULTS.md

The model is compressed, and exported to bf16. Plain lm-eval (`HFLM` with a batch size, as its command line makes it)
runs the export, in its stored dtype and in float32; we run the packed model and the export, the packed one a second
time with what the original gave kept from before. Each run is a process of its own; its time includes the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compress
from compress.exporting import export

SCRIPT, START = os.path.abspath(__file__), os.getcwd()
Items = dict[str, list[float]]  # "task metric" -> what each item contributes


def plain(model: str, arguments: argparse.Namespace, dtype: str) -> Items:
    """lm-eval without us."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, dtype=dtype, device="cpu", batch_size=arguments.batch_size, softmax_dtype="float32")
    manager = TaskManager(include_path=arguments.include_path, include_defaults=False)
    tasks = arguments.tasks.split(",")
    found = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=arguments.limit, log_samples=True)
    items: Items = {}
    for task in tasks:
        for sample in found["samples"][task]:
            for metric in sample["metrics"]:
                items.setdefault(f"{task} {metric}", []).append(float(sample[metric]))
    return items


def ours(model: str, arguments: argparse.Namespace, original: str) -> Items:
    """Tasks alone; with an original, also its tasks, and the differences."""
    from compress.eval import harness

    kept: Items = {}
    beside = harness.beside

    def noting(results: harness.Results, theirs: harness.Results) -> Any:
        kept.update({f"{t} {m}": metric.items or [] for t, ms in results.items() for m, metric in ms.items()})
        return beside(results, theirs)

    harness.beside = noting
    compress.evaluate(
        model,
        original or None,
        tasks=arguments.tasks.split(","),
        include_path=arguments.include_path,
        limit=arguments.limit,
        window=8,
    )
    return kept


def measured(arguments: argparse.Namespace, *what: str) -> tuple[Items, float, float]:
    """One run in a process of its own; its seconds, and those of the CPU, which other work does not lengthen."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, SCRIPT, *arguments.words, "--run", json.dumps(what)]
    done = subprocess.run(command, cwd=START, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    items: Items = json.loads(done.stdout.splitlines()[-1])
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return items, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(arguments: argparse.Namespace, folder: Path) -> list[str]:
    packed, exported = folder / "packed", folder / "plain"
    compress.quantize(arguments.model, packed, arguments.scheme, scoring=None)
    export(packed, exported, "bf16", False)
    runs = [
        ("plain lm-eval, bf16", ("plain", str(exported), "bfloat16")),
        ("plain lm-eval, float32", ("plain", str(exported), "float32")),
        ("compress eval, the export", ("ours", str(exported), "")),
        ("compress eval, packed", ("ours", str(packed), "")),
        ("compress eval, packed, against the original", ("ours", str(packed), arguments.model)),
        ("the same again", ("ours", str(packed), arguments.model)),
    ]
    found = {name: measured(arguments, *what) for name, what in runs}
    reference = found["plain lm-eval, float32"][0]
    names = list(reference)
    lines = [
        f"| run | seconds | CPU seconds | {' | '.join(names)} | items unlike float32 |\n",
        f"|---|--:|--:|{'--:|' * (len(names) + 1)}\n",
    ]
    for name, (items, seconds, cpu) in found.items():
        unlike = sum(a != b for metric in names for a, b in zip(items[metric], reference[metric], strict=True))
        scores = " | ".join(f"{sum(items[metric]) / len(items[metric]):.4f}" for metric in names)
        lines.append(
            f"| {name} | {seconds:.1f} | {cpu:.1f} | {scores} | {unlike} of {sum(map(len, reference.values()))} |\n"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--include-path", required=True)
    parser.add_argument("--folder", default=".", help="where the tasks look for their data")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--scheme", default="fp8")
    parser.add_argument("--batch-size", type=int, default=8, help="of plain lm-eval")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.words = [word for word in sys.argv[1:] if word != "--run" and not word.startswith("[")]
    arguments.model, arguments.include_path = os.path.abspath(arguments.model), os.path.abspath(arguments.include_path)
    output = arguments.output and arguments.output.resolve()
    os.chdir(arguments.folder)
    if arguments.run:
        kind, model, extra = json.loads(arguments.run)
        print(json.dumps({"plain": plain, "ours": ours}[kind](model, arguments, extra)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COMPRESS_CACHE"] = f"{folder}/cache"
        lines = rows(arguments, Path(folder))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm-eval"))
    shown = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    head = (
        f"`python benchmarks/scoring.py {shlex.join(shown)}`, {date.today()}, {os.cpu_count()} cores, {versions}.\n\n"
    )
    print(head + "".join(lines))
    if output:
        with output.open("a") as file:
            file.write(f"{head}{''.join(lines)}\nPython {platform.python_version()}.\n\n")


if __name__ == "__main__":
    main()
