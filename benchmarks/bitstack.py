"""`bitstack` beside the paper's own algorithm, and beside `int4` and `kmeans`, at equal bytes.

    python benchmarks/bitstack.py MODEL --text held-out.txt -o benchmarks/results/bitstack.md
    python benchmarks/bitstack.py --svd

KL divergence from the original on held-out text. Bits per weight count all that is loaded of the compressed weights.
The paper's algorithm [2410.23918] is implemented here from its description: a full SVD for each block, float16 factors,
and the residual taken from the factors before they are rounded. Levels in step: all weights hold b or b + 1 blocks, in
a level the ones first that gain most output error for their bytes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.bitstack import Bitstack
from compress.calibrate import Calibration
from compress.eval import chart, fidelity
from compress.eval import text as texts
from compress.lowrank import truncated_svd
from compress.samples import draw

SIZES = (1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)  # bits per weight
DRAWN = (1.25, *SIZES[:3], 2.25, 2.5, 2.75, *SIZES[4:])  # in the chart
INT4: list[dict[str, Any]] = [
    {"bits": 2, "symmetric": False, "group_size": 64},
    {"bits": 3},
    {"bits": 4},
    {"bits": 8},
]
PEERS = [("int4", {**options, "method": method}) for options in INT4 for method in ("awq+gptq", "rtn")]
# A codebook for each row is most of what a small matrix takes at many bits; one for 16 rows is not.
PEERS += [("kmeans", {"bits": bits}) for bits in range(1, 6)]
PEERS += [("kmeans", {"bits": bits, "granularity": "group"}) for bits in range(4, 9)]
# Between one and two bits: some of the linears have one.
PEERS += [
    ("kmeans", {"bits": 2, "one_bit": names}) for names in ("(gate|up)_proj", "(gate|up|o)_proj", "(q|k|v|down)_proj")
]


class Paper:
    """The blocks of one weight as the paper makes them."""

    def __init__(self, weight: Tensor, norms: Tensor, rank: int, blocks: int) -> None:
        """weight: (m, n). norms: (n,), of the inputs' channels."""
        scale = norms + 1e-3
        scale = scale / torch.exp(scale.log().mean())  # the paper leaves it as it is, and float16 may overflow
        m, n = weight.shape
        rest, total = weight * scale, torch.zeros(m, n)
        self.decoded: list[Tensor] = []
        self.bytes = m * n / 8 + 2 * min(rank, m, n) * (m + n)
        for _ in range(blocks):
            signs = torch.where(rest < 0, -1.0, 1.0)
            u, s, v = torch.linalg.svd(rest.abs(), full_matrices=False)
            u, v = u[:, :rank] * s[:rank].sqrt(), v[:rank] * s[:rank, None].sqrt()
            rest = rest - signs * (u @ v)
            total = total + signs * (u.half().float() @ v.half().float())
            self.decoded.append((total / scale).bfloat16())


class Bench:
    """The original, its scores on held-out text, and what its layers see."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.path, self.folder = Path(arguments.model), folder
        self.calibration = Calibration(arguments.calibration, arguments.samples, arguments.seq_len)
        text = texts.read([arguments.text])
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.windows, self.bytes = texts.windows(tokenizer, text, arguments.seq_len, arguments.windows)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.bfloat16)
        fidelity.record(self.model, self.windows, folder / "logits")
        head = self.model.get_output_embeddings()
        modules = self.model.named_modules()
        self.linears = {name: m for name, m in modules if isinstance(m, nn.Linear) and m is not head}
        self.weights = {name: linear.weight.data.clone() for name, linear in self.linears.items()}
        self.count = sum(weight.numel() for weight in self.weights.values())

    def kl(self, model: Any) -> float:
        found = fidelity.compare(model, self.windows, self.folder / "logits", self.bytes).kl_mean
        assert found is not None
        return found

    def moments(self) -> dict[str, Tensor]:
        """Mean square of the inputs of each linear layer."""
        found: dict[str, Tensor] = {}

        def observe(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found[name] = found.get(name, 0) + inputs[0].float().square().mean((0, 1))

            return hook

        hooks = [linear.register_forward_pre_hook(observe(name)) for name, linear in self.linears.items()]
        how = self.calibration
        with torch.no_grad():
            for row in draw(how.source, self.path, how.samples, how.seq_len, seed=0).tokens:
                self.model(row[None])
        for hook in hooks:
            hook.remove()
        return found

    def paper(self, rank: int | None, sizes: tuple[float, ...]) -> list[float]:
        """KL of the paper's algorithm at these sizes. rank: None for ours."""
        blocks, moments = 6, self.moments()
        made = {
            name: Paper(w.float(), moments[name].sqrt(), rank or Bitstack().rank_of(tuple(w.shape)), blocks)
            for name, w in self.weights.items()
        }
        errors = {name: output_errors(self.weights[name], p.decoded, moments[name]) for name, p in made.items()}
        taken = {name: [p.bytes] * blocks for name, p in made.items()}
        found = []
        for size in sizes:
            for name, held in levels(errors, taken, size * self.count / 8).items():
                self.linears[name].weight.data = made[name].decoded[held - 1] if held else 0 * self.weights[name]
            found.append(self.kl(self.model))
        for name, linear in self.linears.items():
            linear.weight.data = self.weights[name]
        return found


def output_errors(weight: Tensor, decoded: list[Tensor], moment: Tensor) -> list[float]:
    """The energy that is missing in the outputs without a block, with one, two, ..."""
    return [float(((weight.float() - d.float()).square() @ moment).sum()) for d in (weight * 0, *decoded)]


def levels(errors: Mapping[str, list[float]], taken: Mapping[str, list[float]], room: float) -> dict[str, int]:
    """Blocks of each weight that fit into `room` bytes, level by level. errors: without a block, with one, ..."""
    counts = dict.fromkeys(errors, 0)
    for level in range(min(map(len, taken.values()))):
        gains = {name: (e[level] - e[level + 1]) / e[0] / taken[name][level] for name, e in errors.items()}
        for name in sorted(gains, key=lambda name: -gains[name]):
            room -= taken[name][level]
            if room < 0:
                return counts
            counts[name] += 1
    return counts


def quality(arguments: argparse.Namespace, folder: Path) -> str:
    bench, out = Bench(arguments, folder), folder / "out"
    started = time.monotonic()
    report = compress.quantize(bench.path, out, "bitstack", scoring=None, calibration=bench.calibration)
    seconds = time.monotonic() - started
    model = compress.load(out)
    live = model.resize.__self__
    packed = sum(line["bytes"] for line in report.tensors if line["scheme"])
    fixed = live.bytes - packed
    known = compress.formats.manifest.unseal(out / "compress.json")["stack"]
    errors = {module: [1.0, *(output**2 for _, output in found)] for module, found in known.items()}
    taken = {module: block_bytes(bench.weights[module]) for module in known}
    names = ("bitstack", "levels in step", "paper, rank 16", "paper, our rank")
    columns: list[list[float]] = [[], []]
    for size in SIZES:
        model.resize(int(fixed + size * bench.count / 8))
        columns[0].append(bench.kl(model))
        live.hold(levels(errors, taken, size * bench.count / 8))
        columns[1].append(bench.kl(model))
        print(size, columns[0][-1], columns[1][-1], flush=True)
    most = sum(size <= 5 for size in SIZES)
    for rank in (16, None):
        columns.append(bench.paper(rank, SIZES[:most]) + [float("nan")] * (len(SIZES) - most))
        print(columns[-1], flush=True)
    lines = [f"Encoded, calibrated and sorted in {seconds:.0f} s.\n\n| bits per weight | {' | '.join(names)} |\n"]
    lines.append(f"|--:|{'--:|' * len(names)}\n")
    for i, size in enumerate(SIZES):
        values = ("" if c[i] != c[i] else f"{c[i]:.5f}" for c in columns)
        lines.append(f"| {size} | {' | '.join(values)} |\n")
    return "".join([*lines, "\n", *(peers(bench, model, fixed) if arguments.peers else [])])


def drawn(arguments: argparse.Namespace, folder: Path) -> str:
    """A chart of size and KL: one checkpoint, resized."""
    bench, out = Bench(arguments, folder), folder / "out"
    report = compress.quantize(bench.path, out, "bitstack", scoring=None, calibration=bench.calibration)
    model, points = compress.load(out), []
    fixed = model.resize.__self__.bytes - sum(line["bytes"] for line in report.tensors if line["scheme"])
    for size in DRAWN:
        model.resize(int(fixed + size * bench.count / 8))
        points.append(chart.Point(f"{size:g}", size, bench.kl(model)))
        print(size, points[-1].loss, flush=True)
    title = f"One bitstack checkpoint of {bench.path.name} at {len(points)} sizes"
    return chart.pareto(title, points, "bits per weight", "mean KL divergence from the original, nats")


def block_bytes(weight: Tensor) -> list[float]:
    """What each block of ours takes."""
    scheme = Bitstack()
    specs = scheme.specs(tuple(weight.shape), weight.dtype)
    return [sum(s.bytes for local, s in specs.items() if scheme.block_of(local) == b) for b in range(scheme.blocks)]


def peers(bench: Bench, model: Any, fixed: int) -> list[str]:
    lines = ["| peer | bits per weight | KL | `bitstack` in as many bytes |\n|---|--:|--:|--:|\n"]
    for scheme, options in PEERS:
        out = bench.folder / "peer"
        extra: dict[str, Any] = {"calibration": bench.calibration} if options.get("method") != "rtn" else {}
        given = {key: value for key, value in options.items() if key != "one_bit"}
        if "one_bit" in options:
            recipe = bench.folder / "recipe.json"
            recipe.write_text(json.dumps([{"match": f"re:{options['one_bit']}", "scheme": scheme, "bits": 1}]))
            extra["rules"] = compress.Rules(recipe)
        report = compress.quantize(bench.path, out, scheme, scoring=None, overwrite=True, **extra, **given)
        assert report.bits_per_weight is not None
        name = " ".join([f"`{scheme}`", *(f"{key}={value}" for key, value in options.items())])
        kl = bench.kl(compress.load(out))
        try:
            model.resize(int(fixed + report.bits_per_weight * bench.count / 8))
            ours = f"{bench.kl(model):.5f}"
        except ValueError:  # less than the first blocks take
            ours = ""
        lines.append(f"| {name} | {report.bits_per_weight:.3f} | {kl:.5f} | {ours} |\n")
        print(lines[-1], end="", flush=True)
    return [*lines, "\n"]


def svd() -> str:
    """Processor seconds on one thread, so that other work on the machine does not count."""
    torch.set_num_threads(1)
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    magnitudes, scheme = weight.abs(), Bitstack(scaling="none")
    scheme.encode(weight[:64].bfloat16())  # compiles

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        before = time.process_time()
        result = run()
        return time.process_time() - before, result

    full, (u, s, v) = timed(lambda: torch.linalg.svd(magnitudes, full_matrices=False))
    fast, (a, b) = min((timed(lambda: truncated_svd(magnitudes, 16)) for _ in range(5)), key=lambda found: found[0])
    errors = [float((magnitudes - x @ y).norm()) for x, y in ((u[:, :16] * s[:16], v[:16]), (a, b))]
    encode = min(timed(lambda: scheme.encode(weight.bfloat16()))[0] for _ in range(3))
    return (
        f"4096x4096, rank 16, processor seconds on one thread: full SVD {full:.1f}, ours {fast:.3f} ({full / fast:.0f} "
        f"times faster), error {100 * (errors[1] / errors[0] - 1):.3f} % above it. A whole weight in 8 blocks: "
        f"{encode:.1f} s; the paper's 16 blocks take 16 full SVDs, {16 * full:.0f} s.\n\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory")
    parser.add_argument("--text", help="held-out text that is scored")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--peers", action="store_true", help="also int4 and kmeans at 1 to 8 bits")
    parser.add_argument("--svd", action="store_true", help="time the SVD")
    parser.add_argument("--chart", type=Path, help="draw size and KL into this SVG, and measure nothing else")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    shown = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    text = f"`python benchmarks/bitstack.py {shlex.join(shown)}`, torch {torch.__version__}:\n\n"
    if arguments.svd:
        text += svd()
    if arguments.chart:
        with tempfile.TemporaryDirectory() as folder:
            arguments.chart.write_text(drawn(arguments, Path(folder)))
        return
    if arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            text += quality(arguments, Path(folder))
    print(text)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
