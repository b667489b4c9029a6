"""What block floating point costs in quality: the KV cache by block, bits and order of channels, and the weights.

    python benchmarks/bfp.py MODEL --text held-out.txt --calibration other.txt -o benchmarks/results/bfp.md

KL divergence is from the original, on held-out text; both run in float32 on bf16 weights. Every key and value of a
window is packed before it is read: no recent ones are kept in full precision. "With outliers" is the same function of a
model in which some rotary pairs of every key head are larger, and those of its query heads smaller by the same factor;
for `--order`, what reordering gives for weights, one in which the gains of norms are larger in some of their
channels, and the columns that read them smaller, and so the rows of values and the columns of what reads those.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache

import compress
from compress import kv_cache
from compress.cache import EXACT_BITS, BfpCache, key_order
from compress.calibrate import Calibration
from compress.eval import fidelity
from compress.eval import text as texts
from compress.kivi import KiviCache
from compress.packed_cache import nbytes

OUTLIERS, FACTOR = 3, 12.0  # rotary pairs of each key head, and how much larger they become
LOUD, LOUDER = (32, 8), 16.0  # channels of the stream and of each value head, and how much; exact in bf16
BLOCKS = (16, 32, 64, 128)
BITS = (3, 4, 5, 6)
# in families of equal size: scheme and options
WEIGHTS: list[tuple[str, dict[str, Any]]] = [
    ("bfp", {}),
    ("bfp", {"full_range": False, "search": False}),
    ("mxfp4", {}),
    ("int4", {"group_size": 64, "method": "rtn"}),
    ("bfp", {"block_size": 16}),
    ("nvfp4", {}),
    ("int4", {"group_size": 32, "method": "rtn"}),
    ("bfp", {"mantissa_bits": 5}),
    ("int4", {"bits": 5, "group_size": 64, "method": "rtn"}),
    ("bfp", {"mantissa_bits": 6}),
    ("int4", {"bits": 6, "group_size": 64, "method": "rtn"}),
]
CALIBRATED: list[tuple[str, dict[str, Any]]] = [
    ("bfp", {"method": "gptq"}),
    ("mxfp4", {"method": "gptq"}),
    ("int4", {"group_size": 64, "method": "gptq"}),
]


ORDERED: list[tuple[str, dict[str, Any]]] = [
    ("bfp", {"method": "gptq", "reorder": False}),
    ("bfp", {"method": "gptq", "reorder": True}),
    ("mxfp4", {}),
    ("mxfp4", {"reorder": True}),
    ("int4", {"group_size": 64, "method": "rtn"}),
    ("nvfp4", {}),
    ("nvfp4", {"reorder": True}),
    ("int4", {"group_size": 32, "method": "rtn"}),
]


class Bench:
    """A model and its log-probabilities on held-out text."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.path, self.folder = Path(arguments.model), folder
        self.calibration = Calibration(arguments.calibration, arguments.samples, arguments.window)
        tokenizer, text = AutoTokenizer.from_pretrained(self.path), texts.read([arguments.text])
        self.windows, self.bytes = texts.windows(tokenizer, text, arguments.window, arguments.windows)
        self.narrow = compress.load(self.path)  # in bf16, for the bytes of a cache
        fidelity.record(self.load(), self.windows, folder / "logits", 4)

    def load(self) -> Any:
        return self.widened(self.path)

    def widened(self, path: Path) -> Any:
        """In float32, which a CPU is fast at; packed weights stay packed."""
        return torch.nn.Module.float(compress.load(path))

    def score(self, model: Any) -> str:
        found = fidelity.compare(model, self.windows, self.folder / "logits", self.bytes, 4)
        return f"{found.kl_mean:.5f} | {found.top1_agreement:.4f} | {found.perplexity:.3f}"

    def cached(self, model: Any, make: Callable[[], Cache]) -> tuple[float, str]:
        """Bytes for each token of a bf16 model, and the scores with such a cache."""
        kv_cache.use(model, "bfp")
        model.kv_cache = make
        cache = make()
        with torch.inference_mode():
            self.narrow(self.windows[:1], past_key_values=cache, use_cache=True)
        return nbytes(cache) / self.windows.shape[1], self.score(model)

    def divergence(self, path: Path, scheme: str, options: dict[str, Any], calibrated: bool) -> float:
        """The KL of a model like this one, compressed. Leaves the bits that a weight takes in `bits`."""
        extra = {"calibration": self.calibration} if calibrated or options.get("method") == "gptq" else {}
        out = self.folder / "out"
        report = compress.quantize(path, out, scheme, scoring=None, overwrite=True, **extra, **options)
        self.bits = report.bits_per_weight
        return fidelity.compare(self.widened(out), self.windows, self.folder / "logits", self.bytes, 4).kl_mean

    def weights(self, scheme: str, options: dict[str, Any]) -> str:
        extra = {"calibration": self.calibration} if options.get("method") == "gptq" else {}
        out = self.folder / "out"
        report = compress.quantize(self.path, out, scheme, scoring=None, overwrite=True, **extra, **options)
        name = " ".join([f"`{scheme}`", *(f"{key}={value}" for key, value in options.items())])
        return f"| {name} | {report.bits_per_weight:.3f} | {self.score(self.widened(out))} |\n"


@torch.no_grad()
def with_outliers(model: Any) -> Any:
    """Some rows of each key head times FACTOR, those of its query heads divided by it: the same function."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention = layer.self_attn
        keys = attention.k_proj.weight.view(-1, attention.head_dim, attention.k_proj.weight.shape[1])
        queries = attention.q_proj.weight.view(len(keys), -1, attention.head_dim, keys.shape[2])
        for head in range(len(keys)):
            pairs = torch.randperm(attention.head_dim // 2, generator=generator)[:OUTLIERS]
            channels = torch.cat([pairs, pairs + attention.head_dim // 2])
            keys[head, channels] *= FACTOR
            queries[head, :, channels] /= FACTOR
    return model


def key_rows(bench: Bench, model: Any) -> Iterator[str]:
    layers, channels = len(model.model.layers), model.model.layers[0].self_attn.head_dim
    own = dict.fromkeys(range(layers), torch.arange(channels))
    orders = {"in their order": own, "pairs side by side": None, "K-sort": key_order(model)}
    yield "| block | channels of keys | KL | top-1 | perplexity | KL, centered | top-1 | perplexity |\n"
    yield "|--:|---|" + "--:|" * 6 + "\n"
    for size in (size for size in BLOCKS if size <= channels or size == BLOCKS[0]):
        for name, order in orders.items():
            how = {"value_bits": EXACT_BITS, "block_size": size, "window": 0, "order": order}
            makers = [partial(BfpCache, model.config, 4, **how, centered=centered) for centered in (False, True)]
            yield f"| {size} | {name} | {' | '.join(bench.cached(model, make)[1] for make in makers)} |\n"


def cache_rows(bench: Bench, model: Any) -> Iterator[str]:
    yield "| cache | bytes per token | times smaller | KL | top-1 | perplexity |\n|---|--:|--:|--:|--:|--:|\n"
    plain, scores = bench.cached(model, lambda: DynamicCache(config=model.config))
    yield f"| as it is | {plain:.0f} | 1.00 | {scores} |\n"
    order = key_order(model)
    makers: dict[str, Callable[[], Cache]] = {
        f"`bfp` {bits} bits": partial(BfpCache, model.config, bits, window=0, order=order) for bits in (8, 6, 5, 4)
    }
    makers["`bfp` 4 bits, not centered"] = partial(BfpCache, model.config, 4, window=0, order=order, centered=False)
    makers |= {f"KIVI {bits} bits": partial(KiviCache, model.config, bits, window=0) for bits in (4, 2)}
    for name, make in makers.items():
        held, scores = bench.cached(model, make)
        yield f"| {name} | {held:.0f} | {plain / held:.2f} | {scores} |\n"


def loud(path: Path, folder: Path) -> Path:
    """The same function, with outliers that weights see: exactly, since LOUDER is a power of two."""
    shutil.copytree(path, folder)
    folder.chmod(0o755)
    generator = torch.Generator().manual_seed(0)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    channels = torch.randperm(len(tensors["model.norm.weight"]), generator=generator)[: LOUD[0]]
    size = AutoConfig.from_pretrained(path).head_dim
    for name in tensors:
        layer = name.rpartition(".layers.")[0] and ".".join(name.split(".")[:3])
        if name.endswith("layernorm.weight"):
            tensors[name][channels] *= LOUDER
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensors[name][:, channels] /= LOUDER
        if name.endswith("v_proj.weight"):
            values, reading = tensors[name], tensors[f"{layer}.self_attn.o_proj.weight"]
            heads = reading.view(len(reading), len(values) // size, -1, size)
            for head, rows in enumerate(values.view(-1, size, values.shape[1])):
                chosen = torch.randperm(size, generator=generator)[: LOUD[1]]
                rows[chosen] *= LOUDER
                heads[:, head, :, chosen] /= LOUDER
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    return folder


def order_rows(bench: Bench) -> Iterator[str]:
    yield "| block | bits | bits per weight | as it is | reordered | with outliers | reordered | recovered |\n"
    yield "|--:|--:|" + "--:|" * 6 + "\n"
    other = loud(bench.path, bench.folder / "loud")
    for size, bits in product(BLOCKS, BITS):
        kl: list[float] = []
        for path, reorder in product((bench.path, other), (False, True)):
            options = {"block_size": size, "mantissa_bits": bits, "method": "rtn", "reorder": reorder}
            kl.append(bench.divergence(path, "bfp", options, calibrated=reorder))
        recovered = (kl[2] - kl[3]) / (kl[2] - kl[0])
        shown = " | ".join(f"{value:.5f}" for value in kl)
        yield f"| {size} | {bits} | {bits + 8 / size:.3f} | {shown} | {recovered:.0%} |\n"
    yield "\n| format | bits per weight | as it is | with outliers |\n|---|--:|--:|--:|\n"
    for scheme, options in ORDERED:
        kl = [bench.divergence(path, scheme, options, "reorder" in options) for path in (bench.path, other)]
        name = " ".join([f"`{scheme}`", *(f"{key}={value}" for key, value in options.items())])
        yield f"| {name} | {bench.bits:.3f} | {kl[0]:.5f} | {kl[1]:.5f} |\n"


def report(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    shown = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    yield f"# Block floating point\n\n`python benchmarks/bfp.py {shlex.join(shown)}`, {date.today()}, "
    yield f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores.\n"
    bench = Bench(arguments, folder)
    if arguments.order:
        how = f"{arguments.samples} samples of {arguments.window} tokens of {Path(arguments.calibration).name}"
        yield f"\n## Weights, reordered\n\nKL in nats, weights rounded to nearest; reordered by {how}.\n\n"
        yield from order_rows(bench)
        return
    model = bench.load()
    count, length = bench.windows.shape
    yield f"\n{count} windows of {length} tokens. KL in nats; perplexity of the original: "
    yield f"{bench.score(model).split(' | ')[2]}.\n"
    for title in ("", ", with outliers"):
        model = with_outliers(bench.load()) if title else model
        if title:
            yield f"\nWith outliers and no packed cache: KL, top-1 agreement, perplexity {bench.score(model)}.\n"
        yield f"\n## Keys at 4 bits, values as they are{title}\n\n"
        yield from key_rows(bench, model)
        yield f"\n## Keys and values{title}\n\nBlocks of 32 with K-sort, keys centered; KIVI in groups of 32.\n\n"
        yield from cache_rows(bench, model)
    yield "\n## Weights\n\n| format | bits per weight | KL | top-1 | perplexity |\n|---|--:|--:|--:|--:|\n"
    for scheme, options in WEIGHTS + (CALIBRATED if arguments.calibrated else []):
        yield bench.weights(scheme, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory")
    parser.add_argument("--text", required=True, help="held-out text that is scored")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibrated", action="store_true", help="also weights with GPTQ, which takes longer")
    parser.add_argument("--order", action="store_true", help="what reordering gives for weights, and nothing else")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in report(arguments, Path(folder)):
            lines.append(line)
            print(line, end="", flush=True)
    if arguments.output:
        arguments.output.write_text("".join(lines))


if __name__ == "__main__":
    main()
