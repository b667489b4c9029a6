"""Checkpoints made to harm, or damaged past their headers: nothing runs, nothing crashes, one line says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import compress
from compress.cli import main
from compress.exporting import export
from compress.source import Source


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.fixture
def packed(tiny_compressed: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_compressed("llama", "int4", group_size=32), tmp_path / "packed"))


def test_code_that_comes_with_a_checkpoint_does_not_run(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("one-layer"), tmp_path / "model"))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(model, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    for command in (["plan", str(model)], ["eval", str(model), "--tasks", ""]):
        done = CliRunner().invoke(main, command, input="y\n" * 9)
        assert done.exit_code == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "local, shape", [("weight_packed", (64, 10000)), ("weight_packed", (1, 8)), ("weight_scale", (64, 500))]
)
def test_a_packed_tensor_of_another_shape_is_refused(packed: Path, local: str, shape: tuple[int, int]) -> None:
    tensors = load_file(packed / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{local}"
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    for read in (Source, compress.load):
        with pytest.raises(ValueError, match=r"q_proj: weight_\w+ is Spec.*and int4 needs"):
            read(packed)


def test_a_pickle_is_not_opened(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    shutil.copy(tiny_model("one-layer") / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        compress.load(tmp_path)


@pytest.mark.parametrize("value", ["x", [1], {"quant_method": "compressed-tensors", "config_groups": []}])
def test_a_quantization_config_that_is_none_is_refused(packed: Path, value: object) -> None:
    edit_config(packed, quantization_config=value)
    with pytest.raises(ValueError, match="quantization_config"):
        Source(packed)


def test_a_tied_copy_cannot_be_compressed_by_name(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("llama-tied-biased"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="'lm_head' matches no linear module"):
        compress.plan(model, rules=compress.Rules(include=("lm_head",)))
    assert "lm_head" not in compress.plan(model, rules=compress.Rules(include=("re:.",))).plan.modules


def test_transformers_fp8_with_one_scale_is_read(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("one-layer"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = torch.ones(64, 32).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale_inv"] = torch.tensor(0.5)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    edit_config(model, quantization_config={"quant_method": "fp8", "weight_block_size": None})
    export(model, tmp_path / "plain")
    assert torch.equal(Source(tmp_path / "plain").read(f"{name}.weight"), torch.full((64, 32), 0.5).bfloat16())


def test_several_schemes_are_read_back_where_transformers_renames_modules(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model("mixtral"), tmp_path / "model"))
    rules = compress.Rules(recipe=tmp_path / "r.yaml", include=("self_attn.q_proj", "self_attn.o_proj"))
    (tmp_path / "r.yaml").write_text("- {match: 're:q_proj', scheme: int8, group_size: 32}\n")
    compress.quantize(model, tmp_path / "out", "int4", method="rtn", rules=rules, scoring=None, group_size=32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["compress"]["modules"]["model.layers.0.self_attn.q_proj"] == 1
    schemes = {module: packed.scheme.to_dict()["bits"] for module, packed in Source(tmp_path / "out").packed.items()}
    assert set(schemes.values()) == {4, 8} and len(schemes) == 4
