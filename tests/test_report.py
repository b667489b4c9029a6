"""A whole run with scoring: report.json, the model card and the tables say the same."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import compress
from compress import tables
from compress.formats import manifest
from compress.run import read_report

KEYS = (
    "model scheme options original_bytes bytes ratio bits_per_weight bits_per_weight_model parameters seconds "
    "peak_rss_bytes tensors evaluation"
).split()
SCORES = (
    "tokens perplexity reference_perplexity bits_per_byte kl_mean kl_median kl_p99 top1_agreement tasks "
    "tokens_per_second"
).split()


@pytest.fixture(scope="module")
def out(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    compress.quantize(llama_dir, out, "int4", group_size=32, method="rtn", scoring=compress.Scoring(limit=8))
    return out


def test_report_json_has_the_promised_keys(out: Path) -> None:
    document = manifest.unseal(out / "report.json")
    assert set(KEYS) <= document.keys() and set(SCORES) <= document["evaluation"].keys()
    assert 0 < sum(line["seconds"] or 0 for line in document["tensors"]) < document["seconds"]
    assert document["tensors"][0].keys() >= {"name", "shape", "scheme", "bytes", "original_bytes", "relative_error"}
    assert document["options"]["group_size"] == 32 and document["seconds"] > 0


def test_the_card_and_the_table_show_the_figures_of_the_report(out: Path) -> None:
    report = read_report(out)
    scores = report.evaluation
    assert scores is not None
    stream = StringIO()
    Console(file=stream, width=80).print(tables.run(report), tables.scores(scores))
    card = (out / "README.md").read_text()
    for shown in (card, stream.getvalue()):
        assert f"{scores['perplexity']:.4f}" in shown and f"{scores['reference_perplexity']:.4f}" in shown
        assert f"{scores['kl_mean']:.6f}" in shown and f"{scores['top1_agreement']:.4f}" in shown
        assert f"{scores['tasks']['builtin_cloze']['acc']['value']:.4f}" in shown
        assert f"{report.ratio:.2f} times smaller" in shown
    assert all(len(line) <= 80 for line in stream.getvalue().splitlines())
    assert "compress.quantize(" in card and "AutoModelForCausalLM.from_pretrained(DIR)" in card


def test_the_sum_of_the_lines_is_the_total(out: Path) -> None:
    report = read_report(out)
    assert sum(line["bytes"] for line in report.tensors) == report.bytes
    index = json.loads((out / "compress.json").read_text())["tensors"]
    assert sum(tensor["bytes"] for tensor in index.values()) == report.bytes


def test_a_recorded_error_is_the_error_of_what_is_stored(out: Path, llama_dir: Path) -> None:
    from compress.source import Source

    original, packed = Source(llama_dir), Source(out)
    for line in read_report(out).tensors:
        if line["scheme"]:
            a, b = (source.read(f"{line['name']}.weight").double() for source in (original, packed))
            assert line["relative_error"] == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-5)


def test_an_unscored_run_says_so(llama_dir: Path, tmp_path: Path) -> None:
    report = compress.quantize(llama_dir, tmp_path / "out", "fp8", scoring=None)
    assert report.evaluation is None and "Not scored" in (tmp_path / "out" / "README.md").read_text()


def test_scoring_that_cannot_work_is_refused_before_anything_is_written(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exceed the context"):
        compress.quantize(llama_dir, tmp_path / "out", scoring=compress.Scoring(window=4096))
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_python_run_names_everything_that_was_asked_for(llama_dir: Path, tmp_path: Path) -> None:
    rules = compress.Rules(exclude=("down_proj",))
    compress.quantize(llama_dir, tmp_path / "out", "int4", rules=rules, bits=3, shard_size="1MB", scoring=None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "bits=3" in card and "exclude=('down_proj',)" in card and "shard_size='1MB'" in card
