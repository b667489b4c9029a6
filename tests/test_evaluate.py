"""Evaluation from paths: the report's keys, one model in memory at a time, and what is refused."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from compress.eval import evaluate as module
from compress.eval.evaluate import evaluate

KEYS = ["tokens", "perplexity", "reference_perplexity", "bits_per_byte", "kl_mean", "kl_median", "kl_p99"]
KEYS += ["top1_agreement", "tasks", "tokens_per_second", "text"]


@pytest.fixture
def noisy_dir(llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny Llama with noise in its weights."""
    path = tmp_path / "noisy"
    shutil.copytree(llama_dir, path)
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype="auto")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    return path


def test_a_model_is_scored_against_its_original(llama_dir: Path, noisy_dir: Path) -> None:
    found = evaluate(noisy_dir, llama_dir, limit=4).to_dict()
    assert list(found) == KEYS
    assert found["tokens"] == 4 * 127
    assert found["text"]["window"] == 128 and found["text"]["windows"] == 4 and found["text"]["name"] == "builtin"
    assert 0 < found["kl_median"] <= found["kl_p99"] and 0 < found["top1_agreement"] < 1
    assert found["perplexity"] != found["reference_perplexity"]
    assert set(found["tasks"]["builtin_cloze"]["acc"]) == {"value", "stderr", "reference"}
    assert json.loads(json.dumps(found)) == found


def test_the_original_scores_as_itself(llama_dir: Path) -> None:
    found = evaluate(llama_dir, llama_dir, limit=4).to_dict()
    assert (found["kl_mean"], found["kl_p99"], found["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert found["perplexity"] == found["reference_perplexity"]
    for scores in found["tasks"]["builtin_cloze"].values():
        assert scores["value"] == scores["reference"]


def test_without_reference_and_tasks_there_is_perplexity_alone(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.harness, "run", lambda *_, **__: pytest.fail("no task was asked for"))
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    found = evaluate(llama_dir, tasks=[], text=[str(tmp_path / "a.txt")], window=32).to_dict()
    assert found["tasks"] == {} and found["kl_mean"] is None and found["reference_perplexity"] is None
    assert found["text"]["name"] == "a.txt" and found["text"]["window"] == 32


def test_the_two_models_are_never_in_memory_together(
    llama_dir: Path, noisy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def load(path: Any, device: str | None = None) -> Any:
        assert all(reference() is None for reference in loaded)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(module, "load", load)
    evaluate(noisy_dir, llama_dir, limit=2)
    assert len(loaded) == 2


def test_nothing_is_left_in_the_temporary_folder(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    evaluate(llama_dir, llama_dir, limit=2)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_is_refused_before_a_model_is_loaded(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(tasks: Any, include_path: Any) -> None:
        raise ValueError("task nothing: unknown")

    monkeypatch.setattr(module.harness, "check", check)
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="task nothing: unknown"):
        evaluate(llama_dir, tasks=["nothing"])


def test_a_window_beyond_the_context_is_refused(llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="window: 129 tokens exceed the context of .*, 128"):
        evaluate(llama_dir, window=129)


def test_a_folder_without_a_tokenizer_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama_dir / name, tmp_path)
    with pytest.raises(ValueError, match="no tokenizer that loads, which scoring needs"):
        evaluate(tmp_path)


def test_another_tokenizer_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["~"], vocabulary["}"] = vocabulary["}"], vocabulary["~"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="its tokenizer is not that of the model"):
        evaluate(llama_dir, tmp_path)


def test_what_is_no_causal_language_model_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path, dirs_exist_ok=True)
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertForMaskedLM is not a causal language model"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(tmp_path / "nowhere")
