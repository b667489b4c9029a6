"""What is fastest on this machine, measured once: for how many tokens, and in which dtype.

Kept in `speed.json` of the folder of caches (`formats.files.cache_folder`), by processor, threads, versions and layout.
A measurement takes a part of a second. What it decides changes results by rounding alone.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats.files import cache_folder, write_text
from compress.kernels import simd

SIZES = (16, 64, 256, 1024)  # tokens that torch's product is timed with
TIMED = (1, 4, 16, 64)  # that ours is timed with
WORTH = 0.05  # torch waits for all threads at the end of a product, which the time of the process does not show
SHAPE = (512, 1024)  # of the weight that it is timed with
MANY = 1 << 30
ROUNDS = 5
LONG = 0.02  # seconds
_clock = time.process_time if time.get_clock_info("process_time").resolution < 1e-5 else time.perf_counter
_LOCK = threading.RLock()  # measuring one thing may ask for another


def most_tokens(
    layout: str,
    shape: tuple[int, int],
    product: Callable[[Tensor], Any],
    dense: Callable[[Tensor], Any],
    timed: tuple[int, ...] = TIMED,
) -> int:
    """Up to how many tokens `dense` does not save a part of the time that `product` takes, WORTH: 0 where it does for a
    single one."""

    def measure() -> int:
        inputs = [torch.ones(tokens, shape[1]).bfloat16() for tokens in timed]
        found = _seconds(*(partial(way, x) for way in (product, dense) for x in inputs))
        saved = [a * (1 - WORTH) - b for a, b in zip(found[: len(timed)], found[len(timed) :], strict=True)]
        return next((tokens - 1 for tokens in range(1, SIZES[-1] + 1) if _between(timed, saved, tokens) > 0), MANY)

    size = f"2**{(shape[0] * shape[1]).bit_length()} weights, {', '.join(map(str, timed))} tokens"
    return int(_remembered(f"{layout}, {size}", measure))


def _between(timed: tuple[int, ...], found: list[float], tokens: int) -> float:
    """What there would be for so many tokens, of what was found for those that were timed; for fewer, the first."""
    tokens = max(tokens, timed[0])
    last = next((i for i, size in enumerate(timed[1:-1], 1) if tokens <= size), len(timed) - 1)
    (few, more), (low, high) = timed[last - 1 : last + 1], found[last - 1 : last + 1]
    return low + (high - low) * (tokens - few) / (more - few)


def is_wider_faster(dtype: torch.dtype, tokens: int) -> bool:
    """Whether torch multiplies so many tokens with a weight faster when both are converted to float32 first."""
    narrow, wide = _torch_seconds(dtype, min(SIZES, key=lambda size: abs(size - tokens)))
    return wide < narrow


def _torch_seconds(dtype: torch.dtype, tokens: int) -> tuple[float, float]:
    """For each number of a weight, as it is and converted to float32."""

    def measure() -> list[float]:
        weight, x = torch.ones(SHAPE, dtype=dtype), torch.ones(tokens, SHAPE[1], dtype=dtype)
        found = _seconds(lambda: F.linear(x, weight), lambda: F.linear(x.float(), weight.float()))
        return [seconds / weight.numel() for seconds in found]

    narrow, wide = _remembered(f"torch {str(dtype).removeprefix('torch.')} {tokens}", measure)
    return narrow, wide


def _seconds(*functions: Callable[[], Any]) -> list[float]:
    """The median of each, which take turns; of all threads, where that is known: to wait for a core does not count."""
    found: list[list[float]] = [[] for _ in functions]
    with torch.no_grad():
        counts = [_calls(function) for function in functions]
        for _ in range(ROUNDS):
            for function, count, times in zip(functions, counts, found, strict=True):
                begin = _clock()
                for _ in range(count):
                    function()
                times.append((_clock() - begin) / count)
    return [statistics.median(times) for times in found]


def _calls(function: Callable[[], Any]) -> int:
    """How many of it are timed together: the system counts what other threads take every 4 ms or less often."""
    function()  # compiles
    begin = time.perf_counter()
    function()
    return max(1, round(LONG / max(1e-6, time.perf_counter() - begin)))


def _remembered(name: str, measure: Callable[[], Any]) -> Any:
    """What was measured under that name on this machine, perhaps long ago."""
    with _LOCK:
        known = _known(_machine())
        if name not in known:
            known[name] = measure()
            _keep(_machine(), known)
        return known[name]


@cache
def _known(machine: str) -> dict[str, Any]:
    return {name: value for name, value in _stored().get(machine, {}).items() if _is_measured(value)}


def _keep(machine: str, known: dict[str, Any]) -> None:
    """Adds what is known to what this and other processes have stored."""
    everything, path = _stored(), cache_folder() / "speed.json"
    everything[machine] = {**everything.get(machine, {}), **known}
    with contextlib.suppress(OSError):  # then it is measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(everything, indent=1) + "\n")


def _stored() -> dict[str, dict[str, Any]]:
    """What the file holds, by machine; nothing of what is damaged."""
    found = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((cache_folder() / "speed.json").read_text())
    entries = found.items() if isinstance(found, dict) else ()
    return {machine: known for machine, known in entries if isinstance(known, dict)}


def _is_measured(value: Any) -> bool:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(isinstance(number, int | float) for number in numbers)


def _machine() -> str:
    known = f"{processor()}, vectors of {16 * simd.lanes()} bits"  # some processors have a family's name
    return f"{known}, {torch.get_num_threads()} threads, torch {torch.__version__}, numba {numba.__version__}"


@cache
def processor() -> str:
    """What this machine calls its processor."""
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as lines:
            found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if found:
            return found[0]
    return platform.processor() or platform.machine()
