"""Size and cost of every scheme on one model, as the table in the README.

python benchmarks/schemes.py MODEL --text FILE
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import compress
from compress.calibrate import Calibration
from compress.registry import make

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("df11", {}),
    ("df11", {"coding": "fixed"}),
    ("int8", {}),
    ("int8", {"activations": "dynamic"}),
    ("fp8", {}),
    ("fp8", {"activations": "dynamic"}),
    ("fp8", {"granularity": "block"}),
    ("mxfp8", {}),
    ("nvfp4", {}),
    ("nf4", {}),
    ("mxfp4", {}),
    ("int4", {"group_size": 32}),
    ("int4", {}),
    ("int4", {"method": "rtn"}),
    ("int4", {"symmetric": False}),
    ("int4", {"bits": 3}),
    ("int4", {"bits": 3, "method": "rtn"}),
    ("int4", {"bits": 3, "symmetric": False, "group_size": 64}),
    ("int4", {"bits": 2, "symmetric": False, "group_size": 32}),
    ("int4", {"bits": 2, "symmetric": False, "group_size": 32, "method": "rtn"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or hub id")
    parser.add_argument("--text", default="builtin", help="what it is scored on")
    parser.add_argument("--calibration", default="builtin", help="what calibrated schemes are fitted to")
    parser.add_argument("--samples", type=int, default=128)
    arguments = parser.parse_args()
    calibration = Calibration(arguments.calibration, arguments.samples)
    scoring = compress.Scoring(text=(arguments.text,), tasks=())
    print("| scheme | bits per weight | ratio | KL mean | top-1 agreement | perplexity | relative error |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for scheme, options in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            extra = {"calibration": calibration} if make(scheme, options).needs_calibration else {}
            report = compress.quantize(
                arguments.model, Path(folder) / "out", scheme, scoring=scoring, **extra, **options
            )
        scores, errors = report.evaluation, [t["relative_error"] for t in report.tensors if t["scheme"]]
        assert scores is not None
        name = " ".join([f"`{scheme}`", *(f"{key}={value}" for key, value in options.items())])
        print(
            f"| {name} | {report.bits_per_weight:.3f} | {report.ratio:.2f} | {scores['kl_mean']:.5f} | "
            f"{scores['top1_agreement']:.4f} | {scores['perplexity']:.3f} | {sum(errors) / len(errors):.4f} |"
        )
    print(f"| original | 16 | 1 | 0 | 1 | {scores['reference_perplexity']:.3f} | 0 |")


if __name__ == "__main__":
    main()
