"""`make demo`: one model, every scheme, one table of what each one saves and what it costs.

Without an argument the model is a small one, trained here once (demo_model.py) and kept in .demo/.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import demo_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import compress
from compress.registry import SCHEMES

CACHE = Path(__file__).resolve().parent.parent / ".demo"
COLUMNS = ("scheme", "size MB", "ratio", "bits per\nweight", "KL\nnats", "top-1\nagreement", "perplexity", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compress one model with every scheme, and score each result.")
    parser.add_argument("model", nargs="?", help="a directory or a hub id; without it a small model is trained, once")
    given = parser.parse_args().model
    progress = Console(stderr=True)
    disable_progress_bar()  # of transformers: a bar for each file would break up ours
    model = given or trained(progress)
    reports: dict[str, dict[str, Any]] = {}
    refusals: dict[str, ValueError] = {}
    for scheme in SCHEMES:
        out = CACHE / (f"out-{scheme}" if given else scheme)
        with progress.status(f"{scheme}: compressing and scoring {model}"):
            try:
                reports[scheme] = compress.quantize(model, out, scheme=scheme, overwrite=True).to_dict()
            except ValueError as error:  # a scheme may not fit the given model; the others still may
                refusals[scheme] = error
    if reports:
        Console().print(table(str(given or "the demo model"), reports))
    for scheme, error in refusals.items():
        progress.print(f"{scheme}: {error}", style="red", markup=False, highlight=False)
    return 1 if refusals else 0


def trained(console: Console) -> str:
    """The directory of the demo's own model, trained now if it is not there yet."""
    directory = CACHE / "model"
    if directory.exists():
        return str(directory)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training the demo model", total=demo_model.STEPS)
        demo_model.train_into(directory, lambda step: progress.update(task, completed=step))
    return str(directory)


def table(model: str, reports: dict[str, dict[str, Any]]) -> Table:
    """One row for the original, then one for each report, in the registry's order."""
    shown = Table(*COLUMNS, box=None, title=f"Every scheme on {model}, scored on held-out text")
    for column in shown.columns[1:]:
        column.justify = "right"
    first = next(iter(reports.values()))
    size, perplexity = first["original_bytes"], first["evaluation"]["reference_perplexity"]
    bits = 8 * size / first["parameters"]
    shown.add_row("original", f"{size / 1e6:.2f}", "1.00", f"{bits:.2f}", "", "", f"{perplexity:.3f}", "")
    for scheme, report in reports.items():
        scores = report["evaluation"]
        shown.add_row(
            scheme,
            f"{report['bytes'] / 1e6:.2f}",
            f"{report['ratio']:.2f}",
            f"{report['bits_per_weight']:.2f}",
            f"{scores['kl_mean']:.5f}",
            f"{scores['top1_agreement']:.2%}",
            f"{scores['perplexity']:.3f}",
            f"{report['seconds']:.1f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
