"""Size and speed of the lossless scheme beside ZipNN, zstd and DFloat11's encoder, on the same bf16 tensors.

    python benchmarks/lossless.py --assets ASSETS -o benchmarks/results/lossless.md

Speed is GB (1e9 bytes) of bf16 a second: process time and wall time with one thread, wall time with more. Every codec
gets a fresh copy of each tensor, made outside the clock, and allocates what it returns. Size is all that is stored.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

import compress
from compress.registry import make

DIRECTORIES = (
    "models/techdocs-12m",
    "models/stories260k",
    "models/babyllama-105",
    "models/arthur-gpt2",
    "weights/gpt2-small-attention",
)
SLICE = 1 << 20  # weights that a slow encoder gets
WALL, CPU = 0, 1


@dataclass(frozen=True)
class Codec:
    """encode: (rows, columns) bf16 to what is stored, of `size` bytes. decode: back to the bits of as many words."""

    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int]
    slow: bool = False  # one thread only, a slice of the weights, and decode only checks


@dataclass
class Figures:
    """weights: how many a pass has. encode, decode: for each round the (wall, CPU) seconds of a pass."""

    weights: int
    size: int
    encode: list[Any] = field(default_factory=list)
    decode: list[Any] = field(default_factory=list)

    def speed(self, taken: list[Any], clock: int) -> float:
        return 2 * self.weights / 1e9 / float(statistics.median(seconds[clock] for seconds in taken))


def ours(coding: str) -> Callable[[int], Codec]:
    def build(threads: int) -> Codec:
        make("df11", {"coding": coding})  # ValueError where there is no such scheme
        return Codec(
            f"df11 {coding}",
            lambda w: compress.encode(w, scheme="df11", coding=coding),
            lambda tensors: compress.decode(tensors, scheme="df11", coding=coding),
            lambda tensors: sum(tensor.nbytes for tensor in tensors.values()),
        )

    return build


def zipnn(threads: int) -> Codec:
    """method AUTO is HUFFMAN for floats: only the header's byte that names it differs."""
    from zipnn import ZipNN

    # Its compress reorders the bits of its input in place: the copy it is given is lost.
    coder = ZipNN(input_format="torch", threads=threads)
    return Codec("ZipNN", coder.compress, coder.decompress, len)


def zstd(threads: int) -> Codec:
    import zstandard

    # 0: in the calling thread. A frame is decoded by one thread, whatever was asked for.
    encoder = zstandard.ZstdCompressor(level=3, threads=threads if threads > 1 else 0)
    decoder = zstandard.ZstdDecompressor()
    return Codec("zstd -3", lambda w: encoder.compress(w.view(torch.uint8).numpy().data), decoder.decompress, len)


def dfloat11(threads: int) -> Codec:
    """The encoder of the package itself; its decoder needs CUDA, so dahuffman's reads the stream back."""
    package = importlib.util.find_spec("dfloat11")
    if package is None or package.submodule_search_locations is None:
        raise ImportError("No module named 'dfloat11'")
    # Importing the package needs cupy, this file of it does not.
    path = Path(package.submodule_search_locations[0], "dfloat11_utils.py")
    spec = importlib.util.spec_from_file_location("dfloat11_utils", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)

    def encode(weight: Tensor) -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            codec, _, table = utils.get_32bit_codec(utils.get_codec(weight)[1])
            return codec, utils.get_luts(table), *utils.encode_weights([weight.flatten()], codec, 8, 512)

    def decode(stored: Any) -> Tensor:
        codec, _, encoded, sign_mantissa, *_ = stored
        exponent = torch.tensor(codec.decode(encoded.numpy().tobytes()), dtype=torch.int32)
        rest = sign_mantissa.int()
        bits: Tensor = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
        return bits.to(torch.int16)

    def size(stored: Any) -> int:
        return sum(tensor.nbytes for tensor in stored[1:])

    return Codec(f"DFloat11's encoder ({SLICE} weights)", encode, decode, size, slow=True)


CANDIDATES = {
    "df11 huffman": ours("huffman"),
    "df11 fixed": ours("fixed"),
    "ZipNN": zipnn,
    "zstd": zstd,
    "DFloat11": dfloat11,
}


def codecs(threads: int) -> tuple[list[Codec], list[str]]:
    """The candidates that can be built here, and why the others cannot."""
    built, missing = [], []
    for name, build in CANDIDATES.items():
        try:
            codec = build(threads)
        except (ImportError, ValueError) as error:
            missing.append(f"{name} ({error})")
            continue
        if threads == 1 or not codec.slow:
            built.append(codec)
    return built, missing


def synthetic(shape: tuple[int, int]) -> tuple[str, list[Tensor]]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return f"synthetic {shape[0]}x{shape[1]}, N(0, 0.02^2)", [weight.bfloat16()]


def checkpoints(root: Path) -> Iterator[tuple[str, list[Tensor]]]:
    """The bf16 tensors of each directory, as matrices: a vector has one row."""
    for directory in DIRECTORIES:
        parts = []
        for path in sorted(Path(root, directory).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                parts += [file.get_tensor(name) for name in sorted(file.keys())]
        weights = [part.reshape(-1, part.shape[-1]) for part in parts if part.dtype == torch.bfloat16]
        if not weights:
            raise ValueError(f"{root}: no bf16 tensors in {directory}; pass --assets")
        yield f"{Path(directory).name}, {len(weights)} tensors", weights


def fresh(weight: Tensor) -> Tensor:
    """A copy, not by torch: its idle threads would spin for a while, beside the codec that is timed."""
    return torch.from_numpy(weight.view(torch.int16).numpy().copy()).view(torch.bfloat16)


def words(decoded: Any) -> Any:
    return np.frombuffer(decoded, np.int16) if isinstance(decoded, bytes) else decoded.view(torch.int16).flatten()


def check(codec: Codec, weights: list[Tensor]) -> int:
    """Compares the bits, which also compiles what is compiled late. Returns the bytes stored."""
    size = 0
    for weight in weights:
        stored = codec.encode(fresh(weight))
        size += codec.size(stored)
        if not np.array_equal(words(codec.decode(stored)), words(weight)):
            raise ValueError(f"{codec.name}: other bits come back for a weight of shape {tuple(weight.shape)}")
    return size


def timed(call: Callable[[Any], Any], argument: Any) -> tuple[Any, Any]:
    """Returns the result, so that freeing it is not timed, and the (wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(argument)
    return result, np.array([time.perf_counter() - wall, time.process_time() - cpu])


def sample(codec: Codec, weights: list[Tensor], least: float) -> list[Any]:
    """Seconds of a pass over the weights: to encode and to decode. Small weights get passes of `least` s in all."""
    passes, total = 0, np.zeros((2, 2))
    while not passes or (total[0, WALL] < least and not codec.slow):
        passes, kept = passes + 1, []
        for weight in weights:
            stored, seconds = timed(codec.encode, fresh(weight))
            kept.append(stored)
            total[0] += seconds
        for stored in [] if codec.slow else kept:
            result, seconds = timed(codec.decode, stored)
            total[1] += seconds
            del result
    return list(total / passes)


def measure(weights: list[Tensor], threads: list[int], rounds: int, least: float) -> dict[int, dict[str, Figures]]:
    """Figures by thread count and codec. All are timed in turn: a slow minute of the machine falls on all of them."""
    head = [torch.cat([weight.flatten() for weight in weights])[:SLICE].view(1, -1)]
    runs = [(count, codec, head if codec.slow else weights) for count in threads for codec in codecs(count)[0]]
    measured: dict[int, dict[str, Figures]] = {count: {} for count in threads}
    for count, codec, given in runs:
        torch.set_num_threads(count)
        measured[count][codec.name] = Figures(sum(weight.numel() for weight in given), check(codec, given))
    for _ in range(rounds):
        for count, codec, given in runs:
            torch.set_num_threads(count)
            encode, decode = sample(codec, given, least)
            measured[count][codec.name].encode.append(encode)
            measured[count][codec.name].decode.append(decode)
    return measured


def row(name: str, measured: dict[int, dict[str, Figures]]) -> str:
    cells = []
    for part in ("encode", "decode"):
        for threads, figures in measured.items():
            found = figures.get(name)
            timed_here = found is not None and not (part == "decode" and name.startswith("DFloat11"))
            for clock in (CPU, WALL) if threads == 1 else (WALL,):
                cells.append(f"{found.speed(getattr(found, part), clock):.4g}" if found and timed_here else "-")
    first = next(figures[name] for figures in measured.values() if name in figures)
    bits = 8 * first.size / first.weights
    return f"| {name} | {100 * bits / 16:.2f} | {bits:.3f} | {' | '.join(cells)} |\n"


def faster(mine: Figures, peer: Figures, part: str, clock: int) -> float:
    """How many times as fast: the median over the rounds of the peer's time by ours, both for one weight."""
    pairs = zip(getattr(mine, part), getattr(peer, part), strict=True)
    times = float(statistics.median(theirs[clock] / own[clock] for own, theirs in pairs))
    return times * mine.weights / peer.weights


def goals(title: str, measured: dict[int, dict[str, Figures]]) -> Iterator[str]:
    """A row for each coding of ours: ratios with one thread (CPU, wall) and with more (wall), and whether all reach."""
    for name in ("df11 huffman", "df11 fixed"):
        cells = []
        for part, wanted in (("encode", 2.0), ("decode", 1.5)):
            ratios = []
            for threads, figures in measured.items():
                if name in figures and "ZipNN" in figures:
                    clocks = (CPU, WALL) if threads == 1 else (WALL,)
                    ratios += [faster(figures[name], figures["ZipNN"], part, clock) for clock in clocks]
            cells.append(verdict(ratios, least=wanted))
        one = measured.get(1) or {}
        peers = [figures for peer, figures in one.items() if peer.startswith("DFloat11") and name in one]
        cells.append(verdict([faster(one[name], peer, "encode", CPU) for peer in peers], least=100))
        sizes = [one[name].size / one["ZipNN"].size] if name in one and "ZipNN" in one else []
        cells.append(verdict(sizes, most=1))
        if any(cell != "-" for cell in cells):
            yield f"| {title} | {name} | {' | '.join(cells)} |\n"


def verdict(ratios: list[float], least: float = 0.0, most: float = math.inf) -> str:
    if not ratios:
        return "-"
    reached = all(least <= ratio <= most for ratio in ratios)
    return f"{'yes' if reached else 'no'}: {', '.join(f'{ratio:.4g}' for ratio in ratios)}"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def heading(arguments: argparse.Namespace) -> Iterator[str]:
    packages = ("torch", "numba", "zipnn", "zstandard", "dfloat11", "dahuffman")
    found = [name for name in packages if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
    shown = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    built, missing = codecs(1)
    yield f"# Lossless coding\n\n`python benchmarks/lossless.py {shlex.join(shown)}`, {date.today()}, {machine()}, "
    yield f"load {os.getloadavg()[0]:.2f} at the start,\nPython {platform.python_version()}, {versions}.\n"
    yield f"Medians of {arguments.rounds} rounds, all codecs in turn in one process"
    yield f", {'memory reused: no page faults' if arguments.keep_memory else 'memory as each library allocates it'}.\n"
    yield f"Run: {', '.join(codec.name for codec in built)}.\nNot run: {'; '.join(missing) or 'none'}.\n"
    yield "Every round trip gave the bits back. zstd decodes a frame with one thread; DFloat11's decoder needs CUDA.\n"


def report(arguments: argparse.Namespace) -> Iterator[str]:
    yield from heading(arguments)
    sets = [synthetic(shape) for shape in arguments.shape]
    if arguments.assets:
        sets += checkpoints(arguments.assets)
    clocks = [c for n in arguments.threads for c in (["1 CPU", "1 wall"] if n == 1 else [f"{n} wall"])]
    columns = [f"{part} {clock}" for part in ("encode GB/s", "decode GB/s") for clock in clocks]
    reached: list[str] = []
    for title, weights in sets:
        count = sum(weight.numel() for weight in weights)
        yield f"\n## {title}, {count / 1e6:.2f} M weights\n\n| codec | size % | bits per weight | "
        yield f"{' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}\n"
        measured = measure(weights, arguments.threads, arguments.rounds, arguments.seconds)
        for name in dict.fromkeys(name for figures in measured.values() for name in figures):
            yield row(name, measured)
        reached += goals(title, measured)
    yield f"\n## Goals\n\nTimes as fast: {', '.join(clocks)}; medians of the ratios within a round.\n\n"
    yield "| tensors | codec | encode >= 2x ZipNN | decode >= 1.5x ZipNN | encode >= 100x DFloat11 | size <= ZipNN |\n"
    yield f"|---|---|---|---|---|---|\n{''.join(reached)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(4096, 4096), (4096, 14336)]
    assets = os.environ.get("COMPRESS_ASSETS")
    parser.add_argument("--shape", type=lambda s: tuple(map(int, s.split("x"))), nargs="*", default=shapes)
    parser.add_argument("--assets", type=Path, default=assets, help="directory of the asset checkpoints")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="least time of a sample")
    parser.add_argument("--keep-memory", action="store_true", help="malloc gives nothing back: no page faults")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.keep_memory:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    lines = []
    for line in report(arguments):
        lines.append(line)
        print(line, end="", flush=True)
    if arguments.output:
        arguments.output.write_text("".join(lines))


if __name__ == "__main__":
    main()
