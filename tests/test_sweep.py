"""Sweeps: candidates as text, what is done is not done again, and the answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from compress import sweep as module
from compress.blocks import Blocks
from compress.calibrate import Calibration
from compress.candidates import Candidate, parse
from compress.cli import main
from compress.eval.chart import Point
from compress.run import Options, Scoring
from compress.sweep import Goals, answers, sweep

SCORING = Scoring(tasks=(), limit=2, window=32)


def test_candidates_are_read() -> None:
    assert parse("fp8, int4:bits=3:group_size=32,") == [
        Candidate("fp8"),
        Candidate("int4", (("bits", "3"), ("group_size", "32"))),
    ]
    assert parse("int4:bits=3")[0].name == "int4-bits=3"
    assert parse("int4:bits=3")[0].arguments == ["--scheme", "int4", "--set", "bits=3"]
    for text, message in (("", "none is named"), ("int4:3", "'3' is no KEY=VALUE"), ("fp8,fp8", "named twice")):
        with pytest.raises(ValueError, match=message):
            parse(text)
    with pytest.raises(ValueError, match="is no KEY=VALUE"):
        parse("int4:bits=../../up")


def test_answers_by_hand() -> None:
    points = [Point("a", 2**20, 0.5), Point("b", 2**21, 0.01), Point("c", 2**22, 0.01), Point("broken", 1, math.nan)]
    assert answers(points, Goals(max_kl=0.01)) == [
        "Smallest within a KL divergence of 0.01 nats: b, 2.00 MiB, KL 0.010000."
    ]
    assert answers(points, Goals(max_size="1MiB")) == ["Best within 1.00 MiB: a, 1.00 MiB, KL 0.500000."]
    assert answers(points, Goals(max_kl=0.0, max_size=5)) == [
        "Smallest within a KL divergence of 0 nats: none of these.",
        "Best within 5 B: none of these.",
    ]
    assert answers(points, Goals()) == []


def test_a_sweep_goes_on_with_what_is_missing(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    run = module.run
    monkeypatch.setattr(module, "run", lambda *a, **k: made.append(a[2].name) or run(*a, **k))
    out = tmp_path / "sweep"
    options = Options(SCORING)

    def swept(text: str, options: Options = options, goals: Goals = Goals()) -> dict[str, Any]:  # noqa: B008
        del made[:]
        return sweep(str(llama_dir), out, parse(text), options, goals=goals).to_dict()

    assert len(swept("fp8,df11")["lines"]) == 2 and made == ["fp8", "df11"]
    found = swept("fp8,df11,nf4", goals=Goals(max_kl=0.0))
    assert made == ["nf4"]
    assert json.loads((out / "pareto.json").read_text()) == found
    assert "<svg" in (out / "pareto.svg").read_text()
    fronts = {line["name"]: line["front"] for line in found["lines"]}
    assert fronts["df11"] and fronts["nf4"]  # the one that loses nothing, and the smallest
    assert found["answers"][0].startswith("Smallest within a KL divergence of 0 nats: df11")
    assert "--scheme nf4" in (out / "nf4" / "README.md").read_text()
    # scored in another way: the old one is in the way, and replaced when asked
    other = Options(Scoring(tasks=(), limit=3, window=32))
    refused = swept("fp8", other)
    assert not refused["lines"] and "exists" in refused["refused"]["fp8"]
    assert len(swept("fp8", Options(other.scoring, overwrite=True))["lines"]) == 1


def test_models_can_be_thrown_away(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep(str(llama_dir), tmp_path, parse("fp8"), Options(SCORING), goals=Goals(discard=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8.json", "pareto.json", "pareto.svg"]
    monkeypatch.setattr(module, "run", lambda *_: pytest.fail("made again"))
    assert sweep(str(llama_dir), tmp_path, parse("fp8"), Options(SCORING), goals=Goals(discard=True)) == first


def test_the_command_prints_a_table_and_answers(llama_dir: Path, tmp_path: Path) -> None:
    common = ["--tasks", "", "--limit", "2", "--window", "32", "-o", str(tmp_path / "s")]
    arguments = ["sweep", str(llama_dir), "--schemes", "fp8,df11", "--within-kl", "0", "--within-size", "1B", *common]
    result = CliRunner().invoke(main, [*arguments, "--json"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "s" / "pareto.json").read_text())
    assert "of 0 nats: df11" in result.stderr and "Best within 1 B: none of these." in result.stderr
    assert all(len(line) <= 80 for line in result.stderr.splitlines() if "pareto.json" not in line)
    unknown = CliRunner().invoke(main, ["sweep", str(llama_dir), "--schemes", "fp9", *common])
    assert unknown.exit_code == 2 and "fp8" in unknown.stderr


def test_several_are_calibrated_once(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    measure = Blocks.measure
    monkeypatch.setattr(Blocks, "measure", lambda self, block, *a: measured.append(block) or measure(self, block, *a))
    options = Options(SCORING, Calibration(samples=4, seq_len=32))
    candidates = "int8:activations=dynamic,int4:bits=3:method=gptq,int4:method=gptq,fp8"
    found = sweep(str(llama_dir), tmp_path / "sweep", parse(candidates), options)
    assert not found.refused and len(found.lines) == 4
    assert sorted(measured) == sorted(set(measured)) and measured
    (file,) = (tmp_path / "sweep").glob("statistics-*.safetensors")
    card = (tmp_path / "sweep/int4-method=gptq/README.md").read_text()
    assert f"--stats {file}" in card
    assert file.name not in (tmp_path / "sweep/fp8/README.md").read_text()


def test_a_calibrated_candidate_is_added_to_those_that_are_done(llama_dir: Path, tmp_path: Path) -> None:
    options = Options(SCORING, Calibration(samples=2, seq_len=32))
    first = sweep(str(llama_dir), tmp_path, parse("fp8:activations=static"), options)
    found = sweep(str(llama_dir), tmp_path, parse("fp8:activations=static,int4:method=gptq"), options)
    assert not found.refused and found.lines[0]["kl_mean"] == first.lines[0]["kl_mean"]
    with pytest.raises(ValueError, match="foo"):
        Goals(max_size="foo")
