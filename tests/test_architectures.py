"""Every architecture by the same code: found, planned, compressed, loaded, saved, exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import compress
from compress.exporting import export
from compress.formats.checkpoint import Checkpoint
from compress.hf import model_class
from compress.kernels.experts import CompressedExperts
from compress.kernels.linear import CompressedLinear
from compress.recipe import Rules

Running = Callable[[Any], dict[str, Tensor]]
# name -> linear weights that are compressed: those of a layer (times two layers), experts counted one by one
CODED = {
    "llama": 2 * 7,
    "llama-tied-biased": 2 * 7,
    "llama-ragged": 2 * 7,
    "qwen2": 2 * 7,
    "qwen3": 2 * 7,
    "gemma2": 2 * 7,
    "gemma3": 2 * 7,
    "phi": 2 * (4 + 2),
    "phi3": 2 * (2 + 2),  # fused qkv_proj and gate_up_proj
    "gpt2": 2 * (2 + 2),
    "gpt-neox": 2 * (2 + 2),
    "opt": 2 * (4 + 2),
    "falcon": 2 * (2 + 2),
    "mamba": 2 * 4,
    "t5": 2 * (4 + 2) + 2 * (8 + 2),
    "mixtral": 2 * (4 + 4 * 3),
    "qwen2-moe": 2 * (4 + 4 * 3 + 3),  # a shared expert, whose gate is a router
    "qwen3-moe": 2 * (4 + 4 * 3),
    "gpt-oss": 2 * (4 + 4 * 2),
    "jetmoe": 2 * (1 + 4 * 2 + 4 * 2),  # attention has experts too; both routers are plain linears and stay
    "llama4": 2 * (4 + 4 * 2 + 3),
    "deepseek-v3": 2 * 5 + 3 + (4 * 3 + 3),
}
EXPERTS = ["jetmoe", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "llama4", "deepseek-v3"]
CASES = [(name, "int4") for name in CODED]
CASES += [(name, "fp8") for name in ("llama-ragged", "phi3", "gpt2", "mixtral", "gpt-oss")]
# |W - W'| / |W| of normal values: 0.11 at 4 bits (arXiv:2210.17323's round to nearest), 2**-4 / sqrt(12) and scale
# rounding for a 3-bit mantissa
ERROR = {"int4": 0.125, "fp8": 0.04}


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(ids, **extra).logits
    return found


def plain(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = model_class(AutoConfig.from_pretrained(path)).from_pretrained(path)
    return model


def difference(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def of_plain(model: PreTrainedModel, path: str) -> Tensor:
    parameter = model.get_parameter(path).detach()
    owner = model.get_submodule(path.rpartition(".")[0])
    return parameter.T if isinstance(owner, Conv1D) else parameter


@pytest.mark.parametrize("name, scheme", CASES)
def test_every_source_tensor_is_accounted_for_and_planned_bytes_are_written(
    name: str, scheme: str, tiny_model: Callable[[str], Path], tiny_compressed: Callable[..., Path]
) -> None:
    source, out = tiny_model(name), tiny_compressed(name, scheme)
    forecast = compress.plan(source, scheme)
    report = json.loads((out / "report.json").read_text())
    ledger = json.loads((out / "compress.json").read_text())["ledger"]
    assert len(forecast.plan.modules) == CODED[name]
    assert [(line.name, line.bytes) for line in forecast.tensors] == [
        (r["name"], r["bytes"]) for r in report["tensors"]
    ]
    assert sum(entry.bytes for entry in Checkpoint(out).entries.values()) == report["bytes"]
    assert set(ledger) == set(Checkpoint(source).entries)
    coded = [module for entry in ledger.values() for module in entry.get("modules", ())]
    assert sorted(coded) == sorted(forecast.plan.modules)


@pytest.mark.parametrize("name, scheme", CASES)
def test_each_weight_is_run_where_it_came_from_and_exported_as_it_is_run(
    name: str,
    scheme: str,
    tiny_model: Callable[[str], Path],
    tiny_compressed: Callable[..., Path],
    tmp_path: Path,
    running_weights: Running,
) -> None:
    out = tiny_compressed(name, scheme)
    model, original = compress.load(out), plain(tiny_model(name))
    export(out, tmp_path / "plain")
    exported = plain(tmp_path / "plain")
    found = running_weights(model)
    assert sum(isinstance(module, CompressedLinear) for module in model.modules()) == CODED[name]
    for path, weight in found.items():
        assert torch.equal(weight, of_plain(exported, path)), path
        assert difference(weight, of_plain(original, path)) < ERROR[scheme], path
    for path, parameter in exported.named_parameters():  # norms, biases, embeddings, routers
        assert path in found or torch.equal(parameter, original.get_parameter(path)), path
    if name in EXPERTS:
        exported.set_experts_implementation("eager")  # one by one, as we do: rounded alike, so routed alike
    # A kernel may sum in another order, which bf16 rounds.
    assert difference(logits(model), logits(exported)) < 0.01


@pytest.mark.parametrize("name, scheme", CASES)
def test_both_ways_to_load_and_a_saved_copy_give_the_same_bits(
    name: str, scheme: str, tiny_compressed: Callable[..., Path], tmp_path: Path
) -> None:
    out = tiny_compressed(name, scheme)
    model = compress.load(out)
    expected = logits(model)
    assert expected.isfinite().all()
    assert torch.equal(logits(plain(out)), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = compress.load(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(saved), expected)
    assert set(Checkpoint(tmp_path / "saved").entries) == set(Checkpoint(out).entries)
    ids = torch.arange(3, 9)[None]
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(saved.generate(ids, **how), model.generate(ids, **how))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_rule_that_splits_the_experts_of_a_layer_is_refused(name: str, tiny_model: Callable[[str], Path]) -> None:
    rules = Rules(exclude=(r"re:experts.*\.1(\.|$)",))
    with pytest.raises(ValueError, match="takes some of its experts only"):
        compress.plan(tiny_model(name), "int4", rules=rules)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_experts_left_out_by_a_rule_stay_dense(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    rules = Rules(exclude=(r"re:\bexperts\.",))
    compress.quantize(tiny_model(name), tmp_path / "out", "int4", method="rtn", rules=rules, scoring=None)
    model = compress.load(tmp_path / "out")
    assert not any(isinstance(module, CompressedExperts) for module in model.modules())
    assert any(isinstance(module, CompressedLinear) for module in model.modules())
    assert logits(model).isfinite().all()
