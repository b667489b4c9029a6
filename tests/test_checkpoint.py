"""The streaming reader and writer, against the safetensors library."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.formats.checkpoint import DTYPES, Checkpoint
from compress.formats.shard import ShardWriter, tensor_bytes, write_index


def examples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randint(0, 255, (3,), dtype=torch.uint8, generator=generator),
        "misaligned": torch.randn(5, 3, generator=generator),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "view": torch.randn(4, 6, generator=generator).bfloat16().T,
        "stack": torch.randn(3, 2, 5, generator=generator).half(),
    }
    for name, dtype in DTYPES.items():
        bits = torch.randint(0, 2, (2, 8 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[name] = bits.bool()[:, :4] if dtype == torch.bool else bits.view(dtype)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor))


def write(path: Path, tensors: dict[str, torch.Tensor]) -> ShardWriter:
    with ShardWriter(path, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return writer


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = examples()
    write(tmp_path / "model.safetensors", tensors)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (
            read[name].dtype == tensor.dtype and read[name].shape == tensor.shape and bits(read[name]) == bits(tensor)
        )
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in examples().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape and bits(read) == bits(tensor)
        assert bytes(checkpoint.raw(name)) == bits(tensor)
        checkpoint.release(name)
        assert bits(checkpoint.read(name)) == bits(tensor)


def test_a_slice_of_a_stack_is_read_alone(tmp_path: Path) -> None:
    stack = torch.randn(3, 4, 5)
    save_file({"stack": stack}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read("stack", i), stack[i]) for i in range(3))


def test_changing_a_tensor_that_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    Checkpoint(tmp_path).read("a").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "a.safetensors", [("x", torch.float32, (2,))]) as writer:
        writer.add("x", torch.ones(2))
        assert not (tmp_path / "a.safetensors").exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_records_describe_the_bytes(tmp_path: Path) -> None:
    writer = write(tmp_path / "a.safetensors", {"x": torch.zeros(2, dtype=torch.uint8)})
    record = writer.records["x"]
    # SHA-256 of two zero bytes.
    assert record["sha256"] == "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
    assert (record["bytes"], record["dtype"], record["shape"], record["file"]) == (2, "U8", [2], "a.safetensors")


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "m.safetensors", examples())
        files.append((tmp_path / name / "m.safetensors").read_bytes())
    assert files[0] == files[1]


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    names = {}
    for i, name in enumerate("abc", 1):
        file = f"model-{i:05d}-of-00003.safetensors"
        write(tmp_path / file, {name: torch.full((2,), float(i))})
        names[name] = file
    write_index(tmp_path, names, 24)
    save_file({"stray": torch.ones(1)}, tmp_path / "other.safetensors")  # not in the index: not of the checkpoint
    checkpoint = Checkpoint(tmp_path)
    assert [checkpoint.read(name)[0].item() for name in checkpoint.entries] == [1.0, 2.0, 3.0]


def test_a_directory_that_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="convert it to safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 20, 60])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 12], [4, 20], [0, 1 << 40], [8, 4]])
def test_a_header_that_lies_about_offsets_is_refused(tmp_path: Path, offsets: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../evil.safetensors"}}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_a_tensor_that_the_index_promises_must_be_there(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "model.safetensors", "b": "model.safetensors"}, 4)
    with pytest.raises(ValueError, match="'b'"):
        Checkpoint(tmp_path)
