"""compress.json: any bit flipped, any tensor missing or added is found and named."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from compress.api import quantize
from compress.cli import main
from compress.formats import manifest


@pytest.fixture(scope="module")
def packed(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output: three shards, tokenizer, card, report."""
    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(llama_dir, out, "fp8", scoring=None, shard_size="50KB")
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def assert_named(directory: Path, *names: str) -> None:
    """verify exits 1, and every line names what it found."""
    result = verify(directory)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    for name in names:
        assert any(line.startswith("Error:") and name in line for line in result.stderr.splitlines()), result.stderr


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_an_untouched_directory_passes(packed: Path) -> None:
    assert len(list(packed.glob("*.safetensors"))) >= 3
    assert manifest.verify(packed) == []
    result = verify(packed, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"ok": True, "problems": [], "tensors": []}


def test_a_flipped_bit_in_any_file_is_found(packed: Path, copy: Path) -> None:
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    assert {"README.md", "config.json", "tokenizer.json", "compress.json", "report.json"} <= {p.name for p in files}
    for path in files:
        bits = 8 * path.stat().st_size
        for bit in sorted({0, 7, 8, 63, 64, 100, *range(5, bits, bits // 12 + 1), bits - 8, bits - 1} & {*range(bits)}):
            flip(path, bit)
            problems = manifest.verify(copy)
            assert problems and all(problem.startswith(path.name) for problem in problems), (path.name, bit, problems)
            flip(path, bit)
    assert manifest.verify(copy) == []


def test_every_bit_of_a_sealed_document_counts(tmp_path: Path) -> None:
    path = tmp_path / "compress.json"
    path.write_text(manifest.seal({"a": [1, 2.5, None], "b": {"c": "ü"}}))
    assert manifest.unseal(path) == {"a": [1, 2.5, None], "b": {"c": "ü"}}
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        with pytest.raises(ValueError, match=r"compress\.json"):
            manifest.unseal(path)
        flip(path, bit)


def test_a_changed_tensor_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    (length,) = struct.unpack("<Q", shard.read_bytes()[:8])
    header = json.loads(shard.read_bytes()[8 : 8 + length])
    for name in [name for name in header if name != "__metadata__"]:
        start, end = header[name]["data_offsets"]
        for byte in (start, end - 1):
            flip(shard, 8 * (8 + length + byte))
            assert manifest.verify(copy) == [f"{shard.name}: tensor {name} has changed"]
            flip(shard, 8 * (8 + length + byte))


def test_a_tensor_taken_out_or_put_in_is_found(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    original = shard.read_bytes()
    first = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, shard)
    assert_named(copy, f"{shard.name}: tensor {first} is missing")
    save_file({**tensors, "added": torch.zeros(1)}, shard)
    assert_named(copy, f"{shard.name}: tensor added is not part of what was written")
    shard.write_bytes(original)
    save_file({"added": torch.zeros(1)}, copy / "more.safetensors")
    assert_named(copy, "more.safetensors")
    (copy / "more.safetensors").rename(copy / "consolidated.safetensors.index.json")
    assert_named(copy, "consolidated.safetensors.index.json")


def test_a_missing_file_is_named(packed: Path, copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        if path.name == manifest.NAME:
            continue
        path.unlink()
        assert_named(copy, path.name)
        shutil.copyfile(packed / path.name, path)
    assert manifest.verify(copy) == []


def test_a_truncated_and_an_empty_file_are_named(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        data = path.read_bytes()
        for shorter in (data[:-1], data[:4], b""):
            path.write_bytes(shorter)
            assert_named(copy, path.name)
        path.write_bytes(data)


def test_all_that_is_wrong_is_told_at_once(copy: Path) -> None:
    (copy / "config.json").unlink()
    flip(copy / "tokenizer.json", 3)
    flip(copy / "report.json", 80)
    assert_named(copy, "config.json: missing", "tokenizer.json: its bytes", "report.json")
    report = json.loads(verify(copy, "--json").stdout)
    assert not report["ok"] and len(report["problems"]) == 3


def test_a_directory_without_a_manifest_cannot_be_verified(llama_dir: Path, tmp_path: Path) -> None:
    none = "does not exist, or is no directory"
    places = {llama_dir: "no compress.json there", tmp_path / "nothing": none, llama_dir / "config.json": none}
    for place, message in places.items():
        result = verify(place)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1 and message in result.stderr
    (tmp_path / "compress.json").write_text("[]")
    assert_named(tmp_path, "compress.json: not as it was written")


def test_against_the_original_passes(packed: Path, llama_dir: Path) -> None:
    result = verify(packed, "--against", llama_dir, "--json")
    assert result.exit_code == 0, result.stderr
    lines = {line["name"]: line for line in json.loads(result.stdout)["tensors"]}
    norm, down = lines["model.norm.weight"], lines["model.layers.0.mlp.down_proj.weight"]
    assert norm["action"] == "copied" and norm["equal"] and norm["relative_error"] == 0
    assert down["action"] == "coded" and not down["equal"] and 0 < down["relative_error"] < 0.05


def test_against_another_model_fails(packed: Path, llama_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama_dir, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):  # a coded and a copied one
        changed = {**tensors, name: tensors[name] + 1}
        save_file(changed, other / "model.safetensors", {"format": "pt"})
        result = verify(packed, "--against", other)
        assert result.exit_code == 1
        wrong = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
        assert wrong == [f"Error: {name}: the original is not the one that was compressed"]
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = torch.zeros(2)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    result = verify(packed, "--against", other)
    assert result.exit_code == 1
    assert "Error: model.norm.weight: the original does not have it" in result.stderr
    assert "Error: model.extra.weight: not accounted for in the manifest" in result.stderr
