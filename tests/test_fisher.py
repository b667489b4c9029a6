"""Fisher information, taken block by block, is that of the whole model at once; and kmeans is weighted by it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

import compress
from compress import backwards, fisher, importance
from compress.backwards import Backwards, said
from compress.calibrate import Calibration
from compress.change import Change
from compress.formats.checkpoint import Checkpoint
from compress.hf import model_class
from compress.job import Job
from compress.source import Source
from compress.statistics import Statistics
from compress.stats import Stats
from compress.stream import Reordered
from compress.structure import Linear, Structure, build, read_config

SAMPLES = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = ["llama", "llama-tied-biased", "gemma2", "gemma3", "phi3", "gpt2", "falcon", "mamba", "t5", "mixtral"]
ARCHITECTURES += ["qwen2-moe", "gpt-oss", "jetmoe", "llama4", "deepseek-v3"]


def whole(path: Path, linears: dict[str, Linear]) -> dict[str, Tensor]:
    """The same in the most obvious way: the whole model in float32, and one backward pass for each sample."""
    config = AutoConfig.from_pretrained(path)
    model = model_class(config).from_pretrained(path, dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sums: dict[str, Tensor] = {}
    for number, ids in enumerate(SAMPLES):
        extra = {"decoder_input_ids": ids[None]} if config.is_encoder_decoder else {}
        logits = model(ids[None], **extra).logits[0]
        model.zero_grad()
        F.cross_entropy(logits[:-1], said(logits[:-1], number)).backward()
        for module, linear in linears.items():
            parameter = parameters.get(f"{linear.path}.weight", parameters.get(linear.path))
            assert parameter is not None
            if parameter.grad is None:
                continue
            square = parameter.grad.square()
            along = (parameter.grad * parameter.detach()).sum().square()
            sums[f"{module}|along"] = sums.get(f"{module}|along", torch.zeros(())) + along / len(SAMPLES)
            if linear.expert is not None:
                place = (linear.path, linear.expert)
                parts = [other for other in linears.values() if (other.path, other.expert) == place]
                square = square[linear.expert].T if linear.transposed else square[linear.expert]
                square = square.chunk(len(parts))[linear.part]
            elif isinstance(model.get_submodule(linear.path), Conv1D):
                square = square.T
            sums[module] = sums.get(module, torch.zeros(())) + square / len(SAMPLES)
    return sums


def measured(path: Path, out: Path, samples: Tensor = SAMPLES) -> tuple[fisher.Squares, dict[str, Linear]]:
    source = Source(path)
    linears = Structure(build(read_config(path)), source.specs).linears
    with Job(out, {}) as job:
        return fisher.measure(job, source, linears, samples, "cpu"), dict(linears)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_it_is_that_of_the_whole_model(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    found, linears = measured(tiny_model(name), tmp_path / "out")
    expected = whole(tiny_model(name), linears)
    seen = 0
    for module, linear in linears.items():
        squares = found.of(module)
        if squares is None:  # no token came to this expert, or the layer lies outside of blocks
            assert not expected.get(module, torch.zeros(1)).any() and linear.expert is not None, module
            continue
        torch.testing.assert_close(squares, expected[module], rtol=1e-3, atol=1e-5 * float(expected[module].max()))
        along = torch.tensor(found.along(module))
        if linear.expert is None:
            torch.testing.assert_close(along, expected[f"{module}|along"], rtol=1e-3, atol=1e-9)
        seen += 1
    assert seen > len(linears) / 2


def test_a_gradient_of_two_samples_is_squared_before_it_is_added(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backwards, "said", lambda logits, _: logits.argmax(-1))  # wherever a sample stands
    both, linears = measured(tiny_model("one-layer"), tmp_path / "both")
    single = [measured(tiny_model("one-layer"), tmp_path / str(i), SAMPLES[i : i + 1])[0] for i in range(3)]
    for module in linears:
        found, parts = both.of(module), [part.of(module) for part in single]
        assert found is not None and all(part is not None for part in parts)
        torch.testing.assert_close(found, sum(parts) / 3)


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches kill -9."""


@pytest.mark.parametrize("step", ["close", "squares", "forget"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_measurement_goes_on_to_the_same_bytes(
    step: str, call: int, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = fisher if step == "squares" else Backwards
    name = "_squares" if step == "squares" else step
    original, calls = getattr(owner, name), [0]

    def dying(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*arguments)

    expected, linears = measured(tiny_model("mixtral"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            measured(tiny_model("mixtral"), tmp_path / "cut")
    monkeypatch.setattr(owner, name, counted := count(original))
    found, _ = measured(tiny_model("mixtral"), tmp_path / "cut")
    assert len(counted.calls) < {"close": 2, "squares": 3, "forget": 3}[step] + (call == 1)
    for module in linears:
        a, b = found.of(module), expected.of(module)
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


class count:
    """A function, and what it was called with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, list[Any]()

    def __get__(self, owner: Any, _: Any = None) -> Callable[..., Any]:
        return lambda *arguments: self(owner, *arguments)

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        return self.function(*arguments)


def test_it_is_measured_once_but_for_channels_in_another_order(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model("one-layer")
    source = Source(path)
    linears = Structure(build(read_config(path)), source.specs).linears
    monkeypatch.setattr(fisher, "_squares", counted := count(fisher._squares))
    with Job(tmp_path / "out", {}) as job:
        for source_now, calls in ((source, 2), (source, 2), (Reordered(source, {}, []), 4)):
            fisher.measure(job, source_now, linears, SAMPLES, "cpu")
            assert len(counted.calls) == calls


def test_gradients_that_are_not_finite_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("one-layer"), tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    stored["model.norm.weight"][3] = torch.inf
    save_file(stored, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="gradient of the loss has NaN or infinity"):
        measured(tmp_path / "model", tmp_path / "out")


def test_channels_that_are_changed_take_their_squares_along() -> None:
    """The loss is a function of what the weight makes, whose channels are scaled, ordered and rotated."""
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    change = Change(torch.tensor([2.0, 0.5, 4.0, 1.0]), torch.tensor([2, 0, 3, 1]))

    def squared(of: Tensor, undone: Callable[[Tensor], Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad((undone(of @ x) - target).square().sum(), of)
        return gradient.square()

    plain = squared(weight, lambda y: y)
    after = change.made(weight.detach().T).T.contiguous().requires_grad_()
    torch.testing.assert_close(fisher.changed(plain, change), squared(after, change.unmade))
    assert fisher.changed(plain, None) is plain
    turned = fisher.changed(plain, Change(rotation=torch.tensor([2])))
    assert torch.equal(turned[0], turned[1]) and torch.allclose(turned.sum(0), plain.sum(0))


FISHER: dict[str, Any] = {"bits": 2, "sensitivity": "fisher", "scoring": None}
TEXT = Calibration(samples=6, seq_len=32)


def bits(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(path)
    return {name: bytes(checkpoint.raw(name)) if entry.bytes else b"" for name, entry in checkpoint.entries.items()}


@pytest.mark.parametrize("method", ["rtn", "ganq"])
def test_kmeans_is_weighted_by_it_and_a_resumed_run_writes_the_same_bytes(
    method: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**FISHER, "method": method, "calibration": TEXT}
    report = compress.quantize(llama_dir, tmp_path / "out", "kmeans", **how)
    assert all(line["output_error"] is not None for line in report.tensors if line["scheme"])
    compress.quantize(llama_dir, tmp_path / "plain", "kmeans", **{**how, "sensitivity": "activation"})
    assert bits(tmp_path / "out") != bits(tmp_path / "plain")
    original, calls = Backwards.gradients, [0]

    def dying(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Backwards, "gradients", dying)
        with pytest.raises(Killed):
            compress.quantize(llama_dir, tmp_path / "cut", "kmeans", **how)
    compress.quantize(llama_dir, tmp_path / "cut", "kmeans", **how)
    assert bits(tmp_path / "cut") == bits(tmp_path / "out")


def test_a_file_of_statistics_keeps_it_and_one_without_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    how = {**FISHER, "method": "rtn", "stats": tmp_path / "file"}
    compress.quantize(llama_dir, tmp_path / "first", "kmeans", calibration=TEXT, **how)
    compress.quantize(llama_dir, tmp_path / "again", "kmeans", **how)
    compress.quantize(llama_dir, tmp_path / "unsaved", "kmeans", calibration=TEXT, **{**how, "stats": None})
    assert bits(tmp_path / "again") == bits(tmp_path / "first")
    module = "model.layers.1.mlp.up_proj"
    saved = Statistics(tmp_path / "file").fisher(module)
    assert saved is not None and saved.shape == (128, 64) and saved.dtype == torch.float32 and saved.min() >= 0
    how["stats"] = tmp_path / "other"
    compress.quantize(llama_dir, tmp_path / "third", "kmeans", calibration=TEXT, **{**how, "sensitivity": "activation"})
    with pytest.raises(ValueError, match="holds no Fisher information, and .* leave out sensitivity=fisher"):
        compress.quantize(llama_dir, tmp_path / "fourth", "kmeans", **how)


def test_where_there_is_none_second_moments_take_its_place() -> None:
    moments, squares = torch.tensor([1.0, 3.0]), torch.tensor([[8.0, 0.0], [0.0, 0.0], [2.0, 2.0]])
    stats = Stats(5, moments, moments, moments)
    by_inputs = importance.of("activation", 2, stats)
    assert torch.allclose(by_inputs, torch.tensor([[0.6, 1.6]]) / 1.1)
    assert torch.equal(importance.of("fisher", 2, stats), by_inputs)
    assert torch.equal(importance.of("fisher", 2, replace(stats, fisher=0 * squares)), by_inputs)
    weights = importance.of("fisher", 2, replace(stats, fisher=squares))
    assert torch.allclose(weights, (squares / 2 + 1) / 2) and weights.min() > 0
    assert torch.equal(importance.of("none", 2, stats), torch.ones(1, 2))
    assert torch.equal(importance.of("activation", 2, replace(stats, second_moment=0 * moments)), torch.ones(1, 2))
