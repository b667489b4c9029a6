"""What `--target-size` gains: KL beside one width for all weights, and other groups, at the same size, in one run.

    python benchmarks/target.py MODEL --text held-out.txt --calibration other.txt -o benchmarks/results/target.md

Each uniform scheme is made and scored; then widths are chosen for its very size, and both scored alike (see
quality.py). What was predicted is the KL divergence that stands in the report.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from quality import Bench

import compress
from compress.candidates import parse
from compress.eval import fidelity
from compress.registry import make

UNIFORM = "int4:bits=3,int4:bits=3:group_size=64,int4:bits=3:group_size=32,int4,int4:group_size=64,int4:group_size=32"


def scored(bench: Bench, scheme: str, **options: Any) -> tuple[Any, float]:
    """The report, and the mean KL divergence."""
    out = bench.folder / "out"
    fitted = options.get("method") != "rtn" or "target_size" in options
    extra = {"calibration": bench.calibration} if fitted else {}
    report = compress.quantize(bench.path, out, scheme, scoring=None, overwrite=True, **extra, **options)
    model = compress.load(out)
    return report, fidelity.compare(model, bench.windows, bench.folder / "logits", bench.bytes).kl_mean


def rows(bench: Bench, arguments: argparse.Namespace) -> Iterator[str]:
    given = dict(option.split("=") for option in arguments.set)
    for candidate in parse(arguments.uniform):
        options = {**given, **dict(candidate.options)}
        make(candidate.scheme, options)
        uniform, before = scored(bench, candidate.scheme, **options)
        wide = {key: value for key, value in given.items() if key != "bits"}
        chosen, after = scored(bench, candidate.scheme, target_size=uniform.bytes, **wide)
        assert chosen.target is not None and chosen.bytes <= uniform.bytes
        yield (
            f"| `{candidate.text}` | {uniform.bits_per_weight:.3f} | {uniform.bytes} | {before:.5f} | {chosen.bytes} | "
            f"{after:.5f} | {chosen.target['predicted_kl']:.5f} | {after / before:.2f} |\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--text", required=True, help="held-out text that is scored")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--uniform", default=UNIFORM, help="schemes of one width each")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of all, and of the choice")
    parser.add_argument("-o", "--output", type=Path, help="file that the table is added to")
    arguments = parser.parse_args()
    shown = shlex.join(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
    lines = [
        f"`python benchmarks/target.py {shown}`, {date.today()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}.\n\n",
        "| one for all | bits per weight | bytes | KL mean | bytes chosen | KL mean | predicted | of the former |\n",
        "|---|--:|--:|--:|--:|--:|--:|--:|\n",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for line in rows(Bench(arguments, Path(folder)), arguments):
            print(line, end="", flush=True)
            lines.append(line)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("".join(lines) + "\n")


if __name__ == "__main__":
    main()
