"""Where a loss comes from, layer by layer, against doing it by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import compress
from compress import tables
from compress.cli import main
from compress.eval import fidelity, layers, running
from compress.eval.capacity import information_capacity, operations_per_token
from compress.source import Source
from compress.structure import read_config

WINDOWS = torch.randint(60, (3, 16), generator=torch.Generator().manual_seed(0))


def original(path: Path) -> Any:
    return running.loaded(path, running.Running("cpu", True, False))


def test_each_layer_alone(llama_dir: Path, tmp_path: Path) -> None:
    compress.quantize(llama_dir, tmp_path / "out", "int4", bits=3, group_size=32, method="rtn", scoring=None)
    model = original(llama_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = layers.sensitivity(tmp_path / "out", model, WINDOWS, tmp_path)
    assert len(found) == 14 and found == sorted(found, key=lambda line: -line["kl"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    packed = Source(tmp_path / "out")
    fidelity.record(model, WINDOWS, tmp_path / "original")
    by_hand = {}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        other = original(llama_dir)
        other.get_submodule(name).weight.data.copy_(packed.read(f"{name}.weight"))
        by_hand[name] = fidelity.compare(other, WINDOWS, tmp_path / "original", 1).kl_mean
    lines = {line["name"]: line["kl"] for line in found}
    assert {name: lines[name] for name in by_hand} == by_hand and min(by_hand.values()) > 0


@pytest.mark.parametrize("scheme", ["int4", "bitstack"])
def test_scales_that_were_folded_are_taken_out_again(scheme: str, llama_dir: Path, tmp_path: Path) -> None:
    how = compress.Calibration(samples=4, seq_len=32)
    out, options = tmp_path / "out", {"group_size": 32, "method": "awq"} if scheme == "int4" else {"blocks": 5}
    compress.quantize(llama_dir, out, scheme, scoring=None, calibration=how, **options)
    ledger = json.loads((out / "compress.json").read_text())["ledger"]
    assert any(entry.get("changes") for entry in ledger.values())  # or this tests nothing
    found = layers.sensitivity(out, original(llama_dir), WINDOWS, tmp_path)
    assert max(line["kl"] for line in found) < 0.1  # a folded weight in its own place would be another function


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt-oss"])
def test_transposed_weights_and_experts(name: str, tiny_model: Any, tiny_compressed: Any, tmp_path: Path) -> None:
    """With all layers in the original's place, the model is the compressed one."""
    out = tiny_compressed(name, "fp8")
    model = original(tiny_model(name))
    found = layers.sensitivity(out, model, WINDOWS, tmp_path)
    assert len(found) > 4 and max(line["kl"] for line in found) > 0
    from compress.structure import Structure

    packed = Source(out)
    linears = Structure(model, packed.specs).linears
    for module in packed.packed:
        linear = linears[module]
        layers.place(model, linear, linears.values()).copy_(packed.read(linear.source, linear.index))
    fidelity.record(original(out), WINDOWS, tmp_path / "packed")
    assert fidelity.compare(model, WINDOWS, tmp_path / "packed", 1).kl_max < 1e-6  # type: ignore[operator]


def test_the_command_shows_and_draws_them(llama_dir: Path, tmp_path: Path) -> None:
    compress.quantize(llama_dir, tmp_path / "out", "fp8", scoring=None)
    scores = tmp_path / "scores.json"
    arguments = ["eval", str(tmp_path / "out"), "--reference", str(llama_dir), "--layers", "--capacity", "--speed"]
    result = CliRunner().invoke(main, [*arguments, "--tasks", "", "--limit", "2", "--window", "32", "-o", str(scores)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(scores.read_text())
    worst = found["layers"][0]
    assert worst["name"] in result.stderr and f"{worst['kl']:.6f}" in result.stderr
    assert worst["name"] in scores.with_suffix(".svg").read_text()
    capacity = found["information_capacity"]
    assert f"{capacity['value']:.4f}" in result.stderr and capacity["value"] != capacity["reference"]
    assert found["generation_tokens_per_second"] > 0
    refused = CliRunner().invoke(main, ["eval", str(llama_dir), "--reference", str(llama_dir), "--layers"])
    assert refused.exit_code == 2 and "no compress.json" in refused.stderr


def test_a_lossless_checkpoint_has_no_layer_to_show() -> None:
    assert str(tables.layers([])) == "No layer was compressed with loss."


def test_several_models_are_compared(llama_dir: Path, tmp_path: Path) -> None:
    compress.quantize(llama_dir, tmp_path / "a", "fp8", scoring=None)
    arguments = ["eval", str(tmp_path / "a"), str(llama_dir), "--reference", str(llama_dir), "--limit", "2"]
    result = CliRunner().invoke(main, [*arguments, "--json", "--max-kl", "0"])
    assert result.exit_code == 3 and "Gate max_kl 0 missed" in result.stderr
    found = json.loads(result.stdout)
    assert found[str(llama_dir)]["kl_mean"] == 0 < found[str(tmp_path / "a")]["kl_mean"]
    assert "builtin_cloze acc" in result.stderr


def test_information_capacity_by_hand(llama_dir: Path) -> None:
    # 4 bytes of text per token, 1 bit per byte of code: (32 - 4 - 24) / log2(1024)
    assert information_capacity(1.0, 400, 100, 1024.0) == pytest.approx(0.4)
    # hidden 64, 2 layers of q 64, k and v 32, o 64, three times 128; the head of 300; attention over 8 of 16 positions
    weights = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 128 * 64) + 300 * 64
    assert operations_per_token(read_config(llama_dir), 16) == 2 * weights + 4 * 2 * 64 * 8


def test_of_experts_only_those_that_are_chosen_count(tiny_config: Any) -> None:
    config = tiny_config("mixtral")
    dense, sparse = operations_per_token(config, 8), 0.0
    config.num_experts_per_tok = 1
    sparse = operations_per_token(config, 8)
    assert dense - sparse == 2 * 2 * 3 * 64 * 128  # one expert less in each of two layers
