"""Saved statistics: measured once on the uncompressed model, and every scheme is fitted with them to the same bytes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compress
from compress.blocks import Blocks
from compress.calibrate import Calibration
from compress.cli import main
from compress.formats.checkpoint import Checkpoint
from compress.formats.manifest import file_sha256
from compress.int4 import Int4
from compress.samples import Samples, draw
from compress.source import Source
from compress.statistics import HESSIAN, Statistics, identity, pack, unpack
from compress.stats import Accumulator
from compress.structure import Structure, build, read_config

TEXT = Calibration(samples=6, seq_len=32)


def run(model: Path, out: Path, stats: Path, **options: Any) -> Any:
    how = {"bits": 3, "group_size": 32, "method": "gptq", "scoring": None, "command": "same", "stats": stats}
    return compress.quantize(model, out, "int4", **{**how, **options})


def bits(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(path)
    return {name: bytes(checkpoint.raw(name)) if entry.bytes else b"" for name, entry in checkpoint.entries.items()}


@pytest.fixture(scope="module")
def source(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which a few channels behind each norm are much larger than the others: scales are folded there."""
    path = tmp_path_factory.mktemp("source") / "llama"
    shutil.copytree(llama_dir, path)
    stored = load_file(path / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("layernorm.weight"):
            tensor[:3] *= 20
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of `source` with Hessians, and beside them, in `first`, what was made when they were measured."""
    folder = tmp_path_factory.mktemp("stats")
    run(source, folder / "first", folder / "file", calibration=TEXT)
    return folder / "file"


@pytest.fixture
def unrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model may run."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr(Blocks, "__init__", refused)
    monkeypatch.setattr("compress.run.draw", refused)
    yield


def test_a_triangle_is_unpacked_to_the_matrix() -> None:
    matrix = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert pack(matrix).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(unpack(pack(matrix)), matrix)
    for n in (1, 2, 17):
        x = torch.randn(5, n)
        assert torch.equal(unpack(pack(x.T @ x)), (x.T @ x).triu() + (x.T @ x).triu(1).T)


def test_they_are_those_of_the_uncompressed_model(saved: Path, source: Path) -> None:
    """The same in the most obvious way: the whole model in memory, once."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model, found = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), Statistics(saved)
    linears = Structure(build(read_config(source)), Source(source).specs).linears
    sums = {module: Accumulator(hessian=True) for module in linears}
    for module, linear in linears.items():
        model.get_submodule(linear.path).register_forward_pre_hook(lambda _, x, to=sums[module]: to.add(x[0]))
    cache = DynamicCache()
    with torch.no_grad():
        model(draw("builtin", source, 6, 32, 0).tokens, past_key_values=cache)
    for module, expected in ((module, total.stats()) for module, total in sums.items()):
        measured = found.stats(module, [HESSIAN])
        assert measured is not None and expected is not None and measured.tokens == expected.tokens == 6 * 32
        for part in ("second_moment", "absmean", "absmax", "hessian"):
            torch.testing.assert_close(getattr(measured, part), getattr(expected, part), rtol=1e-3, atol=1e-5)
    for i, layer in enumerate(cache.layers):
        largest = found.cached(f"model.layers.{i}.self_attn").found
        assert largest is not None and layer.keys is not None and layer.values is not None
        torch.testing.assert_close(largest, torch.stack([layer.keys.abs().max(), layer.values.abs().max()]))
    assert [fold.producers[0].rpartition(".")[2] for fold in found.folds("model.layers.0", ["scale"])] == [
        "input_layernorm",
        "post_attention_layernorm",
        "v_proj",
        "up_proj",
    ]


def test_an_input_that_layers_share_is_stored_once(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        hessians = sorted(name for name in file.keys() if name.endswith("|hessian"))
        sizes = {file.get_slice(name).get_shape()[0] for name in hessians}
    of_first = [name.split(".")[-1] for name in hessians if "layers.0." in name]
    assert of_first == ["down_proj|hessian", "gate_proj|hessian", "k_proj|hessian", "o_proj|hessian"]
    assert sizes == {64 * 65 // 2, 128 * 129 // 2}


@pytest.mark.usefixtures("unrun")
def test_a_run_that_finds_them_writes_what_the_run_wrote_that_measured_them(
    saved: Path, source: Path, tmp_path: Path
) -> None:
    before = saved.read_bytes()
    run(source, tmp_path / "out", saved)
    assert bits(tmp_path / "out") == bits(saved.parent / "first") and saved.read_bytes() == before
    recipes = [
        json.loads((path / "compress.json").read_text())["recipe"]
        for path in (tmp_path / "out", saved.parent / "first")
    ]
    assert recipes[0] == recipes[1]
    assert recipes[0]["statistics"] == {"sha256": file_sha256(saved)}
    assert recipes[0]["calibration"]["samples"] == 6 and len(recipes[0]["calibration"]["sha256"]) == 64


@pytest.mark.usefixtures("unrun")
def test_weights_are_fitted_to_them(saved: Path, source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", saved)
    name, scheme = "model.layers.1.mlp.down_proj", Int4(bits=3, group_size=32, method="gptq")
    made = scheme.encode(Checkpoint(source).read(f"{name}.weight"), Statistics(saved).stats(name, [HESSIAN]))
    for local, tensor in made.items():
        assert torch.equal(Checkpoint(tmp_path / "out").read(f"{name}.{local}"), tensor)
    assert all(0 < line["output_error"] < line["relative_error"] for line in report.tensors if line["scheme"])


@pytest.mark.usefixtures("unrun")
def test_they_serve_other_schemes_options_and_rules(saved: Path, source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "awq", saved, method="awq+gptq", bits=4, group_size=64)
    assert '"folded"' in (tmp_path / "awq" / "compress.json").read_text()
    verified = CliRunner().invoke(main, ["verify", str(tmp_path / "awq"), "--against", str(source)])
    assert verified.exit_code == 0
    how: dict[str, Any] = {"scoring": None, "stats": saved, "kv_cache": "fp8"}
    compress.quantize(source, tmp_path / "static", "fp8", activations="static", **how)
    scale = Checkpoint(tmp_path / "static").read("model.layers.1.self_attn.k_scale")
    largest = Statistics(saved).cached("model.layers.1.self_attn").found
    assert largest is not None and scale.item() == pytest.approx(largest[0].item() / 448, rel=2**-8)
    compress.quantize(source, tmp_path / "nv", "nvfp4", method="gptq", scoring=None, stats=saved)
    assert compress.load(tmp_path / "nv")(torch.arange(3, 9)[None]).logits.isfinite().all()


ARCHITECTURES = ["phi3", "gpt2", "mamba", "t5", "mixtral", "gpt-oss"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_measured_and_fitted_alike_from_the_file(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("compress.run.draw", lambda *_: Samples(tokens, "random"))
    how: dict[str, Any] = {"method": "awq+gptq", "bits": 4}
    report = run(tiny_model(name), tmp_path / "a", tmp_path / "file", **how)
    run(tiny_model(name), tmp_path / "b", tmp_path / "file", **how)
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    coded = [line for line in report.tensors if line["scheme"]]
    unseen = [line["name"] for line in coded if line["output_error"] is None]
    assert all(".experts." in module or "dt_proj" in module for module in unseen) and len(unseen) < len(coded) / 2
    assert all(line["output_error"] < 0.3 for line in coded if line["output_error"])


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches kill -9."""


@pytest.mark.parametrize(
    "step", ["compress.blocks.Blocks.close", "compress.statistics._join", "compress.run.calibrate"]
)
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_run_goes_on_and_writes_the_same_file_and_bytes(
    step: str, late: bool, saved: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    owner_name, _, attribute = step.rpartition(".")
    owner: Any = Blocks if owner_name.endswith("Blocks") else import_module(owner_name)
    original, calls = getattr(owner, attribute), [0]

    def dying(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if late:
            made = original(*arguments, **keywords)
        if calls[0] == (2 if attribute == "close" else 1):
            raise Killed
        return made if late else original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, dying)
        with pytest.raises(Killed):
            run(source, tmp_path / "out", tmp_path / "file", calibration=TEXT)
    assert (tmp_path / "file").exists() == (attribute == "calibrate" or (attribute == "_join" and late))
    run(source, tmp_path / "out", tmp_path / "file", calibration=TEXT)
    assert (tmp_path / "file").read_bytes() == saved.read_bytes()
    assert bits(tmp_path / "out") == bits(saved.parent / "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def command(model: Path, out: Path, stats: Path, *options: Any) -> Any:
    arguments = ["quantize", model, "-o", out, "--stats", stats, "--no-eval", *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Any, *messages: str) -> bool:
    """In one line, with exit code 2."""
    return result.exit_code == 2 and result.stderr.count("\n") == 1 and all(part in result.stderr for part in messages)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x10\0\0\0\0\0\0\0{"], ids=["empty", "text", "short"])
def test_a_file_that_is_something_else_is_refused_and_left_alone(content: bytes, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert refused(command(source, tmp_path / "out", tmp_path / "file"), "is no whole file of statistics")
    assert (tmp_path / "file").read_bytes() == content and not (tmp_path / "out").exists()


def test_a_checkpoint_is_no_file_of_statistics_and_is_left_alone(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "model.safetensors", tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    assert refused(command(source, tmp_path / "out", tmp_path / "file"), "is no file of statistics; it stays as it is")
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize("kept", [100, 0.5, 0.999])
def test_a_truncated_file_is_refused_and_left_alone(kept: float, saved: Path, source: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    part = whole[: kept if isinstance(kept, int) else int(kept * len(whole))]
    (tmp_path / "file").write_bytes(part)
    assert refused(command(source, tmp_path / "out", tmp_path / "file"), "is no whole file of statistics")
    assert (tmp_path / "file").read_bytes() == part


@pytest.mark.parametrize(
    "about", ["{}", "[1]", "7", '{"version": 1}', '{"version": 2}', '{"version": 2, "model": 5, "blocks": []}']
)
def test_a_file_whose_description_is_not_whole_is_refused(about: str, source: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "file", {"compress.statistics": about})
    assert refused(command(source, tmp_path / "out", tmp_path / "file"), f"stats {tmp_path / 'file'}: ")


def test_places_where_no_file_can_be_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert refused(command(source, out, tmp_path), "is a directory; name a file")
    assert refused(command(source, out, tmp_path / "absent" / "file"), "no directory that can be written to")
    assert refused(command(source, out, source / "file"), "lies in", "name a file elsewhere")
    assert refused(command(source, out, out / "file"), "lies in", "name a file elsewhere")
    assert refused(command(source, out, tmp_path / "out.partial" / "file"), "lies in", "name a file elsewhere")
    assert not list(tmp_path.iterdir())


def test_a_scheme_that_needs_no_data_refuses_the_option(source: Path, tmp_path: Path) -> None:
    result = command(source, tmp_path / "out", tmp_path / "file", "--scheme", "fp8")
    assert refused(result, "scheme fp8 uses no calibration data as it is; leave out --stats")


def test_statistics_of_another_model_are_refused(saved: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "other")
    stored = load_file(tmp_path / "other" / "model.safetensors")
    stored["model.norm.weight"][0] += 1
    save_file(stored, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert refused(
        command(tmp_path / "other", tmp_path / "out", saved), "measured on a model of other weights or config"
    )
    config = json.loads((source / "config.json").read_text())
    shutil.copy(source / "model.safetensors", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert refused(
        command(tmp_path / "other", tmp_path / "out", saved), "measured on a model of other weights or config"
    )
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_model_is_the_same_model(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    assert identity(Source(tmp_path / "copy")) == identity(Source(source))


def test_other_calibration_text_is_refused_where_it_is_named(saved: Path, source: Path, tmp_path: Path) -> None:
    result = command(source, tmp_path / "out", saved, "--samples", "5", "--seq-len", "32")
    assert refused(result, "measured on other tokens (builtin, 6 samples, 32 seq_len)")
    same = ("--samples", "6", "--seq-len", "32", "--set", "group_size=32")
    assert command(source, tmp_path / "out", saved, *same).exit_code == 0


def test_without_hessians_they_serve_what_needs_none_and_say_so_to_others(source: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"scoring": None, "stats": tmp_path / "file", "activations": "static"}
    compress.quantize(source, tmp_path / "fp8", "fp8", calibration=TEXT, **how)
    with safe_open(tmp_path / "file", "pt") as file:
        assert not any(name.endswith("|hessian") for name in file.keys())
    compress.quantize(source, tmp_path / "int8", "int8", smooth=False, **how)
    with pytest.raises(ValueError, match="holds no samples, and .* name a new file, which then has them, or set smoo"):
        compress.quantize(source, tmp_path / "smooth", "int8", **how)
    result = command(source, tmp_path / "out", tmp_path / "file")
    assert refused(result, "holds no Hessians, and model.layers.0", "name a new file")
    assert "k_scale" not in "".join(bits(tmp_path / "fp8"))
    compress.quantize(source, tmp_path / "kv", "fp8", scoring=None, stats=tmp_path / "file", kv_cache="fp8")


def test_a_file_that_appears_meanwhile_is_left_alone_and_used_by_the_next_run(
    saved: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Blocks.close

    def elsewhere(*arguments: Any) -> Any:
        shutil.copy(saved, tmp_path / "file")
        return close(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "close", elsewhere)
        with pytest.raises(FileExistsError, match="run this again to use it"):
            run(source, tmp_path / "out", tmp_path / "file", calibration=TEXT)
    assert (tmp_path / "file").read_bytes() == saved.read_bytes()
    run(source, tmp_path / "out", tmp_path / "file", calibration=TEXT)
    assert bits(tmp_path / "out") == bits(saved.parent / "first")


def test_a_file_that_is_changed_while_a_run_is_interrupted_is_not_mixed_in(
    saved: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(saved, tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr("compress.run.write", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(source, tmp_path / "out", tmp_path / "file")
    shutil.copy(saved, tmp_path / "file")
    with (tmp_path / "file").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(ValueError, match="not the file that the interrupted run used; run this again"):
        run(source, tmp_path / "out", tmp_path / "file")
    run(source, tmp_path / "out", tmp_path / "file")
    recipe = json.loads((tmp_path / "out" / "compress.json").read_text())["recipe"]
    assert recipe["statistics"]["sha256"] == file_sha256(tmp_path / "file")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int8", {"activations": "dynamic"}), ("mxfp4", {"reorder": True, "hadamard": True, "method": "gptq"})],
)
def test_changes_of_channels_are_the_same_with_fresh_and_with_saved_statistics(
    scheme: str, options: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    how = {"scoring": None, "stats": tmp_path / "file", **options}
    compress.quantize(source, tmp_path / "first", scheme, calibration=TEXT, **how)
    compress.quantize(source, tmp_path / "second", scheme, **how)
    assert bits(tmp_path / "first") == bits(tmp_path / "second")
    assert Statistics(tmp_path / "file").folds("model.layers.0", ["order"])
