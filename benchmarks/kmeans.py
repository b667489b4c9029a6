"""`kmeans`: its clustering beside scikit-learn's, nested codebooks, what training keeps, and quality beside peers.

    python benchmarks/kmeans.py MODEL --text held-out.txt --calibration other.txt -o benchmarks/results/kmeans.md

Speed: rows of 4096 normal weights in bf16, process time on one thread, medians; the error beside the optimum's. Quality
is measured as in quality.py, whose arguments these are. A peer is left out, and named, where it is not installed.
Memory: bytes of the tensors that autograd saves, each storage once, for a 4096 x 4096 layer at 3 bits and 16 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import Bench, hqq, nf4
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from compress.dkm import TEMPERATURE, Clusters
from compress.formats import cluster

OURS: list[tuple[str, dict[str, Any]]] = [
    ("kmeans", {"granularity": "group"}),
    ("kmeans", {"entries": "int8"}),
    ("kmeans", {"granularity": "group", "refine": 16}),
    ("kmeans", {"granularity": "group", "method": "rtn", "sensitivity": "fisher"}),
    ("kmeans", {"granularity": "group", "method": "rtn", "sensitivity": "none"}),
]
INT4: dict[int, list[dict[str, Any]]] = {4: [{}], 3: [{}], 2: [{"symmetric": False, "group_size": 64}]}


def speed(rows: int, clusters: int, repeats: int) -> Iterator[str]:
    torch.set_num_threads(1)
    weight = (torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    cluster.codebooks(weight[:1], clusters)
    best = cluster.codebooks(weight, clusters)
    yield _line("compress", clusters, _milliseconds(lambda: cluster.codebooks(weight, clusters), repeats) / rows, 1.0)
    if importlib.util.find_spec("sklearn") is None:
        yield "| scikit-learn | not installed |\n"
        return
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    for starts in (1, 10):
        found: list[Tensor] = []

        def fit(row: Tensor, starts: int = starts, found: list[Tensor] = found) -> None:
            made = KMeans(clusters, n_init=starts, random_state=0).fit(row.float().numpy()[:, None])
            found.append(torch.from_numpy(made.cluster_centers_[:, 0]).sort().values.float())

        with threadpool_limits(1):
            some = weight[:: max(1, rows // 8)]
            times = [_milliseconds(lambda row=row: fit(row), 1) for row in some]  # type: ignore[misc]
        ratio = _error(some, torch.stack(found)) / _error(some, best[:: max(1, rows // 8)])
        yield _line(f"scikit-learn, n_init={starts}", clusters, statistics.median(times), ratio)


def _error(weight: Tensor, centroids: Tensor) -> float:
    found = centroids.gather(1, cluster.assign(weight, centroids).long())
    return float((found - weight.float()).double().square().sum())


def _milliseconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - started))
    return statistics.median(times)


def _line(name: str, clusters: int, milliseconds: float, ratio: float) -> str:
    return f"| {name} | {clusters} | {milliseconds:.3f} | {ratio:.4f} |\n"


def nested(rows: int, bits: int) -> str:
    """The error of each width of a nested codebook beside that of one of its own, which as many weights share."""
    weight = torch.randn(rows, 1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, books = cluster.nested(weight, bits)
    ratios = []
    for width, book in enumerate(books, 2):
        found = book.gather(1, (codes >> (bits - width)).long())
        own = _error(weight, cluster.codebooks(weight, 1 << width))
        ratios.append(float((found - weight.float()).double().square().sum()) / own)
    return f"| {bits} | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |{' |' * (8 - bits)}\n"


def memory(granularity: str, size: int = 4096, bits: int = 3) -> str:
    """What a layer saves for its backward pass, with DKM's assignment as torch computes it and with ours."""
    rows = {"tensor": size, "group": 16, "channel": 1}[granularity]
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16().float() * 0.02
    levels = cluster.codebooks(weight.view(-1, rows * size), 1 << bits)
    codes = cluster.assign(weight, levels.repeat_interleave(rows, 0))
    layer, x = Clusters(weight, codes, levels, rows, None), torch.randn(16, size)

    def plain() -> Tensor:
        """Of all weights at once: attention over the entries, and their mean."""
        entries = layer.levels.repeat_interleave(rows, 0)[:, None]
        gap = (entries[..., -1:] - entries[..., :1]).detach() / (2**bits - 1)
        temperature = TEMPERATURE * gap.square()
        attention = (-(weight[..., None] - entries).square() / temperature).softmax(-1)
        return F.linear(x, (attention * entries).sum(-1))

    theirs, ours = _saved(plain), _saved(lambda: layer.multiply(x))
    return f"| {granularity} | {theirs / 1e6:.1f} | {ours / 1e6:.1f} | {theirs / ours:.1f} |\n"


def _saved(forward: Callable[[], Tensor]) -> int:
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other gets its place

    with saved_tensors_hooks(pack, lambda _: _):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def quality(bench: Bench, widths: list[int]) -> Iterator[str]:
    for bits in widths:
        for scheme, options in OURS:
            yield ours(bench, scheme, {"bits": bits, **options})
        for options in INT4[bits]:
            for method in ("awq+gptq", "rtn"):
                yield ours(bench, "int4", {"bits": bits, **options, "method": method})
        peers = [hqq(bits, 64), *([nf4()] if bits == 4 else [])]
        for peer in peers:
            installed = importlib.util.find_spec(peer.package)
            yield bench.peer(peer) if installed else f"| {peer.name} | not installed |\n"


def ours(bench: Bench, scheme: str, options: dict[str, Any]) -> str:
    calibrated = options.get("method", "ganq") != "rtn" or (scheme == "kmeans" and options.get("sensitivity") != "none")
    return bench.ours(scheme, options, calibrated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory; without one, only speed is measured")
    parser.add_argument("--text", help="held-out text that is scored")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    lines = ["| clustering | centroids | ms a row | error / optimum |\n|---|--:|--:|--:|\n"]
    print(lines[0], end="", flush=True)
    for line in (line for clusters in (4, 8, 16) for line in speed(arguments.rows, clusters, 5)):
        lines.append(line)
        print(line, end="", flush=True)
    lines.append(f"\n| nested | {' | '.join(f'{b} bits' for b in range(2, 9))} |\n|--:|{'--:|' * 7}\n")
    lines += [nested(4, bits) for bits in range(3, 9)]
    lines.append("\n| codebooks | DKM, MB | ours, MB | ratio |\n|---|--:|--:|--:|\n")
    lines += [memory(granularity) for granularity in ("tensor", "group", "channel")]
    print("".join(lines[-11:]), end="", flush=True)
    if arguments.model:
        head = "| method | bits per weight | KL mean | KL median | KL p99 | top-1 | perplexity | seconds |\n"
        lines.append(f"\n{head}|---|{'--:|' * 7}\n")
        print(lines[-1], end="", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for line in quality(Bench(arguments, Path(folder)), arguments.bits):
                lines.append(line)
                print(line, end="", flush=True)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write("".join(lines) + "\n")


if __name__ == "__main__":
    main()
