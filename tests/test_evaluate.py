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
from compress.eval import running
from compress.eval.evaluate import evaluate

KEYS = (
    "tokens perplexity perplexity_stderr reference_perplexity reference_perplexity_stderr bits_per_byte "
    "reference_bits_per_byte kl_mean kl_stderr kl_median kl_p90 kl_p99 kl_max top1_agreement top5_agreement tasks "
    "tokens_per_second text dtype notes"
).split()


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
    accuracy = found["tasks"]["builtin_cloze"]["acc"]
    assert accuracy["difference"] == pytest.approx(accuracy["value"] - accuracy["reference"])
    assert accuracy["stderr"] > 0 and accuracy["reference_stderr"] > 0 and accuracy["significant"] in (True, False)
    assert json.loads(json.dumps(found)) == found


def test_the_original_scores_as_itself(llama_dir: Path) -> None:
    found = evaluate(llama_dir, llama_dir, limit=4).to_dict()
    assert (found["kl_mean"], found["kl_p99"], found["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert found["perplexity"] == found["reference_perplexity"]
    for scores in found["tasks"]["builtin_cloze"].values():
        assert scores["value"] == scores["reference"] and scores["significant"] is False
        assert scores["difference"] == scores["difference_stderr"] == 0


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

    monkeypatch.setattr(running, "load", load)
    evaluate(noisy_dir, llama_dir, limit=2, use_cache=False)
    assert len(loaded) == 2


def test_nothing_is_left_in_the_temporary_folder(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    evaluate(llama_dir, llama_dir, limit=2, use_cache=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_is_refused_before_a_model_is_loaded(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(tasks: Any, include_path: Any) -> None:
        raise ValueError("task nothing: unknown")

    monkeypatch.setattr(module.harness, "check", check)
    monkeypatch.setattr(running, "load", lambda *_, **__: pytest.fail("a model was loaded"))
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


def test_the_original_is_scored_once(
    llama_dir: Path, noisy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    loaded: list[Path] = []
    load = running.load
    monkeypatch.setattr(running, "load", lambda path, **how: loaded.append(path) or load(path, **how))

    def scored(**how: Any) -> dict[str, Any]:
        found = evaluate(noisy_dir, llama_dir, **{"limit": 2, **how}).to_dict()
        assert found.pop("tokens_per_second") > 0
        return found

    first = scored()
    assert loaded == [llama_dir, noisy_dir]
    assert scored() == first and loaded == [llama_dir, noisy_dir, noisy_dir]
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kept == ["hashes.json", "original", "tasks"]
    # what decides the result decides what is found
    for how in ({"limit": 3}, {"window": 64}, {"dtype": "float32" if first["dtype"] == "stored" else "stored"}):
        del loaded[:]
        scored(**how, tasks=[])
        assert llama_dir in loaded, how
    for path in (tmp_path / "cache").iterdir():  # damage costs time and nothing else
        path.write_bytes(path.read_bytes()[:-40])
    del loaded[:]
    assert scored() == first and loaded == [llama_dir, noisy_dir]
    del loaded[:]
    assert scored(use_cache=False) == first and loaded == [llama_dir, noisy_dir]


def test_another_original_of_the_same_name_is_scored_anew(llama_dir: Path, noisy_dir: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(llama_dir, original)
    assert evaluate(llama_dir, original, limit=2, tasks=[]).fidelity.kl_max == 0
    shutil.copy(noisy_dir / "model.safetensors", original)
    assert evaluate(llama_dir, original, limit=2, tasks=[]).fidelity.kl_mean > 0  # type: ignore[operator]


def test_an_original_that_does_not_fit_is_run_block_by_block(
    llama_dir: Path, noisy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(noisy_dir, llama_dir, limit=4, tasks=[], dtype="float32").to_dict()
    loaded: list[Path] = []
    load = running.load
    monkeypatch.setattr(running, "load", lambda path, **how: loaded.append(path) or load(path, **how))
    found = evaluate(noisy_dir, llama_dir, limit=4, original_memory="1KB").to_dict()
    assert loaded == [noisy_dir]
    assert found["dtype"] == "float32" and "block by block" in found["notes"][0]
    assert found["tasks"]["builtin_cloze"]["acc"]["reference"] is not None
    for name in ("reference_perplexity", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "top5_agreement"):
        # other shapes of float32 products, which round otherwise
        assert found[name] == pytest.approx(whole[name], rel=1e-3), name


def test_a_model_that_does_not_fit_is_scored_alone(llama_dir: Path) -> None:
    whole = evaluate(llama_dir, limit=2, tasks=[], dtype="float32")
    found = evaluate(llama_dir, limit=2, original_memory="1KB")
    assert "acc" in found.tasks["builtin_cloze"] and "block by block" in found.notes[0]
    assert found.fidelity.perplexity == pytest.approx(whole.fidelity.perplexity, rel=1e-5)


def test_what_decides_whether_a_model_is_streamed(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (llama_dir / "model.safetensors").stat().st_size
    for native, memory, expected in (
        (True, 3 * size, ("stored", False)),
        (True, size, ("float32", True)),
        (False, 6 * size, ("float32", False)),
        (False, int(1.5 * size), ("stored", False)),  # slow, but whole
        (False, size // 2, ("float32", True)),
    ):
        monkeypatch.setattr(running, "_multiplies", lambda *_, native=native: native)
        monkeypatch.setattr(running, "memory_bytes", lambda _, memory=memory: memory)
        how = running.choose(llama_dir, "cpu")
        assert (how.dtype, how.streamed) == expected, (native, memory)
    assert running.choose(llama_dir, "cpu", "float32", 3 * size) == running.Running("cpu", True, False)
    with pytest.raises(ValueError, match="dtype: float64"):
        running.choose(llama_dir, "cpu", "float64")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["int4", "fp8", "nf4", "df11"])
def test_a_packed_model_scores_as_its_export(llama_dir: Path, tmp_path: Path, scheme: str) -> None:
    import compress
    from compress.exporting import export

    options: dict[str, Any] = {"method": "rtn", "group_size": 32} if scheme == "int4" else {}
    compress.quantize(llama_dir, tmp_path / "packed", scheme, scoring=None, **options)
    export(tmp_path / "packed", tmp_path / "plain", "bf16", False)
    packed, plain = (evaluate(tmp_path / name, llama_dir, limit=8).to_dict() for name in ("packed", "plain"))
    for found in (packed, plain):
        del found["tokens_per_second"]
    assert packed == plain
    assert (packed["kl_max"] == 0) == (scheme == "df11")
