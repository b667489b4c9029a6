"""Timing of products: what is reported, and what is said of it. No test asks for a speed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from compress import bench
from compress.bench import UNCOMPRESSED, Bench, Line
from compress.cli import main
from compress.registry import SCHEMES, make


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "MOST_COPIES", 2)
    monkeypatch.setattr(bench, "defaults", lambda: {"int4": make("int4", {"method": "rtn"}), "fp8": make("fp8")})


def test_every_scheme_has_a_line_that_needs_no_data() -> None:
    lines = bench.defaults()
    assert set(lines) >= set(SCHEMES)
    assert {scheme.name for scheme in lines.values()} == set(SCHEMES)
    assert all(getattr(scheme, "method", "rtn") == "rtn" for scheme in lines.values())


def test_the_command_prints_a_table_and_json(quick: None) -> None:
    done = CliRunner().invoke(main, ["bench", "--device", "cpu", "--shape", "64x128", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["device"], found["shape"], found["dtype"]) == ("cpu", [64, 128], "bfloat16")
    assert [line["name"] for line in found["lines"]] == [UNCOMPRESSED, "int4", "fp8"]
    for line in found["lines"]:
        assert list(line["seconds"]) == list(line["speedup"]) == ["1", "16", "256"]
        assert all(seconds > 0 for seconds in line["seconds"].values())
        base = found["lines"][0]["seconds"]
        assert all(abs(r * line["seconds"][m] / base[m] - 1) < 1e-9 for m, r in line["speedup"].items())
    assert found["lines"][1]["bits_per_weight"] == pytest.approx(4 + 16 / 128 + 8 * 16 / (64 * 128))
    assert "int4" in done.stderr and all(len(line) <= 160 for line in done.stderr.splitlines())


def test_what_is_slower_is_said_in_words() -> None:
    seconds = {1: 1.0, 16: 1.0}
    lines = [Line("a", 4.0, seconds, {1: 2.0, 16: 1.0}), Line("b", 11.0, seconds, {1: 0.5, 16: 1.1})]
    lines.append(Line("c", 11.0, seconds, {1: 0.5, 16: 0.9}))
    assert Bench("cpu", "x", 2, "2", "bfloat16", (4, 4), lines).warnings == [
        "b saves memory only: at 1 token it is slower than the uncompressed product here",
        "c saves memory only: always it is slower than the uncompressed product here",
    ]


@pytest.mark.parametrize("shape", ["4096", "0x4", "axb", "1x2x3"])
def test_a_shape_that_is_none_is_refused(shape: str) -> None:
    done = CliRunner().invoke(main, ["bench", "--shape", shape])
    assert done.exit_code == 2 and "give two numbers" in done.stderr
