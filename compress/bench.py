"""How fast each scheme's products are on this machine, beside the uncompressed one; on random weights, without a model.

All schemes take turns in every round, and each has so many copies of its weight that none is still in a cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from compress.devices import check_device
from compress.formats.compiled import copied
from compress.kernels import measured
from compress.progress import Progress
from compress.registry import SCHEMES, make, options
from compress.scheme import Scheme, Spec

SHAPE = (4096, 4096)
TOKENS = (1, 16, 256)
CACHED_BYTES = 1 << 27  # of weights: more than the caches of a CPU or a GPU hold
MOST_COPIES = 24
MOST_BYTES = 1 << 30  # of the uncompressed weight
ROUND_SECONDS = 0.03  # that one measurement takes at least, by repeating what is quick
ROUNDS = 5
MOST_SECONDS = 12.0  # for one number of tokens, after which no other round begins
SLOWER = 0.97  # of the uncompressed speed: what is below is said to save memory only
UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True)
class Line:
    """One scheme. seconds, speedup: of one product, and how many times the uncompressed speed, by number of tokens."""

    name: str
    bits_per_weight: float
    seconds: dict[int, float]
    speedup: dict[int, float]

    @property
    def slower(self) -> list[int]:
        """Numbers of tokens for which it is slower than the uncompressed product."""
        return [tokens for tokens, ratio in self.speedup.items() if ratio < SLOWER]


@dataclass(frozen=True)
class Bench:
    """What was measured, and on what."""

    device: str
    processor: str
    threads: int
    torch: str
    dtype: str
    shape: tuple[int, int]
    lines: list[Line]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def warnings(self) -> list[str]:
        """A sentence for each scheme that saves memory, and no time."""
        said = []
        for line in self.lines:
            if line.slower:
                noun = "token" if line.slower == [1] else "tokens"
                when = "always" if len(line.slower) == len(line.speedup) else f"at {_listed(line.slower)} {noun}"
                said.append(f"{line.name} saves memory only: {when} it is slower than the uncompressed product here")
        return said


def bench(
    device: str | None = None,
    shape: tuple[int, int] = SHAPE,
    tokens: tuple[int, ...] = TOKENS,
    schemes: Mapping[str, Scheme] | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Times x @ W.T in bfloat16 for a W of `shape`, (out_features, in_features), with each scheme at its defaults.

    device: cuda where there is one, else cpu. schemes: by the name of their line; default one line for each scheme.
    Left out are those that do not take a weight of this shape. Raises ValueError for one of more than a GiB.
    """
    if 2 * shape[0] * shape[1] > MOST_BYTES:
        raise ValueError(f"shape {shape[0]}x{shape[1]} takes more than a GiB uncompressed; give a smaller one")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    dense = copies({"weight": weight}, device)
    calls: dict[str, Iterator[Callable[..., Any]]] = {}
    calls[UNCOMPRESSED] = cycle([lambda x, w=held["weight"]: F.linear(x, w) for held in dense])
    spec = Spec(torch.bfloat16, shape)
    bits, chosen = {UNCOMPRESSED: 16.0}, {n: s for n, s in (schemes or defaults()).items() if s.takes(spec)}
    for done, (name, scheme) in enumerate(chosen.items()):
        if progress:
            progress("encoding", done, len(chosen), name)
        calls[name], bits[name] = candidate(scheme, weight, device)
    seconds = {name: dict[int, float]() for name in calls}
    for done, count in enumerate(tokens):
        if progress:
            progress("measuring", done, len(tokens), f"{count} tokens")
        x = torch.randn(count, shape[1]).bfloat16().to(device)
        for name, found in time_all(calls, x).items():
            seconds[name][count] = found
    base = seconds[UNCOMPRESSED]
    lines = [Line(n, bits[n], s, {count: base[count] / s[count] for count in tokens}) for n, s in seconds.items()]
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else measured.processor()
    return Bench(device, place, torch.get_num_threads(), torch.__version__, "bfloat16", shape, lines)


def defaults() -> dict[str, Scheme]:
    """A line for each scheme with its default options, methods aside that need data: these change no product."""
    named = {name: _data_free(name) for name in SCHEMES}
    named["df11 fixed"] = _data_free("df11", coding="fixed")
    named["bitstack, 2 blocks"] = _data_free("bitstack", blocks=2)
    return named


def candidate(scheme: Scheme, weight: torch.Tensor, device: str) -> tuple[Iterator[Callable[..., Any]], float]:
    """Endless functions of x that multiply with copies of a weight, and its bits per weight."""
    fitted = scheme.fit((weight.shape[0], weight.shape[1])).for_dtype(weight.dtype)
    tensors = fitted.encode(weight)
    held = [fitted.prepare(copy) for copy in copies(tensors, device)]
    token = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=device)
    with torch.inference_mode():
        for prepared in held:  # what a weight is multiplied with may be made by the first product
            fitted.linear(token, prepared)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return cycle([lambda x, t=t: fitted.linear(x, t) for t in held]), 8 * size / weight.numel()


@torch.inference_mode()
def time_all(
    calls: Mapping[str, Iterator[Callable[..., Any]]], x: torch.Tensor, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """name -> median seconds of a call, all in turn in every round."""
    repeats, begin = {}, time.perf_counter()
    for name, functions in calls.items():
        _timed(functions, x, 1, clock)  # compiles, and measures what is faster
        repeats[name] = max(1, round(ROUND_SECONDS / max(1e-9, _timed(functions, x, 1, clock))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        if number and time.perf_counter() - begin > MOST_SECONDS:
            break
        for name, functions in calls.items():
            found[name].append(_timed(functions, x, repeats[name], clock))
    return {name: statistics.median(times) for name, times in found.items()}


def _timed(functions: Iterator[Callable[..., Any]], x: torch.Tensor, count: int, clock: Callable[[], float]) -> float:
    """Seconds of each of so many calls."""
    _wait(x)
    begin = clock()
    for _ in range(count):
        next(functions)(x)
    _wait(x)
    return (clock() - begin) / count


def _wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def copies(tensors: dict[str, torch.Tensor], device: str) -> list[dict[str, torch.Tensor]]:
    size = sum(tensor.nbytes for tensor in tensors.values())
    count = min(MOST_COPIES, -(-CACHED_BYTES // max(1, size)))
    return [{name: copied(tensor, device) for name, tensor in tensors.items()} for _ in range(count)]


def _data_free(name: str, **given: Any) -> Scheme:
    known = {option["name"]: option["choices"] or () for option in options(name)}
    if "rtn" in known.get("method", ()):
        given["method"] = "rtn"
    return make(name, given)


def _listed(numbers: list[int]) -> str:
    return " and ".join(", ".join(map(str, numbers)).rsplit(", ", 1))
