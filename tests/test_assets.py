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
    "techdocs-12m": ("techdocs/valid.txt", {"int4": 0.006, "fp8": 0.002}),
    "stories260k": ("tinystories/valid.txt", {"int4": 0.15, "int8": 0.002}),
    "stories260k-fp32": ("tinystories/valid.txt", {"int8": 0.002}),
    "babyllama-105": ("tinystories/valid.txt", {"fp8": 0.01}),
    "arthur-gpt2": ("arthur-domain/comprehensive.txt", {"int4": 0.15, "int8": 0.001, "fp8": 0.01}),
}
CASES = [(model, scheme) for model, (_, bounds) in MODELS.items() for scheme in bounds]

LETTERS = 8_000  # of a text that are scored


def run(*args: object) -> str:
    """Standard output of `compress ARGS`, which must succeed."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("model, scheme", CASES)
def test_a_trained_model_goes_all_the_way(model: str, scheme: str, tmp_path: Path) -> None:
    assets, out = Path(ASSETS or ""), tmp_path / "out"
    source, (text, bounds) = assets / "models" / model, MODELS[model]
    some = tmp_path / "some.txt"
    some.write_text((assets / "text" / text).read_text()[:LETTERS])
    scoring = ["--text", some, "--tasks", "", "--json"]
    planned = json.loads(run("plan", source, "--scheme", scheme, "--json"))
    few = ("--samples", "8", "--seq-len", "64", "--set", "method=gptq") if scheme == "int4" else ()  # it is calibrated
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


def test_the_offline_tasks_run_beside_the_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiple choice, likelihood of a last word, and generation behind five examples; the data lies below ASSETS."""
    import datasets.config

    assets, out = Path(ASSETS or "").resolve(), tmp_path / "out"
    monkeypatch.chdir(assets)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    source = assets / "models" / "stories260k"
    names = ("blimp", "tinystories_cloze", "boolq", "copa", "arc_easy", "lambada", "gsm8k", "winogrande")
    tasks = ",".join(f"local_{name}" for name in names)
    run("quantize", source, "-o", out, "--scheme", "fp8", "--no-eval")
    arguments = ["eval", out, "--reference", source, "--include-path", assets / "eval" / "lm_eval_tasks"]
    arguments += ["--tasks", tasks, "--limit", "3", "--window", "64", "--json"]
    first = json.loads(run(*arguments))
    assert set(first["tasks"]) == set(tasks.split(","))
    for task, metrics in first["tasks"].items():
        for name, metric in metrics.items():
            change = None if name == "perplexity" else pytest.approx(metric["value"] - metric["reference"])
            assert metric["difference"] == change, task  # a perplexity is no mean over items
    again = json.loads(run(*arguments))
    assert {**again, "tokens_per_second": 0} == {**first, "tokens_per_second": 0}
    shots = json.loads(run(*arguments, "--tasks", "local_arc_easy", "--num-fewshot", "0"))
    assert shots["tasks"]["local_arc_easy"] == first["tasks"]["local_arc_easy"]  # its own default
