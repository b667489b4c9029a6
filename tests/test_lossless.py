"""Whole models in df11: every bit comes back, from the files and from the running model, whatever the architecture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import compress
from compress.cli import main
from compress.exporting import export
from compress.formats.checkpoint import Checkpoint
from compress.hf import model_class
from compress.kernels.linear import CompressedLinear
from compress.kernels.weight import CompressedWeight
from compress.pipeline import same_bits
from compress.recipe import Rules
from compress.source import Source

Tiny = Callable[[str], Path]
Compressed = Callable[..., Path]
EXPERTS = ["jetmoe", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "llama4", "deepseek-v3"]
DENSE = ["llama", "llama-tied-biased", "llama-ragged", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt2"]
DENSE += ["gpt-neox", "opt", "falcon", "mamba", "t5"]
CODINGS = [(name, "huffman") for name in DENSE + EXPERTS]
CODINGS += [(name, "fixed") for name in ("llama-tied-biased", "gpt2", "mixtral", "gpt-oss")]


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(ids, **extra).logits
    return found


def plain(path: Path, name: str = "") -> PreTrainedModel:
    model: PreTrainedModel = model_class(AutoConfig.from_pretrained(path)).from_pretrained(path)
    if name in EXPERTS:
        model.set_experts_implementation("eager")  # one by one, as we run them: sums are rounded alike
    return model


def check_same_tensors(a: Path, b: Path) -> None:
    found, wanted = Checkpoint(a), Checkpoint(b)
    assert found.entries.keys() == wanted.entries.keys()
    assert all(same_bits(found.read(name), wanted.read(name)) for name in wanted.entries)


def rewritten(source: Path, path: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """A copy of a model with other tensors and other fields in its config."""
    shutil.copytree(source, path)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))
    return path


@pytest.mark.parametrize("name, coding", CODINGS)
def test_a_model_gives_the_same_logits_bit_for_bit(
    name: str, coding: str, tiny_model: Tiny, tiny_compressed: Compressed
) -> None:
    model = compress.load(tiny_compressed(name, "df11", coding=coding))
    assert torch.equal(logits(model), logits(plain(tiny_model(name), name)))


@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_every_tensor_comes_back_and_large_ones_are_coded(
    name: str, tiny_model: Tiny, tiny_compressed: Compressed, tmp_path: Path
) -> None:
    source, out = tiny_model(name), tiny_compressed(name, "df11")
    export(out, tmp_path / "plain")
    check_same_tensors(tmp_path / "plain", source)
    ledger = json.loads((out / "compress.json").read_text())["ledger"]
    for tensor, entry in Checkpoint(source).entries.items():
        slices = entry.shape[0] if len(entry.shape) == 3 and "expert" in tensor else 1
        large = torch.Size(entry.shape).numel() // slices >= 1024
        assert ledger[tensor]["action"] == ("coded" if large else "copied"), tensor


@pytest.mark.parametrize("name", ["llama-tied-biased", "gemma3", "opt", "t5", "gpt2", "qwen3-moe"])
def test_what_is_packed_stays_packed_and_a_saved_copy_has_the_same_tensors(
    name: str, tiny_compressed: Compressed, tmp_path: Path
) -> None:
    out = tiny_compressed(name, "df11")
    model = compress.load(out)
    assert any(isinstance(module, CompressedLinear) for module in model.modules())
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, CompressedWeight)
    head = model.get_output_embeddings()
    assert isinstance(head, CompressedLinear) or head.weight is embedding.weight
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    check_same_tensors(tmp_path / "saved", out)
    assert torch.equal(logits(compress.load(tmp_path / "saved")), expected)
    assert torch.equal(logits(plain(out)), expected)


def test_the_coding_can_be_chosen_when_a_model_is_loaded(
    tiny_model: Tiny, tiny_compressed: Compressed, tmp_path: Path
) -> None:
    out = tiny_compressed("llama-tied-biased", "df11")
    model = compress.load(out, coding="fixed")
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, CompressedLinear) and "escapes" in linear.tensors()
    assert torch.equal(logits(model), logits(plain(tiny_model("llama-tied-biased"))))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(compress.load(tmp_path / "saved")), logits(model))
    with pytest.raises(ValueError, match="df11 has no option 'codign'; did you mean 'coding'"):
        compress.load(out, codign="fixed")
    with pytest.raises(ValueError, match="loading takes no coding"):
        compress.load(tiny_compressed("llama", "int8"), coding="fixed")
    with pytest.raises(ValueError, match="loading takes no coding"):
        compress.load(tiny_model("llama"), coding="fixed")


def test_the_plan_is_exact_although_sizes_depend_on_the_values(tiny_model: Tiny, tiny_compressed: Compressed) -> None:
    for coding in ("huffman", "fixed"):
        forecast = compress.plan(tiny_model("llama-ragged"), "df11", coding=coding)
        out = tiny_compressed("llama-ragged", "df11", coding=coding)
        report = json.loads((out / "report.json").read_text())
        found = [(line["name"], line["bytes"]) for line in report["tensors"]]
        assert [(line.name, line.bytes) for line in forecast.tensors] == found
        assert forecast.totals["bytes"] == report["bytes"] == sum(e.bytes for e in Checkpoint(out).entries.values())


def test_odd_values_of_every_kind_come_back(tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():  # any bits: NaN with every payload, infinities, denormals, both zeros
        bits = torch.randint(-(1 << 15), 1 << 15, tensor.shape, generator=generator, dtype=torch.int32)
        tensors[name] = bits.to(torch.int16).view(torch.bfloat16)
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = torch.full((128, 64), -0.0, dtype=torch.bfloat16)
    odd = rewritten(tiny_model("llama"), tmp_path / "odd", tensors)
    for coding in ("huffman", "fixed"):
        out = tmp_path / coding
        report = compress.quantize(odd, out, "df11", coding=coding, scoring=None)
        assert report.bytes <= report.original_bytes
        export(out, tmp_path / f"{coding}-plain")
        check_same_tensors(tmp_path / f"{coding}-plain", odd)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_coded_without_loss(dtype: torch.dtype, tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=generator).mul(0.05).to(dtype) for name, t in tensors.items()}
    source = rewritten(tiny_model("llama"), tmp_path / "source", tensors, dtype=str(dtype).removeprefix("torch."))
    report = compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    assert report.bytes < 0.9 * report.original_bytes
    assert torch.equal(logits(compress.load(tmp_path / "out")), logits(plain(source)))
    export(tmp_path / "out", tmp_path / "plain", to={torch.float16: "fp16", torch.float32: "fp32"}[dtype])
    check_same_tensors(tmp_path / "plain", source)


def test_a_float32_copy_of_a_bfloat16_model_is_a_third_of_its_size(tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    source = rewritten(tiny_model("llama"), tmp_path / "source", wide, dtype="float32")
    report = compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    assert report.bytes < 0.37 * report.original_bytes
    assert torch.equal(logits(compress.load(tmp_path / "out")), logits(plain(source)))


def test_tensors_of_mixed_dtypes_are_exported_as_they_were(tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float() + 1e-6
    source = rewritten(tiny_model("llama"), tmp_path / "source", tensors)
    compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    export(tmp_path / "out", tmp_path / "plain", to="original")
    check_same_tensors(tmp_path / "plain", source)
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("scheme, options", [("fp8", {}), ("int4", {"group_size": 32})])
def test_a_packed_checkpoint_is_coded_as_it_is_stored(
    scheme: str, options: dict[str, Any], tiny_compressed: Compressed, tmp_path: Path
) -> None:
    source = tiny_compressed("llama-tied-biased", scheme, **options)
    report = compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    assert report.bytes < (0.87 if scheme == "fp8" else 0.95) * report.original_bytes
    assert report.original_bytes == sum(entry.bytes for entry in Checkpoint(source).entries.values())
    assert any("coded as they are stored" in note for note in report.notes)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--against", str(source)])
    assert result.exit_code == 0, result.output
    assert torch.equal(logits(compress.load(tmp_path / "out")), logits(compress.load(source)))
    export(tmp_path / "out", tmp_path / "plain", to="original")
    check_same_tensors(tmp_path / "plain", source)
    assert torch.equal(logits(compress.load(tmp_path / "plain")), logits(compress.load(source)))
    export(tmp_path / "out", tmp_path / "bf16")
    export(source, tmp_path / "also")
    check_same_tensors(tmp_path / "bf16", tmp_path / "also")


def test_what_we_cannot_run_is_coded_too_and_the_way_back_is_named(tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    source = rewritten(
        tiny_model("llama"), tmp_path / "source", tensors, quantization_config={"quant_method": "gptq", "bits": 4}
    )
    compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    with pytest.raises(ValueError, match="'gptq'.*export it --to original"):
        compress.load(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "plain", to="original")
    check_same_tensors(tmp_path / "plain", source)


def test_a_rule_may_code_the_embedding_and_another_scheme_the_rest(tiny_model: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: embed_tokens, scheme: df11}\n- {match: lm_head, scheme: df11, coding: fixed}\n")
    report = compress.quantize(tiny_model("llama"), tmp_path / "out", "int8", rules=Rules(recipe), scoring=None)
    schemes = {line["name"]: line["scheme"] for line in report.tensors}
    assert schemes["model.embed_tokens"] == schemes["lm_head"] == "df11"
    assert schemes["model.layers.0.mlp.up_proj"] == "int8" and schemes["model.norm.weight"] is None
    compress.quantize(tiny_model("llama"), tmp_path / "int8", "int8", scoring=None)
    assert torch.equal(logits(compress.load(tmp_path / "out")), logits(compress.load(tmp_path / "int8")))
    packed, source = Source(tmp_path / "out"), Source(tiny_model("llama"))
    assert same_bits(packed.read("lm_head.weight"), source.read("lm_head.weight"))


def test_rules_leave_out_and_restrict_tensors_that_are_no_linears(tiny_model: Tiny, tmp_path: Path) -> None:
    forecast = compress.plan(tiny_model("llama"), "df11", rules=Rules(exclude=("embed_tokens",)))
    assert "model.embed_tokens" not in forecast.plan.modules and "lm_head" in forecast.plan.modules
    forecast = compress.plan(tiny_model("llama"), "df11", rules=Rules(include=("embed_tokens",)))
    assert list(forecast.plan.modules) == ["model.embed_tokens"]
    with pytest.raises(ValueError, match="did you mean 'embed_tokens'"):
        compress.plan(tiny_model("llama"), "df11", rules=Rules(include=("embed_token",)))


def test_a_decoder_that_errs_stops_the_run(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.df11 import Df11

    decode = Df11.decode

    def wrong(self: Df11, tensors: dict[str, Tensor]) -> Tensor:
        weight = decode(self, tensors).clone()
        weight.view(-1)[-1] = -weight.view(-1)[-1]
        return weight

    monkeypatch.setattr(Df11, "decode", wrong)
    with pytest.raises(RuntimeError, match="does not give back what it was given"):
        compress.quantize(tiny_model("one-layer"), tmp_path / "out", "df11", scoring=None)
    assert not (tmp_path / "out").exists()


def test_damage_that_the_headers_do_not_show_is_refused(tiny_compressed: Compressed, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_compressed("llama", "df11"), tmp_path / "out"))
    tensors = load_file(out / "model.safetensors")
    tensors["model.embed_tokens.table"][0, 1] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "compress.json").unlink()  # which would tell by its hashes
    with pytest.raises(ValueError, match="embed_tokens: the table of code lengths is damaged"):
        export(out, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_two_runs_write_the_same_bytes(tiny_model: Tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compress.quantize(tiny_model("gpt2"), tmp_path / name, "df11", scoring=None, command="same")
    for file in ("model.safetensors", "config.json", "compress.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_run_is_scored_as_the_original(llama_dir: Path, tmp_path: Path) -> None:
    how = compress.Scoring(tasks=(), limit=1, window=64)
    report = compress.quantize(llama_dir, tmp_path / "out", "df11", scoring=how)
    check_scored_as_the_original(report)


def test_experts_are_scored_as_the_original(llama_dir: Path, tiny_config: Callable[[str], Any], tmp_path: Path) -> None:
    config, source = tiny_config("mixtral"), tmp_path / "source"
    config.vocab_size = AutoConfig.from_pretrained(llama_dir).vocab_size
    torch.manual_seed(0)
    model_class(config)(config).to(torch.bfloat16).save_pretrained(source)
    for path in llama_dir.glob("tokenizer*"):
        shutil.copy(path, source)
    how = compress.Scoring(tasks=(), limit=2, window=32)
    check_scored_as_the_original(compress.quantize(source, tmp_path / "out", "df11", scoring=how))


def check_scored_as_the_original(report: Any) -> None:
    assert report.evaluation is not None
    assert report.evaluation["kl_mean"] == 0 and report.evaluation["top1_agreement"] == 1
    assert report.evaluation["perplexity"] == report.evaluation["reference_perplexity"]


def saved(model: PreTrainedModel, path: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start as zeros and norms as ones: then neither shows when lost
                parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return path


def wide_config(**fields: Any) -> Any:
    """Norms and biases of more than 1024 values, which are coded."""
    sizes = {"vocab_size": 64, "hidden_size": 1088, "num_hidden_layers": 1, "num_attention_heads": 2, **fields}
    return sizes | {"intermediate_size": 1088, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**wide_config(mlp_bias=True, attention_bias=True, num_key_value_heads=2))
    return saved(LlamaForCausalLM(config).to(torch.bfloat16), tmp_path_factory.mktemp("wide") / "model")


def test_norms_and_biases_that_are_coded_run_and_are_saved(wide_llama: Path, tmp_path: Path) -> None:
    compress.quantize(wide_llama, tmp_path / "out", "df11", scoring=None)
    model = compress.load(tmp_path / "out")
    assert torch.equal(logits(model), logits(plain(wide_llama)))
    model.save_pretrained(tmp_path / "saved")
    check_same_tensors(tmp_path / "saved", tmp_path / "out")
    wide = model_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32)
    wide.save_pretrained(tmp_path / "wide")
    check_same_tensors(tmp_path / "wide", tmp_path / "out")


def test_biases_beside_packed_linears_are_coded_too(wide_llama: Path, tmp_path: Path) -> None:
    compress.quantize(wide_llama, tmp_path / "fp8", "fp8", scoring=None)
    compress.quantize(tmp_path / "fp8", tmp_path / "out", "df11", scoring=None)
    assert torch.equal(logits(compress.load(tmp_path / "out")), logits(compress.load(tmp_path / "fp8")))


def test_a_bias_that_is_tied_to_another_is_filled_in_both_places(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {**wide_config(vocab_size=1088), "hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.2}
    source = saved(BertForMaskedLM(BertConfig(**sizes)).to(torch.bfloat16), tmp_path / "bert")
    compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    model = compress.load(tmp_path / "out")
    assert torch.equal(logits(model), logits(plain(source)))
    head = model.cls.predictions
    assert head.decoder.bias is head.bias and head.bias.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(compress.load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("call", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.to("cpu")])
def test_a_cast_of_the_model_does_not_touch_what_is_packed(
    dtype: torch.dtype, call: Callable[[Any], Any], tiny_model: Tiny, tmp_path: Path
) -> None:
    tensors = load_file(tiny_model("llama-tied-biased") / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=generator).mul(0.05).to(dtype) for name, t in tensors.items()}
    name = str(dtype).removeprefix("torch.")
    source = rewritten(tiny_model("llama-tied-biased"), tmp_path / "source", tensors, dtype=name)
    compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    found, wanted = call(compress.load(tmp_path / "out")), call(plain(source))
    assert (logits(found) - logits(wanted)).abs().max() < 0.02  # a linear's weight is rounded at another place
    assert found.model.layers[0].mlp.up_proj.weight.dtype == dtype


def test_ties_survive_being_worked_out_again(tiny_compressed: Compressed) -> None:
    for name in ("llama-tied-biased", "t5"):
        model = compress.load(tiny_compressed(name, "df11"))
        expected = logits(model)
        model.tie_weights()
        assert torch.equal(logits(model), expected)


def test_a_config_that_is_not_that_of_the_weights_is_refused(tiny_compressed: Compressed, tmp_path: Path) -> None:
    for field, value in (("vocab_size", 256), ("intermediate_size", 96)):
        out = Path(shutil.copytree(tiny_compressed("llama", "df11"), tmp_path / field))
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError, match="they do not belong together"):
            compress.load(out)


@pytest.mark.parametrize(
    "change", [{"schemes": 5}, {"base": [1]}, {"modules": {"model.embed_tokens": 9}}, {"modules": {"nothing": 0}}]
)
def test_a_config_that_is_not_whole_is_refused(
    change: dict[str, Any], tiny_compressed: Compressed, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny_compressed("one-layer", "df11"), tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    for call in (compress.load, lambda path: compress.load(path, coding="fixed"), Source):
        with pytest.raises(ValueError, match="quantization_config|nothing: no"):
            call(out)


def test_a_float8_tensor_that_no_config_explains_is_verified_as_it_is(tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    tensors["extra.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    source = rewritten(tiny_model("llama"), tmp_path / "source", tensors)
    compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--against", str(source)])
    assert result.exit_code == 0, result.output


def test_tensors_given_to_decode_are_checked_before_they_are_read() -> None:
    tensors = compress.encode(torch.randn(300, 300).bfloat16(), "df11")
    huge = torch.tensor([-(1 << 40), 1 << 40])
    sizes = tensors["chunk_bytes"].to(torch.int64)
    sizes[:2] += huge
    for wrong in ({"chunk_bytes": sizes}, {"table": tensors["table"].to(torch.int64)}):
        with pytest.raises(ValueError, match="df11: "):
            compress.decode({**tensors, **wrong}, "df11")
