"""Checks and times every scheme's linear on a GPU, unattended and without a network.

    python benchmarks/gpu.py [--device cuda] [--json FILE]

Each scheme's `linear` on the device is compared with its `decode` on the CPU in float64, and its `decode` there bit by
bit; then it is timed beside `F.linear` in bf16 in the same round-robin, over copies of the weight that together exceed
the L2 cache. df11 with coding=fixed multiplies as it reads; the others still decode and then multiply, the cost that
fused kernels have to beat. A second table has the speed of decoding alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.registry import SCHEMES, make

CASES = {name: make(name) for name in SCHEMES} | {"df11 fixed": make("df11", {"coding": "fixed"})}
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
TOKENS = (1, 16, 256)
ROUNDS, CACHE_BYTES = 7, 512 << 20


def check(scheme: Any, device: str) -> float:
    """Largest relative error of `linear` over awkward shapes."""
    worst = 0.0
    for rows, columns in ((1, 32), (33, 96), (130, 257), (256, 512)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        fitted = scheme.fit((rows, columns))
        tensors = fitted.encode(weight)
        x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
        want = x.double() @ fitted.decode(tensors).double().T
        running = fitted.prepare({name: tensor.to(device) for name, tensor in tensors.items()})
        got = fitted.linear(x.to(device), running)
        assert torch.equal(fitted.decode(running).cpu(), fitted.decode(tensors)), f"{scheme}: decodes otherwise"
        worst = max(worst, ((got.cpu().double() - want).norm() / want.norm()).item())
    return worst


def timed(function: Callable[[], Tensor], device: str) -> float:
    """Microseconds of one call."""
    if device == "cpu":
        started = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end)


def copies(tensors: dict[str, Tensor], prepare: Callable[[dict[str, Tensor]], Any], device: str) -> list[Any]:
    """Prepared copies on the device, together larger than its cache."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    count = 1 if device == "cpu" else max(1, CACHE_BYTES // size)
    return [prepare({name: tensor.to(device, copy=True) for name, tensor in tensors.items()}) for _ in range(count)]


def candidates(shape: tuple[int, int], device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """name -> endless functions of x that multiply, for bf16 and every case; and the same of functions that decode."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    dense = copies({"weight": weight}, lambda tensors: tensors["weight"], device)
    multiply = {"bf16": cycle([lambda x, w=w: F.linear(x, w) for w in dense])}
    decode = {"bf16 copy": cycle([lambda _, w=w: w.clone() for w in dense])}
    for name, case in CASES.items():
        scheme = case.fit(shape)
        held = copies(scheme.encode(weight), scheme.prepare, device)
        multiply[name] = cycle([lambda x, t=t, s=scheme: s.linear(x, t) for t in held])
        decode[name] = cycle([lambda _, t=t, s=scheme: s.decode(t) for t in held])
    return multiply, decode


def measure(shape: tuple[int, int], tokens: int, device: str, found: dict[str, Any]) -> dict[str, float]:
    """name -> median microseconds, all candidates in turn in every round."""
    x = torch.randn(tokens, shape[1]).bfloat16().to(device)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(ROUNDS + 1):
        for name, calls in found.items():
            call = next(calls)
            times[name].append(timed(lambda call=call: call(x), device))  # type: ignore[misc]
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    arguments = parser.parse_args()
    device = arguments.device
    name = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    errors = {name: check(scheme, device) for name, scheme in CASES.items()}
    for scheme, error in errors.items():
        print(f"{scheme}: relative error {error:.1e} of linear against decode in float64")
        assert error < 2**-7, f"{scheme} computes something else on {device}"  # bf16 in and out
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[: 1 if arguments.quick else None]:
        multiply, decode = candidates(shape, device)
        for tokens in TOKENS:
            times = measure(shape, tokens, device, multiply)
            rows += [{"shape": shape, "tokens": tokens, "scheme": n, "us": us} for n, us in times.items()]
        written = 2 * shape[0] * shape[1]  # bytes of bf16
        times = measure(shape, 1, device, decode)
        rows += [{"shape": shape, "scheme": n, "us": us, "gb_s": written / us / 1e3} for n, us in times.items()]
        del multiply, decode
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": name, "errors": errors, "rows": rows}, indent=1))


def show(rows: list[dict[str, Any]]) -> None:
    print("\n| out x in | tokens | scheme | us | times bf16 |\n|---|--:|---|--:|--:|")
    for row in rows:
        if "tokens" in row:
            same = (r for r in rows if r["shape"] == row["shape"] and r.get("tokens") == row["tokens"])
            speed = next(r["us"] for r in same if r["scheme"] == "bf16") / row["us"]
            shape = "x".join(map(str, row["shape"]))
            print(f"| {shape} | {row['tokens']} | {row['scheme']} | {row['us']:.1f} | {speed:.2f} |")
    print("\n| out x in | decoding | us | GB/s of bf16 written |\n|---|---|--:|--:|")
    for row in rows:
        if "gb_s" in row:
            print(f"| {'x'.join(map(str, row['shape']))} | {row['scheme']} | {row['us']:.1f} | {row['gb_s']:.0f} |")


if __name__ == "__main__":
    main()
