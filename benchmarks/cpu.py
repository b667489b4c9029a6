"""Products with packed weights on the CPU, beside what torch and bitsandbytes have for it, and tokens per second.

python benchmarks/cpu.py [--quick] [--cpu-time] [--llama] [--output FILE]

Every layout takes turns with bf16 `F.linear` in every round, with copies of its weight beyond the caches. --cpu-time
counts the time of this process on one thread, which other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import bench
from compress.formats.compiled import copied
from compress.kernels import measured, simd
from compress.kernels.linear import CompressedLinear
from compress.registry import make
from compress.scheme import Scheme

SHAPES = ((14336, 4096), (4096, 4096))
TOKENS = (1, 4, 16, 128, 1024)
RTN = {"method": "rtn"}
CASES: dict[str, Scheme] = {
    "int4, groups of 128": make("int4", RTN),
    "int4, groups of 32": make("int4", {**RTN, "group_size": 32}),
    "int4 asymmetric": make("int4", {**RTN, "symmetric": False}),
    "int2, groups of 32": make("int4", {**RTN, "bits": 2, "group_size": 32}),
    "int3": make("int4", {**RTN, "bits": 3}),
    "int5": make("int4", {**RTN, "bits": 5}),
    "int6": make("int4", {**RTN, "bits": 6}),
    "int8, groups of 128": make("int8"),
    "bfp, 4 bits": make("bfp", RTN),
    **{f"kmeans, {bits} bits": make("kmeans", {**RTN, "bits": bits}) for bits in (2, 3, 4, 5, 6, 8)},
    "nf4": make("nf4"),
    "mxfp4": make("mxfp4", RTN),
    "nvfp4": make("nvfp4", RTN),
    "fp8": make("fp8"),
    "mxfp8": make("mxfp8", RTN),
    "df11 fixed": make("df11", {"coding": "fixed"}),
    "df11 huffman": make("df11"),
    "bitstack, 2 blocks": make("bitstack", {"blocks": 2, "scaling": "none"}),
    "bitstack, 8 blocks": make("bitstack", {"scaling": "none"}),
}
QUICK = ("int4, groups of 128", "int8, groups of 128", "bfp, 4 bits", "kmeans, 4 bits", "fp8", "df11 fixed")
QUICK += ("bitstack, 2 blocks",)
READ_BYTES = 1 << 29
Calls = dict[str, Iterator[Callable[..., Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few layouts, one shape, up to 16 tokens")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and the time of this process")
    parser.add_argument("--llama", action="store_true", help="also tokens per second of a random 1.1B Llama")
    parser.add_argument("--output", type=Path, help="also write what is printed here")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    lines = head(arguments.cpu_time, clock)
    names = QUICK if arguments.quick else tuple(CASES)
    for shape in SHAPES[: 1 if arguments.quick else None]:
        lines += table(shape, TOKENS[: 3 if arguments.quick else None], names, clock)
        print("\n".join(lines), flush=True)
    if arguments.llama:
        lines += llama(clock)
        print("\n".join(lines[-6:]))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def head(cpu_time: bool, clock: Callable[[], float]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numba", "bitsandbytes"))
    form = f"vectors of {16 * simd.lanes()} bits"
    metric = "time of the process, 1 thread" if cpu_time else f"{torch.get_num_threads()} threads"
    return [
        "# Products on the CPU",
        "",
        f"{time.strftime('%Y-%m-%d')}, {measured.processor()}, {form}, {metric}; {versions}.",
        f"Reading memory: {read_speed(clock) / 1e9:.1f} GB/s. `benchmarks/cpu.py` says how it is measured.",
        "Each cell: times the speed of bf16 `F.linear` for as many tokens; GB/s: of the packed weight, at 1 token.",
        "",
    ]


def read_speed(clock: Callable[[], float]) -> float:
    """Bytes a second that all threads read, at the best."""
    data, found = torch.from_numpy(np.ones(READ_BYTES // 8)), []
    for _ in range(8):
        begin = clock()
        data.sum()
        found.append(clock() - begin)
    return READ_BYTES / min(found)


def table(shape: tuple[int, int], tokens: tuple[int, ...], names: tuple[str, ...], clock: Any) -> list[str]:
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    calls: Calls = {"bf16 `F.linear`": held(weight, lambda x, w: F.linear(x, w))}
    bits = {"bf16 `F.linear`": 16.0, "torch int4pack, groups of 64": 4.5, "torch int8pack": 8.0}
    bits |= {"torch dynamic int8": 8.0, "bitsandbytes nf4": 4.5}
    calls |= peers(weight)
    for name in names:
        calls[name], bits[name] = bench.candidate(CASES[name], weight, "cpu")
    seconds: dict[str, dict[int, float]] = {name: {} for name in calls}
    for count in tokens:
        x = torch.randn(count, shape[1]).bfloat16()
        for name, found in bench.time_all(calls, x, clock).items():
            seconds[name][count] = found
    base = seconds["bf16 `F.linear`"]
    lines = [
        f"## {shape[0]}x{shape[1]}",
        "",
        "| layout | bits | ms, 1 token | GB/s |" + "".join(f" {m} |" for m in tokens),
    ]
    lines.append("|---|--:|--:|--:|" + "--:|" * len(tokens))
    for name, times in seconds.items():
        speed = bits[name] * weight.numel() / 8 / times[1] / 1e9
        ratios = "".join(f" {base[m] / times[m]:.2f} |" for m in tokens)
        lines.append(f"| {name} | {bits[name]:.2f} | {1e3 * times[1]:.2f} | {speed:.1f} |{ratios}")
    return [*lines, ""]


def held(weight: Any, multiply: Callable[[Tensor, Any], Any]) -> Iterator[Callable[..., Any]]:
    copies = [copy["weight"] for copy in bench.copies({"weight": weight}, "cpu")]
    return cycle([lambda x, w=w: multiply(x, w) for w in copies])


def peers(weight: Tensor) -> Calls:
    """What torch and bitsandbytes multiply with on the CPU; none is compressed well, which takes no other time."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    steps = torch.rand(columns // 64, rows, 2).bfloat16()
    int8, scales = torch.randint(-127, 127, (rows, columns), dtype=torch.int8), torch.rand(rows).bfloat16()
    calls: Calls = {
        "torch int4pack, groups of 64": held(
            int4, lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 64, steps)
        ),
        "torch int8pack": held(int8, lambda x, w: torch.ops.aten._weight_int8pack_mm(x, w, scales)),
    }
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    model[0].weight.data = weight.float()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    calls["torch dynamic int8"] = cycle([lambda x: quantized(x.float()).bfloat16()])
    layers = [nf4_layer(weight) for _ in range(max(1, bench.CACHED_BYTES * 4 // weight.nbytes))]
    return {**calls, "bitsandbytes nf4": cycle([lambda x, f=layer: f(x) for layer in layers])}


def nf4_layer(weight: Tensor) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], weight.shape[0], False, torch.bfloat16, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64, module=layer)
    return layer.to("cpu").eval()


def llama(clock: Callable[[], float], new: int = 8) -> list[str]:
    """Tokens per second of a random Llama of TinyLlama's shape, one sequence, greedily."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32)
    config.num_key_value_heads, config.vocab_size = 4, 32000
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    lines = ["## Decoding with a 1.1B Llama", "", "| linears | tokens per second |", "|---|--:|"]
    originals = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ways: dict[str, Callable[[nn.Linear], nn.Module]] = {"bf16": lambda linear: linear}
    ways["bitsandbytes nf4"] = lambda linear: nf4_layer(linear.weight.data)
    for name in ("int4, groups of 128", "int8, groups of 128", "kmeans, 4 bits", "bfp, 4 bits", "fp8", "df11 fixed"):
        ways[f"compress {name}"] = lambda linear, scheme=CASES[name]: packed(scheme, linear)
    for name, made in ways.items():
        for path, linear in originals.items():
            if path != "lm_head":
                model.set_submodule(path, made(linear))
        lines.append(f"| {name} | {generating(model, new, clock):.2f} |")
    return [*lines, ""]


def packed(scheme: Scheme, linear: nn.Linear) -> nn.Module:
    """With the tensors of another weight of this shape: what they are takes no other time."""
    shape = (linear.out_features, linear.in_features)
    held = {name: copied(tensor, "cpu") for name, tensor in encoded(scheme, shape).items()}  # as loading lays them out
    return CompressedLinear(scheme.fit(shape), shape, held)


@cache
def encoded(scheme: Scheme, shape: tuple[int, int]) -> dict[str, Tensor]:
    return scheme.fit(shape).encode((torch.randn(shape) * 0.02).bfloat16())


@torch.inference_mode()
def generating(model: Any, new: int, clock: Callable[[], float]) -> float:
    prompt, found = torch.arange(1, 9)[None], []
    how = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    for _ in range(2):
        begin = clock()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        found.append(clock() - begin)
    return new / min(found)


if __name__ == "__main__":
    main()
