"""What a lossless checkpoint gives back is what was put in, or an error: never something else."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.exporting import export
from compress.formats.checkpoint import Checkpoint
from compress.pipeline import same_bits
from compress.recipe import Rules

Tiny = Callable[[str], Path]
Compressed = Callable[..., Path]


def check_same_tensors(a: Path, b: Path) -> None:
    found, wanted = Checkpoint(a), Checkpoint(b)
    assert found.entries.keys() == wanted.entries.keys()
    assert all(same_bits(found.read(name), wanted.read(name)) for name in wanted.entries)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 23)[None]).logits
    return found


@pytest.fixture
def damaged(tiny_compressed: Compressed, tmp_path: Path) -> Path:
    """One sign is wrong, which no decoder can see."""
    out = Path(shutil.copytree(tiny_compressed("llama", "df11"), tmp_path / "damaged"))
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.sign_mantissa"][0, 0] ^= 0x80
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("to", ["original", "bf16"])
def test_changed_bytes_are_not_exported(damaged: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(ValueError, match=r"lm_head.sign_mantissa is not what compress.json says"):
        export(damaged, tmp_path / "plain", to=to)
    assert not (tmp_path / "plain").exists()


def test_changed_bytes_are_not_compressed(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lm_head.sign_mantissa is not what compress.json says"):
        compress.quantize(damaged, tmp_path / "out", "fp8", scoring=None)
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_was_changed_is_refused_and_a_missing_one_is_not_needed(damaged: Path, tmp_path: Path) -> None:
    manifest = damaged / "compress.json"
    manifest.write_text(manifest.read_text().replace("lm_head", "lm_haed"))
    with pytest.raises(ValueError, match=r"compress.json: its bytes do not match.*delete it to go on unchecked"):
        export(damaged, tmp_path / "plain", to="original")
    manifest.unlink()
    export(damaged, tmp_path / "plain", to="original")
    assert (tmp_path / "plain").exists()


def test_packed_tensors_whose_description_is_lost_do_not_pass_for_plain_ones(
    tiny_compressed: Compressed, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny_compressed("gpt2", "df11"), tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    for attempt in (
        lambda: export(out, tmp_path / "plain"),
        lambda: compress.plan(out, "int4"),
        lambda: compress.plan(out, "df11"),
    ):
        with pytest.raises(ValueError, match="is packed, and config.json has no quantization_config"):
            attempt()


def test_our_own_packed_layout_is_coded_as_it_is_stored(
    tiny_compressed: Compressed, tmp_path: Path, tiny_model: Tiny
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: wte, scheme: df11}\n")
    for name, rules in (("packed", Rules()), ("mixed", Rules(recipe))):
        source, out = tmp_path / name, tmp_path / f"{name}-df11"
        compress.quantize(tiny_model("gpt2"), source, "fp8", rules=rules, scoring=None)
        report = compress.quantize(source, out, "df11", scoring=None)
        stored = sum(entry.bytes for entry in Checkpoint(source).entries.values())
        assert report.bytes < stored
        assert torch.equal(logits(compress.load(out)), logits(compress.load(source)))
        export(out, tmp_path / f"{name}-plain", to="original")
        packed = {name for name in Checkpoint(source).entries if name.endswith("qweight")}
        found = Checkpoint(tmp_path / f"{name}-plain")
        assert packed and all(same_bits(found.read(name), Checkpoint(source).read(name)) for name in packed)
        assert torch.equal(logits(compress.load(tmp_path / f"{name}-plain")), logits(compress.load(source)))
    check_same_tensors(tmp_path / "packed-plain", tmp_path / "packed")


def test_what_was_not_all_coded_without_loss_has_no_original(tiny_model: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: embed_tokens, scheme: df11}\n")
    compress.quantize(tiny_model("llama"), tmp_path / "out", "int4", method="rtn", rules=Rules(recipe), scoring=None)
    with pytest.raises(ValueError, match="not all was coded without loss.*export --to bf16"):
        export(tmp_path / "out", tmp_path / "plain", to="original")
    with pytest.raises(ValueError, match="nothing to undo"):
        export(tiny_model("llama"), tmp_path / "plain", to="original")


def test_a_saved_model_lists_nothing_that_it_does_not_store(tiny_model: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["extra.weight"] = torch.randn(64, 64).bfloat16()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    compress.quantize(source, tmp_path / "out", "df11", scoring=None)
    model = compress.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(compress.load(tmp_path / "saved")), logits(model))
    export(tmp_path / "saved", tmp_path / "plain", to="original")
    check_same_tensors(tmp_path / "plain", tiny_model("llama"))


def test_a_loaded_model_can_be_copied_and_compiled_but_not_resized(tiny_compressed: Compressed) -> None:
    model = compress.load(tiny_compressed("llama-tied-biased", "df11"))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(torch.compile(model, backend="eager")), expected)
    with pytest.raises(ValueError, match="packed embeddings cannot be resized"):
        model.resize_token_embeddings(1000)


def test_a_lossy_rule_for_what_is_no_linear_says_so(tiny_model: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: embed_tokens, scheme: int4}\n")
    with pytest.raises(ValueError, match="embed_tokens, which is no linear weight, and int4 takes no others"):
        compress.plan(tiny_model("llama"), "df11", rules=Rules(recipe))
