"""The model card that is README.md of an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from compress.eval import chart
from compress.eval.gates import sentence
from compress.eval.report import SIGNIFICANT, Report, is_lossless, layer_losses, score_lines, told_target, worst_layers
from compress.sizes import show

CHART = "layers.svg"
_BARS = 24


@dataclass(frozen=True)
class Facts:
    """What a card says beside the report. front_matter: its YAML. calibration: as the manifest has it, None without
    any. loader: how transformers loads the output without us; None where it cannot."""

    command: str
    front_matter: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None
    loader: str | None


def card(report: Report, facts: Facts) -> str:
    """The model card. Without times, so that the same run writes the same bytes."""
    options = ", ".join(f"{key}={value}" for key, value in report.options.items())
    bits = "" if report.bits_per_weight is None else f"{report.bits_per_weight:.3f} bits per compressed weight, "
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    failed = "".join(f"> **FAILED:** {miss}\n" for miss in report.missed_gates)
    header = yaml.safe_dump(dict(facts.front_matter), sort_keys=False, allow_unicode=True)
    lossless = is_lossless(report)
    parts = [
        f"---\n{header}---\n",
        f"# {report.model.rstrip('/').rpartition('/')[2]}, compressed with {report.scheme}\n",
        *([failed] if failed else []),
        f"Made from `{report.model}` by [compress](compress.json):\n\n    {facts.command}\n",
        f"Scheme `{report.scheme}` ({options}). {show(report.bytes)} of tensors, {report.ratio:.2f} times smaller than "
        f"{show(report.original_bytes)}; {bits}{report.bits_per_weight_model:.3f} over the whole model.\n",
        *([_target(report.target)] if report.target else []),
        *([_LOSSLESS] if lossless else []),
        *([_calibration(facts.calibration)] if facts.calibration else []),
        _scores(report.evaluation),
        _layers(report),
        _loading(facts.loader),
        "`compress verify DIR` checks every byte; "
        f"`compress export DIR --to {'original' if lossless else 'bf16'} -o PLAIN` writes plain weights.\n",
        f"Versions: {versions}.\n",
    ]
    if report.notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in report.notes))
    return "\n".join(part for part in parts if part)


_LOSSLESS = "Lossless: each tensor was decoded after it was coded, and equalled the original in every bit.\n"


def _target(target: dict[str, Any]) -> str:
    named = ", ".join(f"`{name}`" for name in target["candidates"])
    size = f"{show(target['bytes'])} ({target['bytes']} bytes of tensors)"
    return f"Made to fit {size} with {named}: {told_target(target)}.\n"


def layer_chart(report: Report) -> str | None:
    """An SVG of the layers that lost most; None where nothing was lost, or there are no two to compare."""
    what, losses = layer_losses(report)
    worst = sorted(losses.items(), key=lambda line: -line[1])
    if len(worst) < 2 or not worst[0][1] > 0:
        return None
    note = f"the {_BARS} worst of {len(worst)}" if len(worst) > _BARS else ""
    return chart.bars("Where it went: the layers that lost most", what, worst[:_BARS], note)


def _calibration(calibration: Mapping[str, Any]) -> str:
    how = f"{calibration['samples']} samples of {calibration['seq_len']} tokens of `{calibration['source']}`"
    return f"Fitted to {how} (SHA-256 of the tokens {calibration['sha256'][:12]}).\n"


def _scores(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "## Scores\n\nNot scored. `compress eval DIR --reference MODEL` does it.\n"
    text = evaluation["text"]
    lines = score_lines(evaluation)
    rows = "".join(f"| {name} | {value} | {before} |\n" for name, value, before in lines)
    gates = "".join(f"- {sentence(gate)}\n" for gate in evaluation.get("gates", ()))
    marked = f"\n{SIGNIFICANT}\n" if any(value.endswith("*") for _, value, _ in lines) else ""
    notes = "".join(f"\n{note}.\n" for note in evaluation["notes"])
    computed = "" if evaluation["dtype"] == "stored" else f" Computed in {evaluation['dtype']}."
    return (
        f"## Scores\n\nOn {evaluation['tokens']} tokens of `{text['name']}` (SHA-256 {text['sha256'][:12]}), "
        f"{text['windows']} windows of {text['window']}, against the original; ± is one standard error.{computed}\n\n"
        f"| score | compressed | original |\n|---|---|---|\n{rows}{marked}{notes}" + (f"\n{gates}" if gates else "")
    )


def _layers(report: Report) -> str:
    what, worst = worst_layers(report)
    if not worst or layer_chart(report) is None:
        return ""
    named = ", ".join(f"`{name}` {value:.3g}" for name, value in worst)
    return f"## Layers\n\nThe worst by {what}: {named}.\n\n![Layers that lost most]({CHART})\n"


def _loading(loader: str | None) -> str:
    ours = "import compress\nmodel = compress.load(DIR)  # runs on the packed weights\n"
    if loader is None:
        ours += (
            "# or: import compress.hf; AutoModelForCausalLM.from_pretrained(DIR)\n"
            "# Without `compress` installed, loading stops with an error: the weights are in its own layout.\n"
        )
        return f"## Loading\n\n```python\n{ours}```\n"
    plain = (
        f"# or without us, {loader}:\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(DIR)\n"
    )
    layout = "The layout is that package's, which vLLM reads too; this was not tried with vLLM."
    return f"## Loading\n\n```python\n{ours}{plain}```\n\n{layout}\n"
