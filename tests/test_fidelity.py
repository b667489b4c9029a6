"""Fidelity against a slow float64 computation, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.eval import fidelity

VOCABULARY = 300
BYTES = 123


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@pytest.fixture(scope="module")
def model(llama_dir: Path) -> Any:
    return load(llama_dir)


@pytest.fixture(scope="module")
def other(llama_dir: Path) -> Any:
    """The model with noise in every weight."""
    other = load(llama_dir)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(2))


def slow_scores(model: Any, reference: Any, windows: torch.Tensor) -> dict[str, float]:
    """The same scores token by token, with Python's own floats."""
    nll, reference_nll, kl, same = [], [], [], []
    for window in windows:
        with torch.inference_mode():
            ours, theirs = (m(window[None]).logits[0].double() for m in (model, reference))
        for position in range(len(window) - 1):
            p, q = (torch.softmax(logits[position], -1).tolist() for logits in (theirs, ours))
            target = int(window[position + 1])
            nll.append(-math.log(q[target]))
            reference_nll.append(-math.log(p[target]))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
    kl.sort()
    rank = 0.99 * (len(kl) - 1)
    low = int(rank)
    middle = len(kl) // 2
    return {
        "tokens": len(kl),
        "perplexity": math.exp(sum(nll) / len(nll)),
        "reference_perplexity": math.exp(sum(reference_nll) / len(nll)),
        "bits_per_byte": sum(nll) / math.log(2) / BYTES,
        "kl_mean": sum(kl) / len(kl),
        "kl_median": kl[middle] if len(kl) % 2 else (kl[middle - 1] + kl[middle]) / 2,
        "kl_p99": kl[low] + (rank - low) * (kl[low + 1] - kl[low]),
        "top1_agreement": sum(same) / len(same),
    }


def test_the_scores_equal_a_slow_computation(model: Any, other: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    fidelity.record(model, windows, tmp_path / "logits")
    found = fidelity.compare(other, windows, tmp_path / "logits", BYTES)
    for name, value in slow_scores(other, model, windows).items():
        # Both in float64; only the order of the sums differs.
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert 0 < found.kl_median < found.kl_p99 and 0 < found.top1_agreement < 1
    assert found.tokens_per_second > 0


def test_chunks_of_positions_change_nothing(
    model: Any, other: Any, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fidelity.record(model, windows, tmp_path / "logits")
    whole = fidelity.compare(other, windows, tmp_path / "logits", BYTES)
    monkeypatch.setattr(fidelity, "_CPU_CHUNK_BYTES", 1)
    assert fidelity.compare(other, windows, tmp_path / "logits", BYTES).kl_p99 == whole.kl_p99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_compared_with_itself_is_identical(
    llama_dir: Path, windows: torch.Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = load(llama_dir).to(dtype)
    fidelity.record(model, windows, tmp_path / "logits")
    found = fidelity.compare(model, windows, tmp_path / "logits", BYTES)
    assert (found.kl_mean, found.kl_median, found.kl_p99, found.top1_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity


def test_bfloat16_logits_take_two_bytes_each(model: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    fidelity.record(model, windows, tmp_path / "logits")
    header = (tmp_path / "logits").read_bytes().split(b"\n")[0]
    assert (tmp_path / "logits").stat().st_size == len(header) + 1 + 5 * 23 * VOCABULARY * 2


def test_without_a_reference_there_is_perplexity_alone(model: Any, windows: torch.Tensor) -> None:
    found = fidelity.compare(model, windows, None, BYTES)
    assert found.perplexity > 1 and found.bits_per_byte > 0
    assert {found.reference_perplexity, found.kl_mean, found.kl_median, found.kl_p99, found.top1_agreement} == {None}


def test_batches_score_the_same_tokens(model: Any, other: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    calls: list[Any] = []
    fidelity.record(model, windows, tmp_path / "logits", batch_size=2, progress=lambda *call: calls.append(call))
    found = fidelity.compare(other, windows, tmp_path / "logits", BYTES, batch_size=2)
    assert found.tokens == 5 * 23
    # bfloat16 matmuls round differently in another shape.
    assert found.kl_mean == pytest.approx(slow_scores(other, model, windows)["kl_mean"], rel=0.05)
    assert calls == [("reference", 2, 5), ("reference", 4, 5), ("reference", 5, 5)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(llama_dir: Path, windows: torch.Tensor, value: float) -> None:
    model = load(llama_dir)
    broken = windows.clone()
    broken[:3] = broken[:3].clamp(max=VOCABULARY - 2)
    broken[3] = VOCABULARY - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1, 0] = value
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:-1].nan_to_num(0))
    with pytest.raises(ValueError, match="logits are not finite at window 3"):
        fidelity.compare(model, broken.clamp(max=VOCABULARY - 1), None, BYTES)


def test_another_vocabulary_is_refused(llama_dir: Path, model: Any, tmp_path: Path) -> None:
    windows = torch.arange(20).view(2, 10)
    fidelity.record(model, windows, tmp_path / "logits")
    smaller = load(llama_dir)
    smaller.resize_token_embeddings(200)
    with pytest.raises(ValueError, match="vocabulary: 200 entries in the model, 300 in the reference"):
        fidelity.compare(smaller, windows, tmp_path / "logits", BYTES)


def test_logits_of_other_windows_are_refused(model: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    fidelity.record(model, windows, tmp_path / "logits")
    with pytest.raises(ValueError, match="recorded on other windows"):
        fidelity.compare(model, windows.flip(0), tmp_path / "logits", BYTES)


def test_a_full_disk_is_found_before_writing(
    model: Any, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fidelity.shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    with pytest.raises(ValueError, match=f"{5 * 23 * VOCABULARY * 2} bytes are needed"):
        fidelity.record(model, windows, tmp_path / "logits")
