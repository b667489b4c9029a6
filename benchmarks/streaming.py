"""Peak memory and speed of `compress quantize` on a synthetic sharded checkpoint, and start-up time of the command.

    python benchmarks/streaming.py --size-gb 6

Memory is what the process holds for itself (RssAnon), polled every 20 ms; mapped pages of the source belong to the page
cache and are given back as the run goes on. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from compress.formats.shard import ShardWriter, write_index

HIDDEN, FFN, KV, VOCAB = 4096, 14336, 1024, 32000
RTN = ("int4", "--set", "method=rtn")  # the checkpoint has no tokenizer
COMMANDS = (RTN, (*RTN, "--set", "clip=absmax"), ("fp8",), ("fp8", "--set", "granularity=block"))
COMMANDS += (("df11",), ("df11", "--set", "coding=fixed"))
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}


def layer(i: int) -> dict[str, tuple[int, int]]:
    """name -> (out_features, in_features) of one decoder layer's weights."""
    base = f"model.layers.{i}"
    return {
        f"{base}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{base}.self_attn.k_proj.weight": (KV, HIDDEN),
        f"{base}.self_attn.v_proj.weight": (KV, HIDDEN),
        f"{base}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{base}.mlp.gate_proj.weight": (FFN, HIDDEN),
        f"{base}.mlp.up_proj.weight": (FFN, HIDDEN),
        f"{base}.mlp.down_proj.weight": (HIDDEN, FFN),
    }


def make_checkpoint(path: Path, size_bytes: int) -> int:
    """Writes a Llama of about `size_bytes`, one shard per layer, Gaussian with 1 % of the columns ten times larger."""
    per_layer = 2 * sum(rows * columns for rows, columns in layer(0).values())
    layers = max(1, round((size_bytes - 4 * VOCAB * HIDDEN) / per_layer))
    shapes: list[dict[str, tuple[int, ...]]] = [dict(layer(i)) for i in range(layers)]
    for i, names in enumerate(shapes):
        names[f"model.layers.{i}.input_layernorm.weight"] = (HIDDEN,)
        names[f"model.layers.{i}.post_attention_layernorm.weight"] = (HIDDEN,)
    outer: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    shapes.append({**outer, "model.norm.weight": (HIDDEN,)})
    generator, files, total = torch.Generator().manual_seed(0), {}, 0
    for i, names in enumerate(shapes, 1):
        file = f"model-{i:05d}-of-{len(shapes):05d}.safetensors"
        with ShardWriter(path / file, [(n, torch.bfloat16, s) for n, s in names.items()]) as writer:
            for name, shape in names.items():
                tensor = torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02
                tensor[..., ::100] *= 10
                writer.add(name, tensor)
                files[name] = file
                total += tensor.nbytes
    write_index(path, files, total)
    (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return total


def measure(command: list[str]) -> tuple[float, int, int]:
    """Seconds, peak private bytes, and private bytes when the interpreter had started, of one run of a command."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first, peak = 0, 0
    while process.poll() is None:
        private = private_bytes(process.pid)
        first = first or private
        peak = max(peak, private)
        time.sleep(0.02)
    seconds = time.monotonic() - started
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    return seconds, peak, first


def private_bytes(pid: int) -> int:
    """RssAnon of a process, 0 when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0][1]) * 1024 if lines else 0


def startup(arguments: list[str]) -> float:
    """Median seconds of ten runs of the command."""
    times = []
    for _ in range(10):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "compress.cli", *arguments], check=True, capture_output=True)
        times.append(time.monotonic() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=6.0, help="size of the checkpoint, in 1e9 bytes")
    parser.add_argument("--folder", help="where to put it; by default the folder for temporary files")
    arguments = parser.parse_args()
    print(f"start-up: compress --help {startup(['--help']):.2f} s (median of 10)\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model = Path(folder) / "model"
        model.mkdir()
        total = make_checkpoint(model, int(arguments.size_gb * 1e9))
        print(f"checkpoint: {total / 1e9:.2f} GB of bf16\n")
        print("| scheme | seconds | GB/s of input | peak private memory, MB above start |")
        print("|---|--:|--:|--:|")
        for scheme in COMMANDS:
            out = Path(folder) / "out"
            command = [sys.executable, "-m", "compress.cli", "quantize", str(model), "-o", str(out)]
            seconds, peak, first = measure([*command, "--overwrite", "--no-eval", "--scheme", *scheme])
            print(f"| {' '.join(scheme)} | {seconds:.1f} | {total / 1e9 / seconds:.2f} | {(peak - first) / 1e6:.0f} |")


if __name__ == "__main__":
    main()
