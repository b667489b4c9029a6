"""A target size is kept, with the least predicted loss: the same for what loaders fuse, and after a kill."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import compress
from compress import fisher, gptq, pipeline
from compress.backwards import Backwards
from compress.blocks import Blocks
from compress.calibrate import Calibration
from compress.candidates import Candidate, candidates
from compress.cli import main
from compress.fold import fused
from compress.formats.checkpoint import Checkpoint
from compress.job import Job
from compress.pipeline import read_weight
from compress.planning import from_config
from compress.prepare import Prepared
from compress.recipe import Rules
from compress.samples import Samples
from compress.source import Source
from compress.target import LEAST, STAGE, Target

TEXT = Calibration(samples=4, seq_len=32)
RTN: dict[str, Any] = {"scoring": None, "calibration": TEXT, "command": "same", "method": "rtn", "group_size": 32}
SAMPLES = Samples(torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0)), "random")


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch, llama_dir: Path) -> Iterator[None]:
    """Tiny models have no tokenizer: they are given tokens."""
    monkeypatch.setattr("compress.run.draw", lambda *_: SAMPLES)
    yield


def bits(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(path)
    return {name: bytes(checkpoint.raw(name)) if entry.bytes else b"" for name, entry in checkpoint.entries.items()}


def size(model: Path, **options: Any) -> int:
    return int(compress.plan(model, **{"method": "rtn", "group_size": 32, **options}).totals["bytes"])


def chosen(out: Path) -> dict[str, str]:
    """The scheme of each module that was compressed."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    modules = from_config(config, Source(out, foreign=False).checkpoint.entries)  # type: ignore[arg-type]
    return {module: Candidate.of(packed.scheme, ("group_size", "method")).text for module, packed in modules.items()}


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches kill -9."""


def dying(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = [0]

    def run(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return function(*arguments)

    return run


@pytest.fixture(scope="module")
def between(llama_dir: Path) -> int:
    """A size between those of 3 and 4 bits."""
    return (size(llama_dir, bits=3) + size(llama_dir, bits=4)) // 2


@pytest.fixture(scope="module")
def whole(llama_dir: Path, between: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run makes of it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.run.draw", lambda *_: SAMPLES)
        compress.quantize(llama_dir, out, "int4", target_size=between, **RTN)
    return out


def test_it_fits_and_is_predicted_to_lose_less_than_one_width(whole: Path, between: int) -> None:
    report = json.loads((whole / "report.json").read_text())
    target = report["target"]
    assert between - 64 * 64 < report["bytes"] <= between
    assert report["bytes"] == sum(map(len, bits(whole).values()))
    assert target["uniform"]["candidate"] == "int4:bits=3"
    assert target["predicted_kl"] < target["uniform"]["predicted_kl"]
    assert 3.5 < target["bits_per_weight"] < 5 and target["bits_per_weight"] == report["bits_per_weight"]
    assert sum(target["weights"].values()) == len(chosen(whole)) == 14
    assert (report["scheme"], "bits" in report["options"]) == ("int4", False)
    schemes = chosen(whole)
    assert len(set(schemes.values())) > 1
    for block in ("model.layers.0", "model.layers.1"):
        assert len({schemes[f"{block}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({schemes[f"{block}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    card = (whole / "README.md").read_text()
    assert f"({between} bytes of tensors)" in card and "`int4:bits=3`" in card and "predicted" in card


def test_others_load_what_was_made(whole: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    config = json.loads((whole / "config.json").read_text())["quantization_config"]
    widths = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    assert config["quant_method"] == "compressed-tensors" and len(widths) > 1
    ids = torch.arange(3, 23)[None]
    ours = compress.load(whole, dtype=torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_the_prediction_is_half_the_fisher_information_times_the_squared_errors(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = Prepared(tiny_model("one-layer"), "int4", {"method": "rtn"}, Rules(), target_size="1GB")
    expected = [0.0] * len(prepared.candidates)
    with Job(tmp_path / "a", {}) as job:
        squares = fisher.measure(job, prepared.source, prepared.structure.linears, SAMPLES.tokens, "cpu")
        for number, plan in enumerate(prepared.plans):
            for module, packed in plan.modules.items():
                weight = read_weight(prepared.source, packed)
                squared, along = squares.of(module), squares.along(module)
                assert squared is not None and along is not None
                error = packed.scheme.decode(packed.scheme.encode(weight)).double() - weight.double()
                longer = float((error * weight).sum() / weight.double().square().sum())
                rest = error - longer * weight.double()
                expected[number] += 15 / 2 * (float((squared * rest**2).sum()) + longer**2 * along)
    with Job(tmp_path / "b", {}) as job:
        target = Target(prepared)
        assert {getattr(scheme, "bits", 0) for scheme in target.choose(job, SAMPLES, "cpu").schemes} == {8}
        noted = job.recall(STAGE)
    assert noted and noted["report"]["predicted_kl"] == pytest.approx(expected[-1], rel=1e-5)
    assert noted["report"]["uniform"]["predicted_kl"] == noted["report"]["predicted_kl"]
    assert "all candidates fit" in noted["note"]


POINTS = [(Backwards, "gradients", 2), (Target, "_line", 4), (Target, "_chosen", 1), (pipeline, "_write_unit", 9)]


@pytest.mark.parametrize(("owner", "name", "call"), POINTS)
def test_a_killed_run_goes_on_to_the_same_bytes(
    owner: Any,
    name: str,
    call: int,
    llama_dir: Path,
    between: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement := dying(original, call))
        if isinstance(owner, type):
            patch.setattr(owner, name, lambda self, *arguments: replacement(self, *arguments))
        with pytest.raises(Killed):
            compress.quantize(llama_dir, tmp_path / "out", "int4", target_size=between, **RTN)
    if name != "gradients":  # what was measured is not measured again
        monkeypatch.setattr(Backwards, "gradients", dying(Backwards.gradients, 1))
    compress.quantize(llama_dir, tmp_path / "out", "int4", target_size=between, **RTN)
    assert bits(tmp_path / "out") == bits(whole)
    assert (tmp_path / "out" / "compress.json").read_bytes() == (whole / "compress.json").read_bytes()


@pytest.fixture(scope="module")
def whole_gptq(llama_dir: Path, between: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.run.draw", lambda *_: SAMPLES)
        report = compress.quantize(llama_dir, out, "int4", target_size=between, **{**RTN, "method": "gptq"})
    assert report.bytes <= between and report.target and len(set(chosen(out).values())) > 1
    return out


@pytest.mark.parametrize("call", [1, 6, 20])
def test_a_calibrated_choice_goes_on_after_a_kill(
    call: int, llama_dir: Path, between: int, whole_gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Hessians of the first block are looked at, of the second, and of blocks that are compressed."""
    how = {**RTN, "method": "gptq"}
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "ordered", dying(gptq.ordered, call))
        with pytest.raises(Killed):
            compress.quantize(llama_dir, tmp_path / "out", "int4", target_size=between, **how)
    monkeypatch.setattr(Backwards, "gradients", dying(Backwards.gradients, 1))
    compress.quantize(llama_dir, tmp_path / "out", "int4", target_size=between, **how)
    assert bits(tmp_path / "out") == bits(whole_gptq)


def test_another_target_or_candidate_starts_afresh(
    llama_dir: Path, between: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme, target in (("int4", between + 2000), ("int4:bits=3,int8", between + 2000)):
        how = RTN if scheme == "int4" else {"scoring": None, "calibration": TEXT}
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_write_unit", dying(pipeline._write_unit, 5))
            with pytest.raises(Killed):
                compress.quantize(llama_dir, tmp_path / "out", scheme, target_size=target, **how)
    compress.quantize(llama_dir, tmp_path / "out", "int4", target_size=between, **RTN)
    assert bits(tmp_path / "out") == bits(whole)


def test_experts_of_a_layer_get_the_same_and_those_that_no_token_reaches_count(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("mixtral")
    middle = (size(model, bits=3) + size(model, bits=4)) // 2
    report = compress.quantize(model, tmp_path / "out", "int4", target_size=middle, **RTN)
    assert report.bytes <= middle and report.target
    schemes = chosen(tmp_path / "out")
    for layer in (0, 1):
        experts = [name for name in schemes if f"layers.{layer}." in name and ".experts." in name]
        assert len({schemes[name] for name in experts}) == 1
    prepared = Prepared(model, "int4", {}, Rules(), target_size="1GB")
    linears = prepared.structure.linears
    assert len({fused(linear) for linear in linears.values() if linear.expert is not None}) == 2
    target = Target(prepared)
    place, members = next((i, m) for i, (name, m) in enumerate(target.sets.items()) if name.endswith("experts"))
    reached: dict[str, Any] = {"values": 10, "squares": 2.0, "errors": [(1.0, 3.0)] * 7}
    lines = {module: reached for modules in target.sets.values() for module in modules}
    lines[members[0]] = {"values": 10, "squares": None, "errors": [(1.0, 0.0)] * 7}
    expected = 3.0 * (len(members) - 1) + LEAST * 2.0
    assert target._losses(lines)[place] == [pytest.approx(expected)] * 7
    lines |= {module: {**reached, "squares": None, "errors": [(1.0, 0.0)] * 7} for module in members}
    assert target._losses(lines)[place] == [pytest.approx(2.0 * len(members))] * 7  # as elsewhere in the model


def test_what_rules_decide_is_not_chosen(llama_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "- {match: down_proj, scheme: int4, bits: 2, method: rtn, group_size: 32}\n"
        "- {match: embed_tokens, scheme: df11}\n"
    )
    rules = Rules(recipe, exclude=("re:layers\\.0\\.self_attn",))
    least, most = (size(llama_dir, rules=rules, bits=bits) for bits in (2, 8))
    report = compress.quantize(llama_dir, tmp_path / "out", "int4", rules=rules, target_size=(least + most) // 2, **RTN)
    lines = {line["name"]: line for line in report.tensors}
    assert report.bytes <= (least + most) // 2
    assert report.target and sum(report.target["weights"].values()) == 14 - 2 - 4
    assert all(lines[f"model.layers.{i}.mlp.down_proj"]["bits_per_weight"] < 3 for i in (0, 1))
    assert lines["model.layers.0.self_attn.q_proj.weight"]["scheme"] is None
    included = Rules(include=("up_proj", "gate_proj"))
    report = compress.quantize(
        llama_dir, tmp_path / "some", "int4", rules=included, target_size=size(llama_dir, rules=included, bits=5), **RTN
    )
    assert report.target and sum(report.target["weights"].values()) == 4 == len(chosen(tmp_path / "some"))


def test_a_list_of_schemes_and_the_squares_are_measured_once(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "kmeans:bits=2:method=rtn:sensitivity=fisher,fp8:activations=static,kmeans:method=rtn:sensitivity=fisher"
    original, calls = fisher._squares, list[Any]()
    monkeypatch.setattr(fisher, "_squares", lambda *arguments: [calls.append(1), original(*arguments)][1])
    least, most = (size(llama_dir, scheme="kmeans", bits=bits, group_size=16) for bits in (2, 4))
    report = compress.quantize(
        llama_dir, tmp_path / "out", listed, target_size=(least + most) // 2, scoring=None, calibration=TEXT
    )
    assert report.target and report.bytes <= (least + most) // 2 and report.scheme == "kmeans, fp8"
    assert report.target["candidates"][1] == "fp8:activations=static" and len(calls) == 3  # two blocks and the head
    assert report.target["weights"]["kmeans:method=rtn:sensitivity=fisher"]


def test_saved_statistics_take_the_place_of_the_measurement(
    llama_dir: Path, between: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {**RTN, "stats": tmp_path / "file"}
    compress.quantize(llama_dir, tmp_path / "first", "int4", target_size=between, **how)
    monkeypatch.setattr(Blocks, "__init__", dying(Blocks.__init__, 1))
    compress.quantize(llama_dir, tmp_path / "again", "int4", target_size=between, **{**how, "calibration": None})
    assert bits(tmp_path / "first") == bits(tmp_path / "again") == bits(whole)
    monkeypatch.undo()
    monkeypatch.setattr("compress.run.draw", lambda *_: SAMPLES)
    how = {**RTN, "method": "gptq", "stats": tmp_path / "other"}
    compress.quantize(llama_dir, tmp_path / "third", "int4", **how)
    with pytest.raises(ValueError, match="holds no Fisher information, and .* or leave out .*--target-size"):
        compress.quantize(llama_dir, tmp_path / "fourth", "int4", target_size=between, **how)


def test_at_the_ends_and_beyond(llama_dir: Path, tmp_path: Path) -> None:
    least, most = size(llama_dir, bits=2), size(llama_dir, bits=8)
    report = compress.quantize(llama_dir, tmp_path / "least", "int4", target_size=least, **RTN)
    assert report.bytes == least and not any("all candidates fit" in note for note in report.notes)
    report = compress.quantize(llama_dir, tmp_path / "most", "int4", target_size=10 * most, **RTN)
    assert report.bytes == most and any("all candidates fit" in note for note in report.notes)
    with pytest.raises(ValueError, match=f"all tensors take {least} bytes"):
        compress.quantize(llama_dir, tmp_path / "below", "int4", target_size=least - 1, **RTN)
    assert not (tmp_path / "below.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int4", "--target-size", "1KB"], r"target size 1000 \(1000 B\) is too small: .* take \d+ bytes"),
        (["--scheme", "int4", "--target-size", "much"], "size 'much' is not understood"),
        (["--scheme", "fp8", "--target-size", "1MB"], "fp8 has one width only; name several"),
        (["--scheme", "int8", "--set", "activations=dynamic", "--target-size", "1MB"], "int8 has one width only"),
        (["--scheme", "bitstack", "--target-size", "1MB"], "quantize with it, then `compress trim --size`"),
        (["--scheme", "df11", "--target-size", "1MB"], "what df11 takes depends on the values"),
        (["--scheme", "int4,df11", "--target-size", "1MB"], "what df11 takes depends on the values"),
        (["--scheme", "int4", "--set", "bits=3", "--target-size", "1MB"], "bits of int4 is what it chooses"),
        (["--scheme", "int4:bits=3", "--target-size", "1MB"], "bits of int4 is what it chooses"),
        (["--scheme", "int4,fp8", "--set", "bits=3", "--target-size", "1MB"], "each has its own options"),
        (["--scheme", "int4,fp9", "--target-size", "1MB"], "unknown scheme 'fp9'; did you mean 'fp8'"),
        (["--scheme", "int4,fp8"], "several are for --target-size"),
        (["--exclude", "re:.*", "--target-size", "1MB"], "leave no weight to choose for"),
        (["--scheme", "int4,kmeans", "--kv-cache", "fp8", "--target-size", "1MB"], "--kv-cache fp8"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, llama_dir: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["quantize", str(llama_dir), "-o", str(tmp_path / "out"), "--no-eval", *arguments])
    line = done.stderr.strip()
    assert done.exit_code == 2 and line.startswith("Error: ") and "\n" not in line
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_a_plan_has_no_target(llama_dir: Path) -> None:
    done = CliRunner().invoke(main, ["plan", str(llama_dir), "--target-size", "1MB"])
    assert done.exit_code == 2 and "No such option" in done.stderr


def test_every_width_that_the_other_options_allow_is_a_candidate() -> None:
    def widths(scheme: str, **options: Any) -> list[Any]:
        return [getattr(s, "bits", getattr(s, "mantissa_bits", None)) for s in candidates(scheme, options)]

    assert widths("int4", group_size=32) == list(range(2, 9)) == widths("bfp") == widths("int4:group_size=32")
    assert widths("kmeans") == list(range(1, 9)) and widths("kmeans", codebook="nf") == list(range(1, 9))[1:]
    assert [Candidate.of(s).text for s in candidates("int4:bits=2,int4,fp8", {})] == ["int4:bits=2", "int4", "fp8"]
    assert len(candidates("int4,int4:bits=4,fp8", {})) == 2
