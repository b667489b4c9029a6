"""The Python functions beside `quantize`, `load` and `evaluate`: what they return, and that nothing shadows them."""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress


def test_every_function_stays_one_whatever_is_imported() -> None:
    """A module of the same name would take its place."""
    modules = {module.name for module in pkgutil.iter_modules(compress.__path__)}
    assert "api" in modules and not modules & set(compress.__all__)
    for name in sorted(modules - {"__main__"}):
        importlib.import_module(f"compress.{name}")
    assert [name for name in compress.__all__ if not callable(getattr(compress, name))] == []


def test_a_directory_is_verified(llama_dir: Path, tmp_path: Path) -> None:
    compress.quantize(llama_dir, tmp_path / "out", "fp8", scoring=None)
    found = compress.verify(str(tmp_path / "out"), against=str(llama_dir))
    assert found.ok and found.problems == []
    errors = {line.name: line.relative_error for line in found.tensors}
    assert errors["model.embed_tokens.weight"] == 0 < errors["model.layers.0.mlp.up_proj.weight"] < 0.05
    assert compress.verify(tmp_path / "out").tensors == []
    (tmp_path / "out/config.json").write_text("{}")
    assert not compress.verify(tmp_path / "out").ok
    with pytest.raises(ValueError, match=r"no compress\.json there"):
        compress.verify(llama_dir)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        compress.verify(tmp_path / "nowhere")


def test_a_plain_copy_is_exported(llama_dir: Path, tmp_path: Path) -> None:
    compress.quantize(llama_dir, tmp_path / "out", "df11", scoring=None)
    compress.export(str(tmp_path / "out"), str(tmp_path / "plain"), "original")
    plain, original = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "plain", llama_dir)
    )
    assert plain.keys() == original.keys() and all(torch.equal(plain[name], original[name]) for name in plain)
    with pytest.raises(ValueError, match="form 'bf17' is unknown"):
        compress.export(tmp_path / "out", tmp_path / "other", "bf17")


def test_a_smaller_copy_says_how_it_was_made(llama_dir: Path, tmp_path: Path) -> None:
    compress.quantize(llama_dir, tmp_path / "out", "bitstack", scoring=None, scaling="none")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    written = compress.trim(tmp_path / "out", tmp_path / "small", size * 3 // 4)
    assert written == (tmp_path / "small/model.safetensors").stat().st_size <= size * 3 // 4
    assert f"{size * 3 // 4})" in (tmp_path / "small/README.md").read_text()
    assert json.loads((tmp_path / "small/compress.json").read_text())["trimmed"] == {"size": size * 3 // 4}
