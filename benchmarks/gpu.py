"""Checks and times every scheme's linear on a GPU, unattended and without a network.

    python benchmarks/gpu.py [--device cuda] [--json FILE]

Each scheme's `linear` on the device is compared with its `decode` on the CPU in float64; then it is timed beside
`F.linear` in bf16 in the same round-robin, over copies of the weight that together exceed the L2 cache. Until fused
kernels exist this measures decode-then-multiply, the cost that they have to beat.
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
        got = fitted.linear(x.to(device), {name: tensor.to(device) for name, tensor in tensors.items()})
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


def candidates(shape: tuple[int, int], device: str) -> dict[str, Any]:
    """name -> endless copies of a function of x, for bf16 and for every scheme."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def copies(tensors: dict[str, Tensor], call: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Any:
        size = sum(tensor.nbytes for tensor in tensors.values())
        count = 1 if device == "cpu" else max(1, CACHE_BYTES // size)
        held = [{name: tensor.to(device, copy=True) for name, tensor in tensors.items()} for _ in range(count)]
        return cycle([lambda x, t=tensors: call(x, t) for tensors in held])

    found = {"bf16": copies({"weight": weight}, lambda x, t: F.linear(x, t["weight"]))}
    for name in SCHEMES:
        scheme = make(name).fit(shape)
        found[name] = copies(scheme.encode(weight), scheme.linear)
    return found


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
    errors = {scheme: check(make(scheme), device) for scheme in SCHEMES}
    for scheme, error in errors.items():
        print(f"{scheme}: relative error {error:.1e} of linear against decode in float64")
        assert error < 2**-7, f"{scheme} computes something else on {device}"  # bf16 in and out
    print("\n| out x in | tokens | scheme | us | times bf16 |\n|---|--:|---|--:|--:|")
    rows = []
    for shape in SHAPES[: 1 if arguments.quick else None]:
        found = candidates(shape, device)
        for tokens in TOKENS:
            times = measure(shape, tokens, device, found)
            for scheme, us in times.items():
                speed = times["bf16"] / us
                rows.append({"shape": shape, "tokens": tokens, "scheme": scheme, "us": us, "speed": speed})
                print(f"| {shape[0]}x{shape[1]} | {tokens} | {scheme} | {us:.1f} | {speed:.2f} |", flush=True)
        del found
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": name, "errors": errors, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
