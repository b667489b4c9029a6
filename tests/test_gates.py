"""Gates: limits by hand, NaN, and what a missed one leaves behind."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import compress
from compress.cli import main
from compress.console import BAD_INPUT, MISSED
from compress.eval.gates import Gates, missed, sentence
from compress.run import read_report


def evaluation(kl: float | None = 0.01, top1: float | None = 0.9, **metrics: dict[str, Any]) -> dict[str, Any]:
    return {"kl_mean": kl, "top1_agreement": top1, "tasks": {"task": metrics}}


def metric(value: float, reference: float | None, higher: bool = True) -> dict[str, Any]:
    return {"value": value, "reference": reference, "stderr": None, "higher_is_better": higher}


@pytest.mark.parametrize(
    ("gates", "scores", "passed"),
    [
        (Gates(max_kl=0.01), evaluation(0.01), [True]),
        (Gates(max_kl=0.01), evaluation(0.0100001), [False]),
        (Gates(max_kl=0.01), evaluation(math.nan), [False]),
        (Gates(max_kl=0.01), evaluation(None), [False]),
        (Gates(min_top1=0.9), evaluation(top1=0.9), [True]),
        (Gates(min_top1=0.9), evaluation(top1=0.89), [False]),
        (Gates(min_top1=0.9), evaluation(top1=math.nan), [False]),
        (Gates(max_kl=1, min_top1=0.95), evaluation(), [True, False]),
        (Gates(max_task_drop=0.0), evaluation(acc=metric(0.5, 0.5)), [True]),
        (Gates(max_task_drop=0.25), evaluation(acc=metric(0.25, 0.5), f1=metric(0.0, 0.5)), [False]),
        (Gates(max_task_drop=0.25), evaluation(acc=metric(0.75, 0.5)), [True]),
        (Gates(max_task_drop=0.25), evaluation(ppl=metric(9.0, 8.5, higher=False)), [False]),
        (Gates(max_task_drop=0.25), evaluation(acc=metric(math.nan, 0.5), f1=metric(0.0, 0.0)), [False]),
        (Gates(max_task_drop=0.25), evaluation(acc=metric(0.5, None)), [False]),
        (Gates(max_task_drop=0.25), evaluation(), [False]),
        (Gates(), evaluation(math.nan), []),
    ],
)
def test_a_gate_passes_only_within_its_limit(gates: Gates, scores: dict[str, Any], passed: list[bool]) -> None:
    assert [gate["passed"] for gate in gates.judge(scores)] == passed


def test_the_worst_metric_is_named() -> None:
    found = Gates(max_task_drop=0.1).judge(evaluation(acc=metric(0.4, 0.5), f1=metric(0.25, 0.5), em=metric(1, 0)))[0]
    assert found == {"gate": "max_task_drop", "limit": 0.1, "value": 0.25, "of": "task f1", "passed": False}
    assert sentence(found) == "max_task_drop 0.1 missed: task f1 is 0.25"
    assert missed({"gates": [found]}) == [sentence(found)] and missed(None) == []


def test_a_metric_that_is_not_known_says_why() -> None:
    for score, of in (
        (metric(0.5, None), "task acc, on which the original was not scored,"),
        (metric(math.nan, 0.5), "task acc"),
    ):
        found = Gates(max_task_drop=0.1).judge(evaluation(f1=metric(0.25, 0.5), acc=score))[0]
        assert found["of"] == of and sentence(found) == f"max_task_drop 0.1 missed: {of} is unknown"


@pytest.mark.parametrize(
    "limits", [{"max_kl": -1.0}, {"max_kl": math.nan}, {"min_top1": 1.5}, {"max_task_drop": math.inf}]
)
def test_what_is_no_limit_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limits))}: "):
        Gates(**limits)


def test_a_missed_gate_is_exit_code_3_and_written_into_what_is_kept(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--scheme", "fp8", "--limit", "2", "--window", "32", "--tasks", ""]
    arguments = ["quantize", str(llama_dir), "-o", str(out), *common, "--max-kl", "0", "--min-top1", "0.1", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == MISSED, result.stderr
    assert "Gate max_kl 0 missed: KL divergence, mean (nats) is" in result.stderr
    for gates in (
        json.loads(result.stdout)["evaluation"]["gates"],
        read_report(out).evaluation["gates"],  # type: ignore[index]
        json.loads((out / "compress.json").read_text())["gates"],
    ):
        assert [(gate["gate"], gate["passed"]) for gate in gates] == [("max_kl", False), ("min_top1", True)]
    assert "**FAILED:**" in (out / "README.md").read_text()
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 0
    scored = ["eval", str(out), "--reference", str(llama_dir), "--limit", "2", "--window", "32", "--tasks", ""]
    assert CliRunner().invoke(main, [*scored, "--min-top1", "0.1"]).exit_code == 0
    assert CliRunner().invoke(main, [*scored, "--max-kl", "0"]).exit_code == MISSED


def test_a_gate_on_what_is_not_scored_is_refused_at_once(llama_dir: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["quantize", "--no-eval", "-o", str(tmp_path / "out"), "--max-kl", "1"], "max_kl: nothing is compared"),
        (["quantize", "-o", str(tmp_path / "out"), "--tasks", "", "--max-task-drop", "1"], "no task is run"),
        (["eval", "--min-top1", "1"], "min_top1: nothing is compared"),
    ):
        result = CliRunner().invoke(main, [*arguments, str(llama_dir)])
        assert result.exit_code == BAD_INPUT and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_python_asks_for_gates_too(llama_dir: Path, tmp_path: Path) -> None:
    scoring = compress.Scoring(tasks=(), limit=2, window=32)
    report = compress.quantize(llama_dir, tmp_path / "out", "fp8", scoring=scoring, gates=compress.Gates(max_kl=0.0))
    assert report.missed_gates and "max_kl 0 missed" in report.missed_gates[0]
