"""Loading, generating, saving again and exporting compressed checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import compress
import compress.hf as hf
from compress.devices import check_device
from compress.exporting import export
from compress.formats.checkpoint import Checkpoint
from compress.kernels.experts import CompressedExperts
from compress.kernels.linear import CompressedLinear
from compress.recipe import Rules
from compress.source import Source

IDS = torch.arange(3, 23)[None]
Compressed = Callable[..., Path]
# one of each layout: packed, with zero points, fp8, with biases and tied, of our own, experts of both kinds
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4": ("llama", "int4", {}),
    "int3": ("llama-ragged", "int4", {"bits": 3}),
    "asymmetric": ("llama", "int4", {"group_size": 64, "symmetric": False}),
    "fp8": ("llama-wide", "fp8", {}),
    "fp8-block": ("llama-wide", "fp8", {"granularity": "block"}),
    "tied-biased": ("llama-tied-biased", "int8", {}),
    "conv1d": ("gpt2", "fp8", {}),
    "conv1d-int4": ("gpt2", "int4", {}),
    "experts": ("mixtral", "int4", {}),
    "stacked": ("gpt-oss", "fp8", {}),
}


@pytest.fixture(params=list(CASES))
def out(request: pytest.FixtureRequest, tiny_compressed: Compressed) -> Path:
    name, scheme, options = CASES[request.param]
    return tiny_compressed(name, scheme, **options)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_both_ways_to_load_give_the_same_bits(out: Path) -> None:
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(compress.load(out)))


def test_a_saved_copy_reloads_bit_equal_again_and_again(out: Path, tmp_path: Path) -> None:
    model = compress.load(out, device="cpu")
    expected = logits(model)
    model.save_pretrained(tmp_path / "once", max_shard_size="40KB")
    assert (tmp_path / "once" / "model.safetensors.index.json").exists()
    once = compress.load(tmp_path / "once", device="cpu")
    once.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(compress.load(tmp_path / "twice")), expected)
    before, after = Checkpoint(out), Checkpoint(tmp_path / "twice")
    assert set(before.entries) == set(after.entries)
    for name in before.entries:
        assert bytes(before.raw(name)) == bytes(after.raw(name)), name
    configs = [json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "twice")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_greedy_generation_is_the_same_either_way_and_with_a_batch(out: Path) -> None:
    model, other = compress.load(out), AutoModelForCausalLM.from_pretrained(out)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(IDS, **how)
    assert tokens.shape == (1, 26)
    assert torch.equal(other.generate(IDS, **how), tokens)
    assert model.generate(IDS.repeat(3, 1), **how).shape == (3, 26)


def test_a_loaded_model_is_in_eval_mode_and_its_stored_dtype(out: Path) -> None:
    model = compress.load(out)
    assert not model.training and model.dtype == torch.bfloat16
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    # nothing dense is left behind: what is in memory is what is stored
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert linears and all("weight" not in dict(linear.named_parameters()) for linear in linears)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older transformers leaves routers in the stored dtype"
)
def test_another_dtype_at_loading_runs_close_to_the_stored_one(out: Path) -> None:
    stored = logits(compress.load(out)).double()
    other = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    found = logits(other)
    assert found.dtype == torch.float32 and torch.equal(found, logits(compress.load(out, dtype="float32")))
    if not any(isinstance(module, CompressedExperts) for module in other.modules()):  # routes may differ
        assert float((found.double() - stored).norm() / stored.norm()) < 0.03


@pytest.mark.parametrize("to, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_export_writes_a_plain_checkpoint(to: str, dtype: torch.dtype, out: Path, tmp_path: Path) -> None:
    export(out, tmp_path / "plain", to)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == str(dtype).removeprefix("torch.")
    source, plain = Source(out), Checkpoint(tmp_path / "plain")
    assert set(plain.entries) == set(source.specs)
    for name in plain.entries:
        assert torch.equal(plain.read(name), source.read(name).to(dtype)), name
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert model.dtype == dtype
    assert not any(info.values()), info


def test_export_in_small_shards_and_the_same_bytes_twice(tiny_compressed: Compressed, tmp_path: Path) -> None:
    out = tiny_compressed("gpt-oss", "fp8")
    for name in ("a", "b"):
        export(out, tmp_path / name, shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 2
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    whole.set_experts_implementation("eager")
    assert torch.equal(logits(whole), logits(compress.load(out)))


def test_export_refuses_what_fp16_cannot_hold(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model("llama"))
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    model.save_pretrained(tmp_path / "big")
    with pytest.raises(ValueError, match="model.norm.weight: has values that do not fit into fp16"):
        export(tmp_path / "big", tmp_path / "out", "fp16")


def test_a_plain_checkpoint_loads_as_transformers_loads_it(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("qwen3")
    assert torch.equal(logits(compress.load(path)), logits(AutoModelForCausalLM.from_pretrained(path)))


def test_a_compressed_lm_head_runs_packed_when_untied(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    compress.quantize(tiny_model("llama"), tmp_path / "out", "fp8", rules=Rules(include=("lm_head",)), scoring=None)
    model = compress.load(tmp_path / "out")
    packed = [path for path, module in model.named_modules() if isinstance(module, CompressedLinear)]
    assert packed == ["lm_head"]
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(compress.load(tmp_path / "saved")), logits(model))


def test_our_layout_of_another_version_is_refused(tiny_compressed: Compressed, tmp_path: Path) -> None:
    path = tmp_path / "later"
    shutil.copytree(tiny_compressed("gpt2", "fp8"), path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layout version 99"):
        compress.load(path)
    with pytest.raises(ValueError, match="layout version 99"):
        export(path, tmp_path / "out")


def test_a_config_that_names_a_module_the_model_lacks_is_refused(tiny_compressed: Compressed, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    shutil.copytree(tiny_compressed("gpt2", "fp8"), path)
    config = json.loads((path / "config.json").read_text())
    config["n_layer"] = 1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json compresses transformer.h.1.attn.c_attn, which this model"):
        compress.load(path)


def test_a_state_dict_cannot_be_loaded_as_compressed(tiny_compressed: Compressed) -> None:
    out = tiny_compressed("llama", "int4")
    config = hf.read_config(out)
    with pytest.raises(ValueError, match="from safetensors files, not from a state dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_what_loading_does_not_take_is_named(tiny_compressed: Compressed) -> None:
    out = tiny_compressed("llama", "int4")
    with pytest.raises(ValueError, match="loading takes no device_map. It takes dtype, device"):
        compress.load(out, device_map="auto")
    with pytest.raises(ValueError, match="dtype: 'int8' is not one of auto, bfloat16"):
        compress.load(out, dtype="int8")


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nowhere"])
def test_a_device_that_computes_nothing_here_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device {device} .*cpu always"):
        check_device(device)


@pytest.mark.parametrize("scheme", ["df11", "bitstack"])
def test_a_loaded_model_can_be_saved_by_torch_and_read_back(scheme: str, llama_dir: Path, tmp_path: Path) -> None:
    options = {"scaling": "none"} if scheme == "bitstack" else {}
    compress.quantize(llama_dir, tmp_path / "out", scheme, scoring=None, **options)
    model, ids = compress.load(tmp_path / "out"), torch.arange(8)[None]
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
