"""Real checkpoints, trained rather than random. Set COMPRESS_ASSETS to the folder that holds models/ to run these."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

import compress
from compress.cli import main

ASSETS = os.environ.get("COMPRESS_ASSETS")
pytestmark = pytest.mark.skipif(not ASSETS, reason="COMPRESS_ASSETS is not set")
# model -> text of what it was trained on, and the most that the mean KL divergence may be, in nats, for each scheme
MODELS = {
    "techdocs-12m": ("techdocs/valid.txt", {"int4": 0.006, "int8": 0.0005, "fp8": 0.002}),
    "stories260k": ("tinystories/valid.txt", {"int4": 0.15, "int8": 0.002, "fp8": 0.01}),
    "stories260k-fp32": ("tinystories/valid.txt", {"int4": 0.15, "int8": 0.001, "fp8": 0.01}),
    "babyllama-105": ("tinystories/valid.txt", {"int4": 0.15, "int8": 0.001, "fp8": 0.01}),
    "arthur-gpt2": ("arthur-domain/comprehensive.txt", {"int4": 0.15, "int8": 0.001, "fp8": 0.01}),
}
CASES = [(model, scheme) for model, (_, bounds) in MODELS.items() for scheme in bounds]


def run(*args: object) -> str:
    """Standard output of `compress ARGS`, which must succeed."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("model, scheme", CASES)
def test_a_trained_model_goes_all_the_way(model: str, scheme: str, tmp_path: Path) -> None:
    assets, out = Path(ASSETS or ""), tmp_path / "out"
    source, (text, bounds) = assets / "models" / model, MODELS[model]
    scoring = ["--text", assets / "text" / text, "--limit", "4", "--tasks", "", "--json"]
    planned = json.loads(run("plan", source, "--scheme", scheme, "--json"))
    few = ("--samples", "16", "--seq-len", "64") if scheme == "int4" else ()  # it is calibrated
    report = json.loads(run("quantize", source, "-o", out, "--scheme", scheme, *few, *scoring))
    assert planned["bytes"] == report["bytes"]
    assert report["evaluation"]["kl_mean"] < bounds[scheme], report["evaluation"]
    assert json.loads(run("verify", out, "--against", source, "--json"))["ok"]

    run("export", out, "--to", "fp32" if model.endswith("fp32") else "bf16", "-o", tmp_path / "plain")
    packed, plain = compress.load(out), compress.load(tmp_path / "plain")
    ids = AutoTokenizer.from_pretrained(source)("What is this? Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = packed(ids).logits.double(), plain(ids).logits.double()
    assert float((a - b).norm() / b.norm()) < 0.01  # a kernel may sum in another order

    scores = json.loads(run("eval", out, "--reference", source, *scoring))
    assert scores["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"])
