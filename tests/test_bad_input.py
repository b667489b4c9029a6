"""Bad input: one true line on stderr, the right exit code, nothing half-written."""

import functools
import json
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.cli import main
from compress.planning import VERSION

BAD_INPUT, FAILED = 2, 1


@pytest.fixture(scope="module")
def plain(tiny_model: Callable[[str], Path]) -> Path:
    """A Llama of one layer, without a tokenizer."""
    return tiny_model("one-layer")


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(plain, tmp_path / "model"))


def quantize(model: object, out: Path, *options: object) -> Result:
    command = ["quantize", str(model), "-o", str(out), *map(str, options)]
    command += [] if "--scheme" in options else ["--set", "method=rtn"]
    return CliRunner().invoke(main, [*command, *([] if "--tasks" in options else ["--no-eval"]), "--json"])


def assert_refused(result: Result, *words: str, code: int = BAD_INPUT, out: Path | None = None) -> None:
    """One line on stderr that holds all the words; nothing on stdout; no trace of the output."""
    lines = result.stderr.splitlines()
    assert result.exit_code == code, result.stderr
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    assert "Traceback" not in result.output and result.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]
    if out is not None:
        assert not out.exists() and not out.with_name(out.name + ".partial").exists()


# What is done to a model directory, and what the message must say.


def _save(model: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, model / name, {"format": "pt"})


def _change_header(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if changes.get(key, 0) is not None}
    path.write_text(json.dumps(kept | {key: value for key, value in changes.items() if value is not None}))


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _shards(model: Path, *, leave_out: bool = False, twice: bool = False) -> None:
    """Cuts the weights into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[4 if twice else 5 :]}
    index = {name: file for file, held in halves.items() for name in held}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file, held in halves.items():
        _save(model, {name: tensors[name] for name in held}, file)
    (model / "model.safetensors").unlink()
    if leave_out:
        (model / "b.safetensors").unlink()


def _poison(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 4] = value
    _save(model, tensors)


class Damage(NamedTuple):
    do: Callable[[Path], object]
    words: tuple[str, ...]


DOWN, HEAD = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_WHOLE = ("model.safetensors: not a whole safetensors file", "download it again")
DAMAGES = {
    "empty directory": Damage(lambda m: [p.unlink() for p in m.iterdir()], ("config.json does not exist",)),
    "no config": Damage(lambda m: (m / "config.json").unlink(), ("config.json does not exist",)),
    "no weights": Damage(lambda m: (m / WEIGHTS).unlink(), ("no *.safetensors file", "not a checkpoint")),
    "pickle only": Damage(
        lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), ("pytorch_model.bin is a pickle", "save_pretrained")
    ),
    "config no JSON": Damage(lambda m: (m / "config.json").write_text("{"), ("config.json: not JSON",)),
    "config a list": Damage(lambda m: (m / "config.json").write_text("[]"), ("config.json: not a JSON object",)),
    "config not text": Damage(lambda m: (m / "config.json").write_bytes(b"\xff\xfe\0"), ("config.json: not JSON",)),
    "config empty": Damage(lambda m: (m / "config.json").write_text("{}"), ("config.json",)),
    "no architecture": Damage(
        lambda m: _change_config(m, architectures=None), ("config.json names no architecture", "LlamaForCausalLM")
    ),
    "architecture unknown": Damage(
        lambda m: _change_config(m, architectures=["LLaMaForAll"]), ("'LLaMaForAll' is unknown",)
    ),
    "architecture no model": Damage(lambda m: _change_config(m, architectures=["AutoConfig"]), ("'AutoConfig'",)),
    "architectures a number": Damage(lambda m: _change_config(m, architectures=3), ("config.json",)),
    "architectures of numbers": Damage(lambda m: _change_config(m, architectures=[3]), ("config.json",)),
    "model type unknown": Damage(lambda m: _change_config(m, model_type="lama"), ("config.json", "lama")),
    "size no number": Damage(lambda m: _change_config(m, hidden_size="wide"), ("config.json", "hidden_size")),
    "size impossible": Damage(lambda m: _change_config(m, hidden_size=-1), ("config.json",)),
    "foreign quantization": Damage(
        lambda m: _change_config(m, quantization_config={"quant_method": "gptq"}), ("already compressed with 'gptq'",)
    ),
    "broken quantization": Damage(
        lambda m: _change_config(m, quantization_config={"quant_method": "compress", "version": VERSION}),
        ("quantization_config is not whole",),
    ),
    "weights empty": Damage(lambda m: _truncate(m / WEIGHTS, 0), NOT_WHOLE),
    "weights cut in the length": Damage(lambda m: _truncate(m / WEIGHTS, 5), NOT_WHOLE),
    "weights cut in the header": Damage(lambda m: _truncate(m / WEIGHTS, 100), NOT_WHOLE),
    "weights cut in the data": Damage(lambda m: _truncate(m / WEIGHTS, 9000), NOT_WHOLE),
    "weights no safetensors": Damage(lambda m: (m / WEIGHTS).write_bytes(bytes(range(256)) * 9), NOT_WHOLE),
    "header length a lie": Damage(lambda m: (m / WEIGHTS).write_bytes(b"\xff" * 4096), NOT_WHOLE),
    "offset beyond the end": Damage(
        lambda m: _change_header(m, lambda h: h[DOWN].update(data_offsets=[0, 1 << 40])), NOT_WHOLE
    ),
    "offsets overlap": Damage(
        lambda m: _change_header(m, lambda h: h[DOWN].update(data_offsets=h[HEAD]["data_offsets"])), NOT_WHOLE
    ),
    "offset negative": Damage(lambda m: _change_header(m, lambda h: h[DOWN].update(data_offsets=[-4, 0])), NOT_WHOLE),
    "shape a lie": Damage(lambda m: _change_header(m, lambda h: h[DOWN].update(shape=[9, 9])), NOT_WHOLE),
    "dtype unknown": Damage(lambda m: _change_header(m, lambda h: h[DOWN].update(dtype="F3")), NOT_WHOLE),
    "tensor without offsets": Damage(lambda m: _change_header(m, lambda h: h[DOWN].pop("data_offsets")), NOT_WHOLE),
    "shard missing": Damage(lambda m: _shards(m, leave_out=True), ("shard b.safetensors is missing", INDEX)),
    "tensor twice": Damage(lambda m: _shards(m, twice=True), ("is also in a.safetensors",)),
    "index no JSON": Damage(lambda m: (m / INDEX).write_text("{"), (INDEX, "not a safetensors index")),
    "index a list": Damage(lambda m: (m / INDEX).write_text("[]"), (INDEX, "not a safetensors index")),
    "index empty": Damage(lambda m: (m / INDEX).write_text('{"weight_map": {}}'), (INDEX,)),
    "index leads out": Damage(
        lambda m: (m / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}'), (INDEX, "of this directory")
    ),
    "index names more": Damage(
        lambda m: (m / INDEX).write_text('{"weight_map": {"x": "model.safetensors"}}'), ("'x'", "incomplete")
    ),
    "NaN": Damage(lambda m: _poison(m, DOWN, float("nan")), (DOWN, "NaN or infinity", "--exclude")),
    "infinity": Damage(lambda m: _poison(m, DOWN, float("-inf")), (DOWN, "NaN or infinity", "--exclude")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_model_is_refused(model: Path, tmp_path: Path, damage: Damage) -> None:
    damage.do(model)
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in model.iterdir()}
    assert_refused(quantize(model, out), *damage.words, out=out)
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_the_refusal_of_a_nan_tells_a_way_that_works(model: Path, tmp_path: Path) -> None:
    _poison(model, DOWN, float("nan"))
    refused = quantize(model, tmp_path / "out", "--shard-size", "8KB")
    assert_refused(refused, out=tmp_path / "out")
    module = refused.stderr.split("--exclude '")[1].split("'")[0]
    done = quantize(model, tmp_path / "out", "--exclude", module)
    assert done.exit_code == 0, done.stderr


def test_a_model_that_is_not_there(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert_refused(quantize(tmp_path / "missing", out), "missing does not exist", out=out)
    assert_refused(quantize(plain / "config.json", out), "is a file; give the directory", out=out)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(quantize("no-such-owner/no-such-model", out), "no-such-owner/no-such-model is no directory", out=out)


OPTIONS = {
    "scheme": (("--scheme", "it4"), ("unknown scheme 'it4'", "did you mean 'int4'?")),
    "option": (("--set", "group_sizes=64"), ("int4 has no option 'group_sizes'", "did you mean 'group_size'?")),
    "value": (("--set", "group_size=abc"), ("group_size is 'abc'", "int")),
    "value out of range": (("--set", "group_size=-8"), ("group_size",)),
    "bits": (("--set", "bits=99"), ("bits",)),
    "choice": (("--scheme", "fp8", "--set", "granularity=chanel"), ("granularity", "did you mean 'channel'?")),
    "set twice": (("--set", "bits=3", "--set", "bits=8"), ("--set bits: given twice",)),
    "calibration from nowhere": (("--set", "method=gptq", "--calibration", ""), ("calibration: no source; name",)),
    "set without =": (("--set", "bits"), ("--set bits: write KEY=VALUE",)),
    "set without key": (("--set", "=4"), ("int4 has no option ''",)),
    "include": (("--include", "dawn_proj"), ("--include dawn_proj", "matches no linear module", "'down_proj'")),
    "exclude": (("--exclude", "re:q_porj"), ("--exclude re:q_porj", "matches no linear module")),
    "expression": (("--exclude", "re:(("), ("--exclude re:((", "not a regular expression")),
    "shard size": (("--shard-size", "many"), ("size 'many' is not understood", "3.2GB")),
    "shard size negative": (("--shard-size", "-5GB"), ("size '-5GB' is not understood",)),
    "shard size zero": (("--shard-size", "0"), ("0",)),
    "calibration": (("--calibration", "/nowhere/text.txt"), ("/nowhere/text.txt", "cannot be read")),
    "calibration unused": (("--calibration", "builtin"), ("scheme int4 uses no calibration data",)),
    "recipe": (("--recipe", "/nowhere/recipe.yaml"), ("recipe /nowhere/recipe.yaml cannot be read",)),
    "tokenizer": (("--tasks", ""), ("no tokenizer that loads",)),
}


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=list(OPTIONS))
def test_a_wrong_option_is_refused(
    plain: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(quantize(plain, tmp_path / "out", *options), *words, out=tmp_path / "out")


SCORING = {
    "text": (("--text", "/nowhere/text.txt"), ("/nowhere/text.txt", "cannot be read")),
    "text of a wrong kind": (("--text", __file__), ("neither a .txt nor a .jsonl file",)),
    "task": (("--tasks", "no_such_task_at_all"), ("task no_such_task_at_all: unknown",)),
    "include path": (
        ("--include-path", "/nowhere", "--tasks", "builtin_cloze"),
        ("include_path /nowhere: no such folder",),
    ),
    "window": (("--window", "4096"), ("window: 4096 tokens exceed the context", "--window 128")),
}


@pytest.mark.parametrize(("options", "words"), SCORING.values(), ids=list(SCORING))
def test_what_cannot_be_scored_is_refused_before_anything_is_compressed(
    llama_dir: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    # Listing the thousands of tasks that lm-eval ships takes half a minute, and none of them is near.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    tasks = () if "--tasks" in options else ("--tasks", "")
    assert_refused(quantize(llama_dir, tmp_path / "out", *options, *tasks), *words, out=tmp_path / "out")


RECIPES = {
    "not YAML": ("- {match: [", "is not YAML"),
    "not text": (b"\xff\xfe\x00", "is not YAML"),
    "not a list": ("match: down_proj", "is not a list of rules"),
    "empty": ("", "is not a list of rules"),
    "no rule": ("- down_proj", "rule 1: is 'down_proj'"),
    "key misspelt": ("- {mach: down_proj, scheme: int8}", "rule 1: needs `match`; it has mach, scheme"),
    "match no text": ("- {match: 3, scheme: int8}", "rule 1: match is 3"),
    "scheme unknown": ("- {match: down_proj, scheme: int9}", "rule 1: unknown scheme 'int9'; did you mean 'int8'?"),
    "option unknown": ("- {match: down_proj, scheme: int4, bit: 3}", "rule 1: int4 has no option 'bit'"),
    "value wrong": ("- {match: down_proj, scheme: int4, bits: x}", "rule 1: int4: bits is 'x'"),
    "expression": ("- {match: 're:[', scheme: int8}", "rule 1: not a regular expression"),
    "matches nothing": ("- {match: q_proj, scheme: int8}\n- {match: gate, scheme: none}", "rule 2: 'gate' matches no"),
}


@pytest.mark.parametrize(("text", "word"), RECIPES.values(), ids=list(RECIPES))
def test_a_wrong_recipe_is_refused(plain: Path, tmp_path: Path, text: str | bytes, word: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(quantize(plain, tmp_path / "out", "--recipe", recipe), "recipe.yaml", word, out=tmp_path / "out")


def test_an_output_in_the_way_stays_as_it_is(plain: Path, tmp_path: Path) -> None:
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("mine")
    full.mkdir()
    (full / "thesis.txt").write_text("mine too")
    assert_refused(quantize(plain, file), "is not a directory")
    assert_refused(quantize(plain, full), "exists", "--overwrite")
    assert_refused(quantize(plain, full, "--overwrite"), "is no checkpoint, so --overwrite leaves it alone")
    assert file.read_text() == "mine" and (full / "thesis.txt").read_text() == "mine too"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_output_and_model_inside_one_another(plain: Path, model: Path) -> None:
    for out in (model, model / "out", model.parent):
        assert_refused(quantize(model, out, "--overwrite"), "lie inside one another")
    assert {p.name: p.read_bytes() for p in model.iterdir()} == {p.name: p.read_bytes() for p in plain.iterdir()}


def test_a_place_that_cannot_be_written(plain: Path, tmp_path: Path) -> None:
    assert_refused(quantize(plain, Path("/proc/no/out")), "output /proc/no/out cannot be written", code=FAILED)
    (tmp_path / "file").write_text("mine")
    assert_refused(quantize(plain, tmp_path / "file" / "out"), "file", code=FAILED)


def test_a_disk_too_small_is_told_before_anything_is_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    result = quantize(plain, tmp_path / "out")
    assert_refused(result, "more bytes are needed and 1,000 are free", code=FAILED, out=tmp_path / "out")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes beyond `size` fail in the middle, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_was_finished(plain: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--shard-size", "5KB")
    with files_of_at_most(6000):
        stopped = quantize(plain, out, *options)
    message = "File too large; what was finished is kept, make room and run it again"
    assert_refused(stopped, message, code=FAILED)
    kept = sorted((tmp_path / "out.partial" / "checkpoint").glob("*.safetensors"))
    assert kept and not out.exists()
    inodes = {path.name: path.stat().st_ino for path in kept}
    assert quantize(plain, out, *options).exit_code == 0
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes  # not written a second time
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 0


def test_a_disk_that_is_full_at_once_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    with files_of_at_most(1000):
        stopped = quantize(plain, tmp_path / "out")
    assert_refused(stopped, "File too large", code=FAILED, out=tmp_path / "out")


def test_export_refuses_what_does_not_fit_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    _poison(model, DOWN, 1e30)
    out = tmp_path / "plain"
    result = CliRunner().invoke(main, ["export", str(model), "--to", "fp16", "-o", str(out), "--json"])
    assert_refused(result, DOWN, "do not fit into fp16", "bf16", out=out)


@pytest.mark.parametrize("command", ["plan", "eval", "export"])
def test_other_commands_refuse_a_damaged_model_too(model: Path, tmp_path: Path, command: str) -> None:
    options = ["-o", str(tmp_path / "out")] if command == "export" else []
    if command == "eval":
        options = ["--tasks", ""]
    _truncate(model / WEIGHTS, 9000)
    (model / "tokenizer.json").write_text("{")
    result = CliRunner().invoke(main, [command, str(model), *options, "--json"])
    assert_refused(result, "tokenizer" if command == "eval" else NOT_WHOLE[0], out=tmp_path / "out")
