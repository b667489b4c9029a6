"""Encoding speed and error of data-free schemes beside HQQ, bitsandbytes nf4 and Q4_0, on the same tensors.

    python benchmarks/encode.py --shape 4096x14336 --peers -o benchmarks/results/encode.md

Speed is GB of bf16 input a second: one thread in process time, then `--threads` in wall time; medians. Error is
sqrt(sum (w - w^)**2 / sum w**2). Bits per weight are those stored, scales and zeros included.
"""

import argparse
import ctypes
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.bfp import Bfp
from compress.formats.bitpack import unpack
from compress.formats.float8 import E4M3_MAX, absmax, to_e4m3
from compress.rtn import quantize


@dataclass(frozen=True)
class Method:
    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any, Tensor], Tensor]
    bits: Callable[[Tensor], float]  # stored per weight
    repeats: int = 5


def rtn(name: str, group_size: int, symmetric: bool, clip: str, bits: int = 4) -> Method:
    def decode(grid: Any, weight: Tensor) -> Tensor:
        codes = unpack(grid.packed, bits, weight.shape[1]).float().view(*grid.scales.shape, group_size)
        zeros = 2 ** (bits - 1) if grid.zeros is None else grid.zeros.float()[..., None]
        return ((codes - zeros) * grid.scales.float()[..., None]).bfloat16().view(weight.shape)

    stored = bits + (16 + (0 if symmetric else bits)) / group_size
    return Method(name, lambda w: quantize(w, bits, group_size, symmetric, clip), decode, lambda w: stored)


def fp8(name: str, block: Callable[[Tensor], tuple[int, int]]) -> Method:
    def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = (absmax(weight, *block(weight)) / E4M3_MAX).bfloat16().float().clamp(min=2.0**-126)
        return to_e4m3(weight, scales, block(weight)), scales

    def decode(stored: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        height, width = block(weight)
        scales = stored[1].repeat_interleave(height, 0)[: weight.shape[0]].repeat_interleave(width, 1)
        return stored[0].float() * scales[:, : weight.shape[1]]

    return Method(name, encode, decode, lambda w: 8 + 16 * absmax(w, *block(w)).numel() / w.numel())


def bfp(name: str, **options: Any) -> Method:
    scheme = Bfp(**options)
    stored = scheme.mantissa_bits + 8 / scheme.block_size
    return Method(name, scheme.encode, lambda tensors, w: scheme.decode(tensors), lambda w: stored)


def ours() -> list[Method]:
    return [
        rtn("int4 sym g128 absmax", 128, True, "absmax"),
        rtn("int4 sym g128 mse", 128, True, "mse"),
        rtn("int4 sym g32 mse", 32, True, "mse"),
        rtn("int4 asym g64 mse", 64, False, "mse"),
        fp8("fp8 tensor", lambda w: (w.shape[0], w.shape[1])),
        fp8("fp8 channel", lambda w: (1, w.shape[1])),
        fp8("fp8 block 128x128", lambda w: (128, 128)),
        bfp("bfp 4 bits b32, no search", search=False),
        bfp("bfp 4 bits b32"),
        bfp("bfp 5 bits b32", mantissa_bits=5),
        bfp("bfp 8 bits b32", mantissa_bits=8),
    ]


def hqq(optimize: bool) -> Method:
    from hqq.core.quantize import Quantizer

    def encode(weight: Tensor) -> Any:
        return Quantizer.quantize(
            weight, nbits=4, group_size=64, axis=1, optimize=optimize, device="cpu", compute_dtype=torch.bfloat16
        )

    name = f"HQQ g64 {'optimized' if optimize else 'not optimized'}"
    return Method(name, encode, lambda q, w: Quantizer.dequantize(*q), lambda w: 4.5, 1 if optimize else 3)


def nf4() -> Method:
    from bitsandbytes import functional

    def encode(weight: Tensor) -> Any:
        return functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    return Method("bitsandbytes nf4 b64", encode, lambda q, w: functional.dequantize_4bit(*q), lambda w: 4.5, 3)


def gguf() -> Method:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q4_0
    return Method(
        "gguf (Python) Q4_0",
        lambda w: quants.quantize(w.float().numpy(), kind),
        lambda q, w: torch.from_numpy(quants.dequantize(q, kind)),
        lambda w: 4.5,
        3,
    )


def ggml(library: str) -> Method:
    """ggml's C encoder, one row at a time from bf16 through a reused float32 row; it starts no threads."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    lib = ctypes.CDLL(library)

    def encode(weight: Tensor) -> Any:
        rows, cols = weight.shape
        line, codes = np.empty(cols, np.float32), np.empty((rows, cols // 32 * 18), np.uint8)
        floats, count = ctypes.c_void_p(line.ctypes.data), ctypes.c_int64(cols)
        for row in range(rows):
            source = ctypes.c_void_p(weight.data_ptr() + row * cols * weight.element_size())
            lib.ggml_bf16_to_fp32_row(source, floats, count)
            lib.quantize_row_q4_0_ref(floats, ctypes.c_void_p(codes.ctypes.data + row * codes.shape[1]), count)
        return codes

    def decode(codes: Any, weight: Tensor) -> Tensor:
        return torch.from_numpy(quants.dequantize(codes, GGMLQuantizationType.Q4_0))

    return Method("ggml (C) Q4_0", encode, decode, lambda w: 4.5)


def weights(shape: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """A Gaussian with eight outlier columns, then the real tensors of $COMPRESS_ASSETS."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[:, torch.randperm(shape[1], generator=generator)[:8]] *= 10
    yield f"synthetic {shape[0]}x{shape[1]}", weight.bfloat16()
    root = Path(os.environ.get("COMPRESS_ASSETS", ""), "weights") if "COMPRESS_ASSETS" in os.environ else None
    for path in sorted(root.rglob("layers*.bf16.safetensors")) if root else []:
        with safe_open(path, "pt") as file:
            parts = [file.get_tensor(name) for name in sorted(file.keys())]
        joined = torch.cat([part for part in parts if part.ndim == 2 and part.shape[1] == 768])
        yield f"{path.parent.name}, {joined.shape[0]}x{joined.shape[1]}", joined


def seconds(method: Method, weight: Tensor, threads: int) -> float:
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    taken = []
    for _ in range(method.repeats):
        start = clock()
        method.encode(weight)
        taken.append(clock() - start)
    return statistics.median(taken)


def row(method: Method, weight: Tensor, threads: int) -> str:
    error = (method.decode(method.encode(weight), weight).double() - weight.double()).norm() / weight.double().norm()
    size_gb = weight.numel() * 2 / 1e9
    speeds = [size_gb / seconds(method, weight, count) for count in (1, threads)]
    return f"| {method.name} | {speeds[0]:.3f} | {speeds[1]:.3f} | {error:.4f} | {method.bits(weight):.3f} |"


def report(arguments: argparse.Namespace) -> Iterator[str]:
    methods = ours()
    if arguments.peers:
        methods += [gguf(), nf4(), hqq(False), hqq(True)]
    if arguments.ggml:
        methods.append(ggml(arguments.ggml))
    packages = ["torch", "numba", *(["hqq", "bitsandbytes", "gguf"] if arguments.peers else [])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    shown = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    yield f"# Encoding speed\n\n`python benchmarks/encode.py {shlex.join(shown)}`, {date.today()}, "
    yield f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores.\n"
    for name, weight in weights(arguments.shape):
        yield f"\n## {name}\n\n| method | GB/s, 1 thread (process time) | GB/s, {arguments.threads} threads (wall) "
        yield "| relative error | bits per weight |\n|---|---|---|---|---|\n"
        for method in methods:
            yield row(method, weight, arguments.threads) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=lambda s: tuple(map(int, s.split("x"))), default=(4096, 14336))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="also time the peers")
    parser.add_argument("--ggml", help="path of a built libggml-base, to time its C encoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    lines = []
    for line in report(arguments):
        lines.append(line)
        print(line, end="", flush=True)
    if arguments.output:
        arguments.output.write_text("".join(lines))


if __name__ == "__main__":
    main()
