"""The command line: every command's face, its exit codes, what goes to stdout and what to stderr."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from compress import __version__
from compress.cli import main
from compress.console import BAD_INPUT, FAILED, INTERRUPTED, reports
from compress.formats.shard import ShardWriter
from compress.registry import SCHEMES


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_comes_without_torch_which_takes_seconds() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from compress.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print(*[name for name in ('torch', 'transformers', 'numba', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_its_purpose(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert main.commands[command].help and "--json" in result.stdout and "--debug" in result.stdout
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.type.name == "choice", parameter.name
            assert any(option in result.stdout for option in parameter.opts)


def test_options_stand_under_headings_and_each_of_them_once() -> None:
    text = CliRunner().invoke(main, ["quantize", "--help"]).output
    headings = ["Options:", "Scheme:", "Calibration:", "Scoring:", "Gates:"]
    assert [line for line in text.splitlines() if line in headings] == headings
    for parameter in main.commands["quantize"].params:
        if isinstance(parameter, click.Option):
            name = max(parameter.opts, key=len)
            assert len(re.findall(rf"^  (?:-\w, )?{name}\b(?!-)", text, re.MULTILINE)) == 1, name
    assert text.index("Calibration:") < text.index("--seed") < text.index("Scoring:")


def test_the_version() -> None:
    assert run("--version").stdout == f"compress, version {__version__}\n"


def test_an_unknown_command_and_option_are_usage_errors() -> None:
    for arguments, word in (
        (("quantise", "m"), "did you mean 'quantize'?"),
        (("quantize", "m", "-o", "o", "--shceme", "int4"), "--scheme"),
        (("quantize", "m"), "'-o' / '--output'"),
        (("eval", "m", "--limit", "0"), "--limit"),
        (("export", "m", "-o", "o", "--to", "bf17"), "'bf17'"),
    ):
        result = run(*arguments)
        assert result.exit_code == BAD_INPUT and result.stdout == ""
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("Error:") and word in last and "Traceback" not in result.stderr


def test_schemes_lists_every_scheme_with_its_options() -> None:
    described = json.loads(run("schemes", "--json").stdout)
    assert [scheme["name"] for scheme in described] == list(SCHEMES)
    for scheme in described:
        assert scheme["about"]
        assert all({"name", "type", "default", "choices"} <= option.keys() for option in scheme["options"])
    assert all(name in run("schemes").stderr for name in SCHEMES)


def test_json_is_the_only_thing_on_stdout_and_tables_go_to_stderr(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = run("plan", llama_dir, "--scheme", "fp8", "--json")
    written = run("quantize", llama_dir, "-o", out, "--scheme", "fp8", "--no-eval", "--json")
    shown = run("inspect", out, "--json")
    assert [result.exit_code for result in (planned, written, shown)] == [0, 0, 0], written.stderr
    plan, report = json.loads(planned.stdout), json.loads(written.stdout)
    assert json.loads(shown.stdout) == report
    assert plan["bytes"] == report["bytes"] and plan["original_bytes"] == report["original_bytes"]
    assert report["scheme"] == "fp8" and report["evaluation"] is None and report["ratio"] > 1
    assert "down_proj" in written.stderr and written.stderr.strip().endswith(f"Wrote {out}")
    for arguments in (("plan", llama_dir), ("inspect", out), ("verify", out)):
        plain = run(*arguments)
        assert (plain.exit_code, plain.stdout) == (0, "") and plain.stderr


def test_eval_scores_and_writes_what_it_prints(llama_dir: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    result = run("eval", llama_dir, "--tasks", "", "--limit", "2", "--window", "16", "-o", scores, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(scores.read_text())
    assert json.loads(result.stdout)["perplexity"] > 1


def test_rules_reach_the_plan(llama_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "- {match: 're:layers\\.0\\.', scheme: none}\n- {match: down_proj, scheme: int4, group_size: 32}\n"
    )
    plan = json.loads(run("plan", llama_dir, "--scheme", "fp8", "--recipe", recipe, "--json").stdout)
    schemes = {line["name"]: line["scheme"] for line in plan["tensors"]}
    assert schemes["model.layers.1.mlp.down_proj"] == "int4" and schemes["model.layers.1.mlp.up_proj"] == "fp8"
    assert schemes["model.layers.0.mlp.up_proj.weight"] is None
    assert [rule["modules"] for rule in plan["rules"]] == [7, 2]
    only = json.loads(run("plan", llama_dir, "--include", "q_proj", "--exclude", "re:1", "--json").stdout)
    assert [line["name"] for line in only["tensors"] if line["scheme"]] == ["model.layers.0.self_attn.q_proj"]


def test_inspect_of_what_we_did_not_write(llama_dir: Path, tmp_path: Path) -> None:
    for place, message in ((llama_dir, "no report.json"), (tmp_path / "nothing", "does not exist")):
        result = run("inspect", place)
        assert result.exit_code == BAD_INPUT and message in result.stderr


def _raising(error: BaseException) -> click.Command:
    @click.command()
    @reports
    def command(as_json: bool) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("weights:\n  are odd"), BAD_INPUT, "Error: weights: are odd"),
        (PermissionError(13, "Permission denied", "/x/y"), FAILED, "Error: /x/y: Permission denied"),
        (OSError(28, "No space left on device"), FAILED, "Error: No space left on device; what was finished is kept"),
        (OSError("disk: 5 bytes are needed"), FAILED, "Error: disk: 5 bytes are needed"),
        (RuntimeError("planned a, made b"), FAILED, "Error: RuntimeError: planned a, made b (--debug shows where)"),
        (KeyboardInterrupt(), INTERRUPTED, "Error: interrupted; quantize and export go on from what was finished"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(error: BaseException, code: int, line: str) -> None:
    result = CliRunner().invoke(_raising(error), [])
    assert result.exit_code == code
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1 and result.stdout == ""
    debugged = CliRunner().invoke(_raising(error), ["--debug"])
    assert debugged.exit_code == code and "Traceback" in debugged.stderr and line in debugged.stderr


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("quantize", llama_dir, "-o", out, "--scheme", "fp8", "--no-eval", "--shard-size", "50KB")
    finished = ShardWriter.__exit__

    def interrupt(writer: ShardWriter, *arguments: Any) -> None:
        stop = KeyboardInterrupt() if "00002" in writer.path.name and arguments[0] is None else None
        finished(writer, *((KeyboardInterrupt, stop, None) if stop else arguments))
        if stop:
            raise stop

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "__exit__", interrupt)
        result = run(*command)
    assert result.exit_code == INTERRUPTED and result.stderr.count("\n") == 1 and "interrupted" in result.stderr
    first = next((tmp_path / "out.partial" / "checkpoint").glob("*-00001-*.safetensors")).stat().st_ino
    assert not out.exists()
    assert run(*command).exit_code == 0
    assert next(out.glob("*-00001-*.safetensors")).stat().st_ino == first  # not written a second time


def test_an_option_of_the_run_is_no_option_of_the_scheme() -> None:
    result = CliRunner().invoke(main, ["plan", "nowhere", "--set", "seed=1"])
    assert result.exit_code == BAD_INPUT and "int4 has no option 'seed'" in result.stderr
