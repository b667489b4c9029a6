"""Checkpoints as sources: fp8, fp16 and fp32 weights, shards, tied and untied heads, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import compress
from compress.exporting import export
from compress.formats.checkpoint import Checkpoint
from compress.kernels.linear import CompressedLinear
from compress.planning import VERSION
from compress.source import Source, read_json

Tiny = Callable[[str], Path]
IDS = torch.arange(3, 23)[None]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def rewrite(source: Path, out: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint with the config of `source` and other tensors."""
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    document = {**json.loads((source / "config.json").read_text()), **config}
    (out / "config.json").write_text(json.dumps(document))
    return out


def quantize(source: Path, out: Path, scheme: str = "int4", **options: Any) -> dict[str, Any]:
    """Compresses without data and scores; returns the ledger."""
    options = {"method": "rtn", **options} if scheme == "int4" else options
    compress.quantize(source, out, scheme, scoring=None, **options)
    ledger: dict[str, Any] = json.loads((out / "compress.json").read_text())["ledger"]
    return ledger


@pytest.fixture(scope="module")
def fp8_dir(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers' own `fp8` checkpoints are: E4M3 weights and a float32 `weight_scale_inv` per 128x128 block."""
    source = tiny_model("llama-wide")
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.split(".")[-2] not in PROJECTIONS:
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        scales = torch.empty(-(-rows // 128), -(-columns // 128))
        coded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = tensor[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].float()
                scales[i, j] = block.abs().max() / 448
                coded[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = (block / scales[i, j]).to(coded.dtype)
        tensors[name] = coded
        tensors[name + "_scale_inv"] = scales
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    out = tmp_path_factory.mktemp("sources") / "fp8"
    return rewrite(source, out, tensors, quantization_config=quantization, dtype="bfloat16")


def by_hand(coded: Tensor, scales: Tensor) -> Tensor:
    """The weight of an fp8 block checkpoint, element by element."""
    rows, columns = torch.arange(coded.shape[0]) // 128, torch.arange(coded.shape[1]) // 128
    return (coded.float() * scales[rows][:, columns]).bfloat16()


def test_an_fp8_source_is_read_in_the_dtype_that_its_config_names(fp8_dir: Path) -> None:
    source, stored = Source(fp8_dir), load_file(fp8_dir / "model.safetensors")
    assert not any("scale" in name for name in source.specs)
    for name, spec in source.specs.items():
        assert spec.dtype == torch.bfloat16
        found, scales = source.read(name), stored.get(name + "_scale_inv")
        assert torch.equal(found, stored[name] if scales is None else by_hand(stored[name], scales))
        assert (tuple(found.shape), found.dtype) == (spec.shape, spec.dtype)


def test_an_fp8_source_becomes_int4_with_no_fp8_left(fp8_dir: Path, tmp_path: Path) -> None:
    ledger = quantize(fp8_dir, tmp_path / "out", group_size=32)
    entries = Checkpoint(tmp_path / "out").entries
    assert not any("scale_inv" in name for name in [*entries, *ledger])
    assert not any(entry.dtype == torch.float8_e4m3fn for entry in entries.values())
    name = "model.layers.0.mlp.up_proj.weight"
    assert set(ledger[name]["read"]) == {name, name + "_scale_inv"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and "weight_block_size" not in config
    dense = tmp_path / "dense"
    export(fp8_dir, dense)
    model, original = compress.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(dense)
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            weight = original.get_submodule(path).weight.detach().float()
            assert float((module.weight.float() - weight).norm() / weight.norm()) < 0.12


def test_an_fp8_source_is_exported_and_loaded(fp8_dir: Path, tmp_path: Path) -> None:
    export(fp8_dir, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.bfloat16
    loaded = compress.load(fp8_dir)
    assert sum(isinstance(module, CompressedLinear) for module in loaded.modules()) == 14
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight.bfloat16(), model.model.layers[0].mlp.up_proj.weight)
    assert float((logits(loaded).double() - logits(model).double()).norm() / logits(model).double().norm()) < 0.01


def test_float8_without_its_scales_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    path = rewrite(tiny_model("llama"), tmp_path / "bare", tensors)
    with pytest.raises(ValueError, match=f"{name} is float8, but config.json does not say where its scale is"):
        compress.plan(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sources_of_other_dtypes_keep_theirs(dtype: torch.dtype, tiny_model: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    LlamaForCausalLM.from_pretrained(tiny_model("llama"), dtype=dtype).save_pretrained(source)
    quantize(source, tmp_path / "out")
    entries = Checkpoint(tmp_path / "out").entries
    scales = [entry for name, entry in entries.items() if name.endswith("weight_scale")]
    assert len(scales) == 14 and all(entry.dtype == dtype for entry in scales)
    assert entries["model.norm.weight"].dtype == dtype
    model = compress.load(tmp_path / "out")
    assert model.dtype == dtype and logits(model).dtype == dtype


def test_shards_make_no_difference(tiny_model: Tiny, tmp_path: Path) -> None:
    single = tiny_model("llama")
    LlamaForCausalLM.from_pretrained(single).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    quantize(single, tmp_path / "a")
    ledger = quantize(tmp_path / "sharded", tmp_path / "b", shard_size=40_000)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    a, b = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert set(a.entries) == set(b.entries)
    assert all(bytes(a.raw(name)) == bytes(b.raw(name)) for name in a.entries)
    assert set(ledger) == set(Checkpoint(single).entries)
    assert torch.equal(logits(compress.load(tmp_path / "a")), logits(compress.load(tmp_path / "b")))


def test_a_stored_copy_of_tied_embeddings_is_written_once(tiny_model: Tiny, tmp_path: Path) -> None:
    tied = tiny_model("llama-tied-biased")
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = rewrite(tied, tmp_path / "twice", tensors)
    ledger = quantize(source, tmp_path / "out")
    assert ledger["lm_head.weight"] == {"action": "tied", "to": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").entries
    quantize(tied, tmp_path / "once")
    assert torch.equal(logits(compress.load(tmp_path / "out")), logits(compress.load(tmp_path / "once")))


def test_a_head_that_differs_from_the_embeddings_is_kept(tiny_model: Tiny, tmp_path: Path) -> None:
    tied = tiny_model("llama-tied-biased")
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    source = rewrite(tied, tmp_path / "two", tensors)
    ledger = quantize(source, tmp_path / "out")
    assert ledger["lm_head.weight"]["action"] == "copied"
    assert torch.equal(Checkpoint(tmp_path / "out").read("lm_head.weight"), tensors["lm_head.weight"])
    # transformers decides what a tied config with two weights means: the same before as after
    expected = AutoModelForCausalLM.from_pretrained(source).lm_head.weight
    assert torch.equal(compress.load(tmp_path / "out").lm_head.weight, expected)


def test_names_without_the_base_models_prefix_are_compressed_and_loaded(tiny_model: Tiny, tmp_path: Path) -> None:
    # As the first GPT-2 checkpoints are, with the masks that they store.
    tensors = load_file(tiny_model("gpt2") / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    source = rewrite(tiny_model("gpt2"), tmp_path / "bare", bare)
    ledger = quantize(source, tmp_path / "out", "fp8")
    quantize(tiny_model("gpt2"), tmp_path / "prefixed", "fp8")
    assert sum(entry["action"] == "coded" for entry in ledger.values()) == 8
    assert ledger["h.0.attn.bias"]["action"] == "copied"
    model = compress.load(tmp_path / "out")
    assert torch.equal(logits(model), logits(compress.load(tmp_path / "prefixed")))
    export(tmp_path / "out", tmp_path / "plain")
    assert set(Checkpoint(tmp_path / "plain").entries) == set(bare)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert float((logits(plain).double() - logits(model).double()).norm() / logits(model).double().norm()) < 0.01
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(compress.load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("name", ["gpt-oss", "gpt2", "mixtral"])
def test_our_own_layout_is_a_source_again(name: str, tiny_compressed: Callable[..., Path], tmp_path: Path) -> None:
    first = tiny_compressed(name, "int8")
    ledger = quantize(first, tmp_path / "again", "int8", clip="absmax")
    assert set(ledger) == set(Source(first).specs)
    before, after = compress.load(first), compress.load(tmp_path / "again")
    difference = (logits(after).double() - logits(before).double()).norm() / logits(before).double().norm()
    assert float(difference) < 0.05


def test_a_slice_of_a_packed_3d_tensor_is_that_of_the_whole(tiny_compressed: Callable[..., Path]) -> None:
    source = Source(tiny_compressed("gpt-oss", "fp8"))
    name = "model.layers.1.mlp.experts.down_proj"
    whole = source.read(name)
    assert source.is_packed(name) and not source.is_packed("model.norm.weight")
    assert tuple(whole.shape) == source.specs[name].shape == (4, 32, 64)
    assert torch.equal(source.read(name, 2), whole[2])


@pytest.mark.parametrize(
    "quantization, message",
    [
        ({"quant_method": "gptq", "bits": 4}, "already compressed with 'gptq'"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}, "not whole"),
        ({"quant_method": "compress", "version": VERSION}, "not whole"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size"),
    ],
)
def test_a_quantization_that_cannot_be_read_is_refused(
    quantization: dict[str, Any], message: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    path = rewrite(tiny_model("llama"), tmp_path / "odd", tensors, quantization_config=quantization)
    for call in (lambda: compress.plan(path), lambda: export(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_module_whose_tensors_are_missing_is_named(tiny_compressed: Callable[..., Path], tmp_path: Path) -> None:
    out = tiny_compressed("gpt2", "fp8")
    lost = "transformer.h.0.attn.c_attn"
    tensors = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost) or name.endswith("bias")}
    with pytest.raises(ValueError, match=f"{lost}: no weight_scale is stored, so the checkpoint is incomplete"):
        Source(rewrite(out, tmp_path / "lost", kept))


def test_a_packed_module_that_lost_a_part_is_named(tiny_compressed: Callable[..., Path], tmp_path: Path) -> None:
    out = tiny_compressed("llama", "int4")
    tensors = load_file(out / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    del tensors[f"{module}.weight_packed"]
    path = rewrite(out, tmp_path / "lost", tensors)
    for call in (lambda: compress.load(path), lambda: export(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=f"{module}: no weight_packed is stored"):
            call()


@pytest.mark.parametrize("text, message", [(None, "does not exist"), ("{", "not JSON"), ("[1]", "not a JSON object")])
def test_json_that_is_missing_or_broken_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        read_json(tmp_path / "config.json")
