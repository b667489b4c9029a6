"""Checks and times every scheme's linear on a GPU, unattended, without a network, in less than eight minutes.

    python benchmarks/gpu.py [--device cuda] [--json FILE] [--seconds 450] [--small]

First each scheme's `linear` and `decode` on the device are compared with its `decode` on the CPU in float64, and a
token's decoding by a Llama as a CUDA graph with the same without one. Then each is timed beside `F.linear` in bf16,
and beside bitsandbytes, torch's own int4 kernel and gemlite where they can be imported: all in turn in every round,
medians, CUDA graphs with one call for each of so many copies of the weight that together they exceed the L2 cache. The
roofline is the time that reading weight and x and writing y takes at the speed of a copy, measured in the same run.
Last, tokens per second of a randomly initialised Llama of 1.1 B parameters, one decoding step as a CUDA graph. What
fails is reported in its place, and the others go on.

Weights that take long to encode are not encoded: their tensors are random bits of the shapes that the scheme stores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.linear import CompressedLinear
from compress.kernels.op import Packed
from compress.registry import make
from compress.scheme import Spec

SCHEMES = {
    "int4": make("int4", {"method": "rtn"}),
    "int4 zeros": make("int4", {"method": "rtn", "symmetric": False}),
    "int2": make("int4", {"method": "rtn", "bits": 2}),
    "int3": make("int4", {"method": "rtn", "bits": 3}),
    "int8": make("int8"),
    "fp8": make("fp8"),
    "mxfp4": make("mxfp4"),
    "nvfp4": make("nvfp4"),
    "mxfp8": make("mxfp8"),
    "nf4": make("nf4"),
    "kmeans 4": make("kmeans", {"bits": 4}),
    "bfp 4": make("bfp", {"method": "rtn", "reorder": False}),
    "bitstack 2": make("bitstack", {"blocks": 2}),
    "df11 fixed": make("df11", {"coding": "fixed"}),
    "df11 huffman": make("df11"),
}
SHAPES = ((8192, 28672), (4096, 14336), (14336, 4096), (4096, 4096))
TOKENS = (1, 4, 16, 64, 256, 1024)
_BF16 = torch.bfloat16
CHECKED: tuple[tuple[tuple[int, int], torch.dtype, tuple[int, ...]], ...] = (
    ((1, 32), _BF16, (1,)),
    ((33, 96), _BF16, (1, 3)),
    ((130, 257), _BF16, (1, 17, 65)),
    ((512, 4096), _BF16, (1, 16, 65, 200, 300)),  # of which columns are split among programs
    ((130, 288), torch.float16, (2,)),
    ((130, 288), torch.float32, (2,)),
)
ROUNDS, CACHE_BYTES = 5, 256 << 20
LLAMA = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 512}
BATCHES, CONTEXT = (1, 16), 64

Row = dict[str, Any]


def message(error: BaseException) -> str:
    """With what it came after: of a graph that could not be captured, torch raises last what says least."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return said if error.__context__ is None else f"{said}; after {message(error.__context__)}"


def together(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """function of each item, or the exception that it raised: in threads, because Triton compiles without Python."""

    def tried(item: Any) -> Any:
        try:
            with torch.no_grad():
                return function(item)
        except Exception as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(tried, items))


def lost(device: str) -> bool:
    """Whether the device answers nothing any more, as after an address that is not there."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def captured(function: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of what function does, and what it returned, which every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # where torch wants the first run to be
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails leaves its own stream behind
        with torch.cuda.graph(graph):
            found = function()
    return graph, found


# What is checked ------------------------------------------------------------------------------------------------------


def check(scheme: Any, device: str) -> Row:
    """Largest relative error of `linear` over shapes, dtypes and numbers of tokens, and whether decode is exact.

    Few of each with each other: every combination is compiled anew.
    """
    worst, exact, fused = 0.0, True, False
    for (rows, columns), dtype, all_tokens in CHECKED:
        if not scheme.takes(Spec(dtype, (rows, columns))):
            continue
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        fitted = scheme.fit((rows, columns)).for_dtype(dtype)
        tensors = fitted.encode(weight)
        running = fitted.prepare({name: tensor.to(device) for name, tensor in tensors.items()})
        decoded = fitted.decode(tensors)
        exact = exact and torch.equal(fitted.decode(running).cpu(), decoded)
        fused = fused or isinstance(running, Packed)
        for tokens in all_tokens:
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
            bias = torch.randn(rows, generator=torch.Generator().manual_seed(2)).to(dtype)
            want = x.double() @ decoded.double().T + bias.double()
            got = fitted.linear(x.to(device), running, bias.to(device)).cpu().double()
            worst = max(worst, ((got - want).norm() / want.norm()).item())
    passed = exact and worst < 2**-7  # bf16 in and out; a NaN is not less
    return {"error": worst, "decodes to the same bits": exact, "prepared": fused, "passed": passed}


# What is timed --------------------------------------------------------------------------------------------------------


def tensors_of(scheme: Any, shape: tuple[int, int], device: str) -> dict[str, Tensor]:
    """What the scheme would store of some weight: random, but for what is coded without loss."""
    if scheme.lossless:
        weight = (torch.randn(shape, device=device) * 0.02).bfloat16().cpu()
        return {name: tensor.to(device) for name, tensor in scheme.encode(weight).items()}
    return {name: drawn(name, spec, device) for name, spec in scheme.specs(shape, torch.bfloat16).items()}


def drawn(name: str, spec: Spec, device: str) -> Tensor:
    """A tensor of that header, with scales that keep products finite."""
    if spec.text is not None:
        return torch.frombuffer(bytearray(spec.text), dtype=torch.uint8).to(device)
    if name == "quant_map":
        return torch.linspace(-1, 1, spec.shape[0], device=device)
    if name == "weight_global_scale":
        return torch.full(spec.shape, 256.0, device=device)
    if name in ("exponent", "weight_scale") and spec.dtype == torch.uint8:
        return torch.randint(110, 122, spec.shape, dtype=torch.uint8, device=device)
    octets = torch.randint(0, 256, (*spec.shape, spec.dtype.itemsize), dtype=torch.uint8, device=device)
    if spec.dtype == torch.float8_e4m3fn:
        return octets.where(octets & 127 != 127, 0).squeeze(-1).view(spec.dtype)  # not NaN
    if spec.dtype.is_floating_point:
        return (torch.rand(spec.shape, device=device) * 0.02 + 0.01).to(spec.dtype)
    return octets.view(spec.dtype).squeeze(-1)


class Candidate:
    """Something that multiplies: calls that each have a weight of their own, in turn."""

    def __init__(self, nbytes: int, make_call: Callable[[], Callable[[Tensor], Tensor]], device: str) -> None:
        self.nbytes, self.device = nbytes, device
        count = 1 if device == "cpu" else max(2, -(-CACHE_BYTES // nbytes))
        self.calls = [make_call() for _ in range(count)]

    def timer(self, x: Tensor) -> Callable[[], float]:
        """A function that gives microseconds of a call with x, the mean over all weights."""
        calls = self.calls

        def all_of_them() -> None:
            for call in calls:
                call(x)

        all_of_them()  # compiles
        if self.device == "cpu":
            return lambda: 1e6 * elapsed(all_of_them) / len(calls)
        graph, _ = captured(all_of_them)
        return lambda: on_events(graph.replay) / len(calls)


def elapsed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def on_events(function: Callable[[], Any], least_us: float = 2000.0) -> float:
    """Microseconds of a call on the device, the mean of as many as take least_us."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = 1
    while True:
        start.record()
        for _ in range(times):
            function()
        end.record()
        torch.cuda.synchronize()
        us = 1e3 * start.elapsed_time(end)
        if us >= least_us or times >= 1000:
            return us / times
        times = min(1000, int(times * 1.2 * least_us / max(us, 1)) + 1)


def bandwidth(device: str, small: bool) -> float:
    """GB/s of a copy, read and written."""
    source = torch.empty((1 << 24) if small else (4 << 30), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    if device == "cpu":
        return 2 * source.numel() / min(elapsed(lambda: target.copy_(source)) for _ in range(5)) / 1e9
    return 2 * source.numel() / min(on_events(lambda: target.copy_(source)) for _ in range(5)) / 1e3


def compressed(scheme: Any, shape: tuple[int, int], device: str) -> Candidate:
    fitted = scheme.fit(shape).for_dtype(torch.bfloat16)
    tensors = tensors_of(fitted, shape, device)

    def make_call() -> Callable[[Tensor], Tensor]:
        running = fitted.prepare({name: tensor.clone() for name, tensor in tensors.items()})
        return lambda x: fitted.linear(x, running)

    return Candidate(sum(tensor.nbytes for tensor in tensors.values()), make_call, device)


def dense(shape: tuple[int, int], device: str) -> Candidate:
    weight = (torch.randn(shape, device=device) * 0.02).bfloat16()

    def make_call() -> Callable[[Tensor], Tensor]:
        own = weight.clone()
        return lambda x: F.linear(x, own)

    return Candidate(weight.nbytes, make_call, device)


def bitsandbytes_nf4(shape: tuple[int, int], device: str) -> Candidate:
    import bitsandbytes
    import bitsandbytes.functional as bnb

    weight = (torch.randn(shape, device=device) * 0.02).bfloat16()

    def make_call() -> Callable[[Tensor], Tensor]:
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)

    return Candidate(weight.numel() // 2 + weight.numel() // 16, make_call, device)


def torch_int4(shape: tuple[int, int], device: str) -> Candidate:
    """The kernel of gpt-fast and torchao (tinygemm), groups of 128."""
    rows, columns = shape
    octets = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(columns // 128, rows, 2, device=device) * 0.02).bfloat16()

    def make_call() -> Callable[[Tensor], Tensor]:
        packed, own = torch.ops.aten._convert_weight_to_int4pack(octets, 8), scales.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, own)

    return Candidate(octets.nbytes + scales.nbytes, make_call, device)


def gemlite_int4(shape: tuple[int, int], device: str) -> Candidate:
    from gemlite.helper import A16W4_HQQ_INT

    rows, columns = shape
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    scales = (torch.rand(rows * columns // 128, 1, device=device) * 0.02).bfloat16()

    def make_call() -> Callable[[Tensor], Tensor]:
        zeros = torch.full_like(scales, 8)
        layer: Any = A16W4_HQQ_INT(device=device, dtype=torch.bfloat16).from_weights(codes.clone(), scales, zeros)
        return lambda x: layer(x)

    return Candidate(codes.numel() // 2 + 4 * scales.numel(), make_call, device)


def candidates(shape: tuple[int, int], device: str, rows: list[Row]) -> dict[str, Candidate]:
    """All that can be made here by name, bf16 first; why one cannot goes to `rows`."""
    peers = {"bitsandbytes nf4": bitsandbytes_nf4, "torch int4": torch_int4, "gemlite int4": gemlite_int4}
    makers: dict[str, Callable[[], Candidate]] = {"bf16": lambda: dense(shape, device)}
    makers |= {name: lambda s=s: compressed(s, shape, device) for name, s in SCHEMES.items()}  # type: ignore[misc]
    if device != "cpu":
        makers |= {name: lambda f=f: f(shape, device) for name, f in peers.items()}  # type: ignore[misc]
    found = {}
    for name, maker in makers.items():
        try:
            found[name] = maker()
        except ImportError:
            continue
        except Exception as error:
            rows.append({"shape": shape, "scheme": name, "failed": message(error)})
    return found


def measure(
    shape: tuple[int, int], tokens: int, device: str, found: dict[str, Candidate], gb_s: float
) -> Iterator[Row]:
    """A row for each candidate, all in turn in every round."""
    x = torch.randn(tokens, shape[1], device=device).bfloat16()
    timers, rows = {}, []
    if device != "cpu":
        together(lambda candidate: candidate.calls[0](x), found.values())  # compiles
    for name, candidate in found.items():
        try:
            timers[name] = candidate.timer(x)
        except Exception as error:
            yield {"shape": shape, "tokens": tokens, "scheme": name, "failed": message(error)}
            if lost(device):
                raise
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer())
    base = times.get("bf16")
    for name, each in times.items():
        us = statistics.median(each)
        ideal = (found[name].nbytes + 2 * tokens * sum(shape)) / gb_s / 1e3
        speedup = statistics.median(b / own for b, own in zip(base, each, strict=True)) if base else None
        rows.append({"us": us, "speedup": speedup, "roofline": ideal / us, "spread": max(each) / min(each)})
        yield {"shape": shape, "tokens": tokens, "scheme": name, **rows[-1]}


# A whole model --------------------------------------------------------------------------------------------------------


def llama(device: str, small: bool, layers: int = LLAMA["num_hidden_layers"]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**LLAMA, **HEADS, "num_hidden_layers": layers}
    if small:
        sizes |= {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": min(layers, 2)}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().eval()


@contextmanager
def replaced(model: Any, scheme: Any, device: str) -> Iterator[None]:
    """Compressed layers, of random bits, in the place of those in the decoder's blocks. scheme: None for none."""
    linears = [(path, m) for path, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
    stored: dict[tuple[int, int], dict[str, Tensor]] = {}
    try:
        for path, linear in linears if scheme else ():
            shape = (linear.out_features, linear.in_features)
            fitted = scheme.fit(shape).for_dtype(torch.bfloat16)
            if shape not in stored:
                stored[shape] = tensors_of(fitted, shape, device)
            tensors = {local: tensor.clone() for local, tensor in stored[shape].items()}
            model.model.layers.set_submodule(path, CompressedLinear(fitted, shape, tensors))
        yield
    finally:
        for path, linear in linears:
            model.model.layers.set_submodule(path, linear)


def decoding(model: Any, batch: int, device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """What gives the logits of one token for each of `batch` sequences with CONTEXT tokens before it; those tokens."""
    from transformers import DynamicCache

    ids = torch.randint(0, model.config.vocab_size, (batch, CONTEXT), device=device)
    past = model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    held = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
    position = torch.tensor([[CONTEXT]], device=device).expand(batch, 1)
    tokens = ids[:, :1].clone()

    def step() -> Tensor:
        for layer, (keys, values) in zip(past.layers, held, strict=True):
            layer.keys, layer.values = keys, values
        logits: Tensor = model(tokens, past_key_values=past, position_ids=position, use_cache=True).logits
        return logits

    return step, tokens


def check_graph(model: Any, device: str) -> Row:
    """Relative error of the logits that a CUDA graph of decoding gives for another token than it saw first."""
    step, token = decoding(model, 1, device)
    token.fill_(0)
    step()  # compiles
    graph, found = captured(step)
    token.fill_(1)
    want = step().double()
    graph.replay()
    error = ((found.double() - want).norm() / want.norm()).item()
    return {"error": error, "passed": error < 2**-7}  # a NaN is not less


def graph_checks(device: str, small: bool) -> dict[str, Row]:
    """What `check_graph` found of every scheme in a Llama of one layer, printed too."""
    model, found = llama(device, small, layers=1), {}
    for name, scheme in SCHEMES.items():
        try:
            with replaced(model, scheme, device):
                row = check_graph(model, device)
        except Exception as error:
            row = {"passed": False, "failed": message(error)}
            if lost(device):
                raise
        said = row.get("failed") or f"error {row['error']:.1e}"
        print(f"{'ok   ' if row['passed'] else 'WRONG'} {name} as a CUDA graph: {said}", flush=True)
        found[name] = row
    return found


def tokens_per_second(model: Any, batch: int, device: str) -> float:
    """Of decoding, one token for each of `batch` sequences."""
    step, _ = decoding(model, batch, device)
    step()
    if device == "cpu":
        return batch / statistics.median(elapsed(step) for _ in range(3))
    graph, _ = captured(step)
    return batch * 1e6 / statistics.median(on_events(graph.replay, 50_000) for _ in range(3))


def whole_model(device: str, small: bool, until: float) -> list[Row]:
    model, rows = llama(device, small), []
    for name, scheme in {"bf16": None, **SCHEMES}.items():
        if time.monotonic() > until:
            rows.append({"model": "1.1B Llama", "scheme": name, "failed": "not measured: no time was left"})
            continue
        try:
            with replaced(model, scheme, device):
                for batch in BATCHES:
                    speed = tokens_per_second(model, batch, device)
                    rows.append({"model": "1.1B Llama", "batch": batch, "scheme": name, "tokens_per_second": speed})
        except Exception as error:
            rows.append({"model": "1.1B Llama", "scheme": name, "failed": message(error)})
            if lost(device):
                break
    return rows


# What is shown --------------------------------------------------------------------------------------------------------


def table(shape: tuple[int, int], tokens: tuple[int, ...], rows: list[Row]) -> str:
    """A line for each scheme: times bf16 and percent of the roofline by tokens; of bf16 microseconds."""
    mine = [row for row in rows if row.get("shape") == shape]
    lines = [
        f"\n{shape[0]}x{shape[1]}: times bf16, % of roofline".ljust(44) + "".join(f"M={m}".rjust(13) for m in tokens)
    ]
    for name in dict.fromkeys(row["scheme"] for row in mine):
        cells = []
        for m in tokens:
            row = next((r for r in mine if r["scheme"] == name and r.get("tokens", m) == m), None)
            if row is None or "failed" in row:
                cells.append("FAILED" if row else "-")
            else:
                first = f"{row['us']:.1f}us" if name == "bf16" else f"{row['speedup']:.2f}x"
                cells.append(f"{first} {100 * row['roofline']:3.0f}%")
        lines.append(f"  {name}".ljust(43) + "".join(cell.rjust(13) for cell in cells))
    return "\n".join(lines)


def checks(device: str) -> dict[str, Row]:
    """What `check` found of every scheme, printed too. Raises RuntimeError where the device was lost."""
    found: dict[str, Row] = {}
    for name, row in zip(SCHEMES, together(lambda scheme: check(scheme, device), SCHEMES.values()), strict=True):
        row = {"passed": False, "failed": message(row)} if isinstance(row, Exception) else row
        bits = "the same bits" if row.get("decodes to the same bits") else "OTHER BITS"
        said = row.get("failed") or f"error {row['error']:.1e}, decodes to {bits}"
        print(f"{'ok   ' if row['passed'] else 'WRONG'} {name}: {said}", flush=True)
        found[name] = row
    if lost(device):
        raise RuntimeError("the device answers no more after the checks; run them one by one")
    return found


def time_shape(
    shape: tuple[int, int], tokens: tuple[int, ...], device: str, report: dict[str, Any], until: float
) -> None:
    """Adds the rows of a shape to the report, and prints their table."""
    if time.monotonic() > until:
        print(f"\n{shape[0]}x{shape[1]}: not measured, no time was left")
        return
    rows: list[Row] = report["rows"]
    made = candidates(shape, device, rows)
    for m in tokens:
        if time.monotonic() < until:
            rows.extend(measure(shape, m, device, made, report["copy_gb_s"]))
    print(table(shape, tokens, rows), flush=True)


def show_model(rows: list[Row], small: bool) -> None:
    print(f"\ntokens/s of a 1.1 B Llama{' (small)' if small else ''}:".ljust(30) + f" batch {BATCHES}")
    for name in ("bf16", *SCHEMES):
        mine = [row for row in rows if "model" in row and row["scheme"] == name]
        said = ", ".join(row.get("failed") or f"{row['tokens_per_second']:.1f}" for row in mine)
        print(f"  {name}".ljust(30) + f" {said}")
    for row in rows:
        if "failed" in row and "model" not in row:
            print(f"FAILED {row['scheme']} {row['shape']} {row.get('tokens', '')}: {row['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--seconds", type=float, default=450, help="after these nothing new is begun")
    parser.add_argument("--small", action="store_true", help="a tiny shape and model, to see that all runs")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    device, until = arguments.device, time.monotonic() + arguments.seconds
    shapes, tokens = (((256, 512),), (1, 16)) if arguments.small else (SHAPES, TOKENS)
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "rows": []}
    report |= {"checks": {}, "graphs": {}}
    report["device"] = "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    report["copy_gb_s"] = bandwidth(device, arguments.small)
    print(f"{report['device']}, torch {torch.__version__}, {report['date']}, copy {report['copy_gb_s']:.0f} GB/s\n")
    rows: list[Row] = report["rows"]

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1))

    try:
        report["checks"] = checks(device)
        save()
        if device != "cpu":
            report["graphs"] = graph_checks(device, arguments.small)
            save()
        model_until = until - 0.25 * arguments.seconds  # what is left is the model's
        for shape in shapes:
            time_shape(shape, tokens, device, report, model_until)
            save()
        rows += whole_model(device, arguments.small, until)
        show_model(rows, arguments.small)
    finally:
        save()
    print(f"{arguments.seconds - (until - time.monotonic()):.0f} s")
    sys.exit(not all(row["passed"] for kind in ("checks", "graphs") for row in report[kind].values()))


if __name__ == "__main__":
    main()
