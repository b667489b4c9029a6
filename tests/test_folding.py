"""Changes of channels inside a model: made where they help, guarded, and undone by `verify`."""

import json
import re
import shutil
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.against import compare
from compress.calibrate import Calibration

TEXT = Calibration(samples=6, seq_len=32)


@pytest.fixture(scope="module")
def uneven(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama some of whose inner channels are much larger than others, all over value heads and MLPs."""
    path = tmp_path_factory.mktemp("uneven")
    for file in llama_dir.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "v_proj" in name or "up_proj" in name or "gate_proj" in name:
            loud = 1 + 15 * (torch.rand(len(tensor), 1, generator=generator) < 0.1)
            tensors[name] = (tensor * loud.sqrt()).to(tensor.dtype)
        if "down_proj" in name or "o_proj" in name:
            loud = 1 + 7 * (torch.rand(1, tensor.shape[1], generator=generator) < 0.1)
            tensors[name] = (tensor * loud).to(tensor.dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def quantize(model: Path, out: Path, scheme: str, **options: Any) -> dict[str, dict[str, Any]]:
    """module -> line of the report."""
    report = compress.quantize(model, out, scheme, calibration=TEXT, scoring=None, **options)
    return {line["name"]: line for line in report.tensors if line["scheme"]}


def changes(out: Path) -> dict[str, dict[str, Any]]:
    """module -> what was done to its channels."""
    ledger = json.loads((out / "compress.json").read_text())["ledger"]
    return {module: change for entry in ledger.values() for module, change in entry.get("changes", {}).items()}


def logit_errors(model: Path, ids: torch.Tensor, *compressed: Path) -> list[float]:
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        found = [compress.load(path)(ids).logits.float() for path in compressed]
    return [float((logits - wanted).norm() / wanted.norm()) for logits in found]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "reorder": ("mxfp4", {"method": "gptq"}, {"reorder": True}, "in.order"),
    "bfp": ("bfp", {"reorder": False}, {"reorder": True}, "in.order"),
    "hadamard": ("mxfp4", {"method": "gptq"}, {"hadamard": True}, "in.rotation"),
    "smooth": ("int8", {"activations": "static", "smooth": False}, {"smooth": True}, "in.scale"),
    "awq": ("int4", {"bits": 3, "group_size": 32, "method": "gptq"}, {"method": "awq+gptq"}, "in.scale"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_helps_and_the_model_computes_the_same(case: str, uneven: Path, tmp_path: Path) -> None:
    scheme, plain, changed, kind = CASES[case]
    quantize(uneven, tmp_path / "plain", scheme, **plain)
    after = quantize(uneven, tmp_path / "changed", scheme, **(plain | changed))
    assert not changes(tmp_path / "plain")
    made = {module for module, change in changes(tmp_path / "changed").items() if kind in change}
    assert made
    notes = [after[module]["note"] for module in made if module in after]
    assert any(note and "squared error down by" in note for note in notes)
    ids = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(1))
    errors = logit_errors(uneven, ids, tmp_path / "plain", tmp_path / "changed")
    assert errors[1] < 1.3 * errors[0]  # a change that is not undone gives other logits altogether


@pytest.mark.parametrize("case", CASES)
def test_verify_undoes_what_was_changed(case: str, uneven: Path, tmp_path: Path) -> None:
    scheme, plain, changed, _ = CASES[case]
    lines = quantize(uneven, tmp_path / "out", scheme, **(plain | changed))
    found = {line.name.removesuffix(".weight"): line for line in compare(tmp_path / "out", uneven)}
    assert not [line for line in found.values() if line.problem]
    for module, line in lines.items():
        assert found[module].relative_error == pytest.approx(line["relative_error"], rel=0.05, abs=2e-3)


@pytest.fixture(scope="module")
def loud(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with norms that make some channels louder than others."""
    path = tmp_path_factory.mktemp("loud")
    for file in uneven.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensors[name] = tensor * torch.logspace(-2, 2, len(tensor), 2).to(tensor.dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_scales_of_bitstack_move_into_norms_and_change_nothing(
    loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from compress.against import _unchanged
    from compress.bitstack import Bitstack
    from compress.run import read_report
    from compress.source import Source
    from compress.trimming import trim

    lines, out = quantize(loud, tmp_path / "out", "bitstack", blocks=4), tmp_path / "out"
    made = changes(out)
    assert {name.rpartition(".")[2] for name in made} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert len(made) == 10 and all(lines[module]["note"].startswith("input channels scaled") for module in made)
    ledger = json.loads((out / "compress.json").read_text())["ledger"]
    original, packed = Source(loud), Source(out)
    for module, change in made.items():
        scale = torch.frombuffer(bytearray(b64decode(change["in.scale"])), dtype=torch.float32)
        assert torch.equal(scale.log2(), scale.log2().round()) and scale.max() >= 2 * scale.min()
        norm = f"{module.rsplit('.', 2)[0]}.{'input' if 'attn' in module else 'post_attention'}_layernorm.weight"
        assert ledger[norm]["action"] == "folded"
        assert torch.equal(packed.read(norm).float() * scale, original.read(norm).float())

    # What is stored computes what the same weights do with norms and columns as they were.
    model = AutoModelForCausalLM.from_pretrained(loud, dtype=torch.float32)
    ids, found = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(1)), []
    for read in (packed.read, lambda n: _unchanged(packed.read(n), ledger[n])):
        state = {n: (original.read(n) if n in ledger and "norm" in n and found else read(n)) for n in packed.specs}
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            found.append(model(ids).logits)
    assert (found[0] - found[1]).norm() < 1e-6 * found[0].norm()

    # And that is what is stored without folding, but for how factors are rounded.
    monkeypatch.setattr(Bitstack, "folds", frozenset())
    plain = quantize(loud, tmp_path / "plain", "bitstack", blocks=4)
    assert not changes(tmp_path / "plain")
    for module, line in lines.items():
        assert line["bytes"] == plain[module]["bytes"]
        assert line["relative_error"] == pytest.approx(plain[module]["relative_error"], rel=0.05)
    compared = {line.name.removesuffix(".weight"): line for line in compare(out, loud)}
    assert not [line for line in compared.values() if line.problem]
    assert all(compared[m].relative_error == pytest.approx(lines[m]["relative_error"], rel=1e-3) for m in lines)
    small, size = tmp_path / "small", sum(file.stat().st_size for file in out.glob("*.safetensors"))
    trim(out, small, int(0.85 * size))
    compared = {line.name.removesuffix(".weight"): line for line in compare(small, loud)}
    trimmed = {line["name"]: line for line in read_report(small).tensors}
    assert all(compared[m].relative_error == pytest.approx(trimmed[m]["relative_error"], rel=1e-3) for m in lines)


def test_a_norm_that_adds_one_to_its_weight_keeps_it(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(w + 1) / 2 - 1 takes more bits than w: bitstack would lose by it what it gains nothing for."""
    from compress.samples import Samples

    tokens = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("compress.run.draw", lambda *_: Samples(tokens, "tokens"))
    compress.quantize(tiny_model("gemma2"), tmp_path / "out", "bitstack", blocks=2, scoring=None)
    assert not changes(tmp_path / "out")


def test_no_layer_of_an_even_model_gets_worse(llama_dir: Path, tmp_path: Path) -> None:
    before = quantize(llama_dir, tmp_path / "plain", "mxfp4", method="gptq")
    after = quantize(llama_dir, tmp_path / "changed", "mxfp4", method="gptq", reorder=True, hadamard=True)
    for module in before:
        if ".0." in module:
            assert after[module]["output_error"] <= before[module]["output_error"] * (1 + 1e-6)


def test_biases_of_what_is_changed_move_along(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.samples import Samples

    tokens = torch.randint(3, 120, (8, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("compress.run.draw", lambda *_: Samples(tokens, "tokens"))
    model = tiny_model("llama-tied-biased")
    compress.quantize(model, tmp_path / "plain", "mxfp8", scoring=None)
    compress.quantize(model, tmp_path / "out", "mxfp8", scoring=None, hadamard=True, reorder=True)
    ledger = json.loads((tmp_path / "out" / "compress.json").read_text())["ledger"]
    assert any(name.endswith("bias") and entry["action"] == "folded" for name, entry in ledger.items())
    errors = logit_errors(model, tokens, tmp_path / "plain", tmp_path / "out")
    assert errors[1] < 1.1 * errors[0]


def test_whole_heads_change_places_where_blocks_are_longer_than_one(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other head of 16 channels is loud, and blocks are of 32: keys, queries and biases follow their values."""
    from compress.samples import Samples

    tokens = torch.randint(3, 120, (8, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("compress.run.draw", lambda *_: Samples(tokens, "tokens"))
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama-heads"), model)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensor.view(64, 2, 2, 16)[:, :, 0] *= 16
        if name.endswith("v_proj.weight"):
            tensor.view(2, 2, 16, 64)[:, 0] /= 16
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    compress.quantize(model, tmp_path / "false", "bfp", scoring=None, reorder=False, method="rtn")
    report = compress.quantize(model, tmp_path / "true", "bfp", scoring=None, reorder=True, method="rtn")
    lines = {line["name"]: line for line in report.tensors}
    made, before, after = changes(tmp_path / "true"), tensors, load_file(tmp_path / "true" / "model.safetensors")
    for layer in (f"model.layers.{i}.self_attn" for i in range(2)):
        stored = made[f"{layer}.k_proj"]["out.order"]
        assert stored == made[f"{layer}.q_proj"]["out.order"]
        heads = torch.frombuffer(bytearray(b64decode(stored)), dtype=torch.int64)
        assert {int(head) % 2 for head in heads.view(-1, 16)[:2, 0] // 16} in ({0}, {1})
        for leaf in ("q_proj", "k_proj"):
            assert torch.equal(after[f"{layer}.{leaf}.bias"], before[f"{layer}.{leaf}.bias"][heads])
        (gain,) = re.findall(r"channels reordered: squared error down by ([\d.]+)%", lines[f"{layer}.o_proj"]["note"])
        assert float(gain) > 30  # quiet heads no longer share blocks with loud ones
    errors = logit_errors(model, tokens, tmp_path / "false", tmp_path / "true")
    assert errors[1] < errors[0]
    assert not [line for line in compare(tmp_path / "true", model) if line.problem]


def test_where_a_gate_and_what_it_gates_could_both_be_scaled_one_is(
    tiny_config: Callable[[str], Any], llama_dir: Path, tmp_path: Path
) -> None:
    """relu(s x) = s relu(x): scales can move through either."""
    from compress.change import Change
    from compress.fold import Fold
    from compress.folding import Folding
    from compress.planning import Packed
    from compress.registry import make
    from compress.source import Source
    from compress.stats import Accumulator

    source = Source(llama_dir)
    name = "model.layers.0.mlp.down_proj"
    packed = {name: Packed(make("int4", {"bits": 3, "group_size": 32}), f"{name}.weight")}
    x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    x[:, :4] *= 30
    sums = Accumulator(hessian=True)
    sums.add(x)
    folding = Folding(source, packed, {name: sums.stats()})
    fold = Fold(("gate",), (name,), 128)
    chosen = folding.choose(fold, [], [name])
    assert chosen is not None
    folding.make(fold, *chosen, {}, [name])
    assert folding.choose(Fold(("up",), (name,), 128), [], [name]) is None
    assert isinstance(folding.inputs(name), Change)
