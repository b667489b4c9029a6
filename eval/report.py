"""The report of a run: as an object and as report.json, and its figures as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from compress.eval.gates import missed
from compress.registry import scheme_class


@dataclass(frozen=True)
class Report:
    """report.json as an object. Bytes and seconds; ratio is original_bytes / bytes; errors are fractions in 0..1."""

    model: str
    scheme: str
    options: dict[str, Any]
    original_bytes: int
    bytes: int
    ratio: float
    bits_per_weight: float | None  # of the compressed weights, everything they store included; None without any
    bits_per_weight_model: float
    parameters: int
    seconds: float
    peak_rss_bytes: int
    tensors: list[dict[str, Any]]
    notes: list[str]
    evaluation: dict[str, Any] | None
    target: dict[str, Any] | None = None  # where a size was to be met, what was chosen for it (`target.py`)

    @property
    def missed_gates(self) -> list[str]:
        """A sentence for each quality gate that was asked for and not passed."""
        return missed(self.evaluation)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


SIGNIFICANT = "* differs from the original at the 5 % level, paired over the same items"
_FIDELITY = (
    ("kl_mean", "KL divergence, mean (nats)"),
    ("kl_median", "KL divergence, median"),
    ("kl_p90", "KL divergence, 90th percentile"),
    ("kl_p99", "KL divergence, 99th percentile"),
    ("kl_max", "KL divergence, largest"),
)


def score_lines(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(score, this model, original) as text, the same figures wherever they are shown."""
    scores = evaluation
    lines = [
        (
            "perplexity",
            _bar(scores["perplexity"], scores["perplexity_stderr"]),
            _bar(scores["reference_perplexity"], scores["reference_perplexity_stderr"]),
        ),
        ("bits per byte", _bar(scores["bits_per_byte"]), _bar(scores["reference_bits_per_byte"])),
    ]
    if scores["kl_mean"] is not None:
        for key, label in _FIDELITY:
            lines.append((label, _bar(scores[key], scores["kl_stderr"] if key == "kl_mean" else None, 6), ""))
        for key, label in (("top1_agreement", "top-1 agreement"), ("top5_agreement", "top-5 agreement")):
            lines.append((label, _bar(scores[key]), ""))
    if capacity := scores.get("information_capacity"):
        lines.append(("information capacity", _bar(capacity["value"]), _bar(capacity["reference"])))
    if speed := scores.get("generation_tokens_per_second"):
        lines.append(("tokens per second, generating", _bar(speed, digits=1), ""))
        lines.append(("tokens per second, scoring", _bar(scores["tokens_per_second"], digits=1), ""))
    if cache := scores.get("kv_cache"):
        now, before = cache["bytes_per_token"], cache["original_bytes_per_token"]
        label = f"KV cache, bytes per token ({cache['kind']}, {cache['bits']} bits)"
        lines.append((label, f"{now:.0f}", f"{before:.0f}"))
    for task, metrics in scores["tasks"].items():
        for metric, score in metrics.items():
            ours, change = task_score(score)
            lines.append((f"{task} {metric}", ours, _bar(score["reference"], score["reference_stderr"])))
            if change:
                lines.append(("  difference, same items", change, ""))
    return lines


def task_score(score: dict[str, Any]) -> tuple[str, str]:
    """A metric's value, and its difference to the original with a star where that is significant, as text."""
    change = _bar(score["difference"], score["difference_stderr"], sign="+")
    return _bar(score["value"], score["stderr"]), change + " *" * bool(score["significant"])


def layer_losses(report: Report) -> tuple[str, dict[str, float]]:
    """What is known of each layer's loss, the most telling first, and the loss by layer."""
    layers = (report.evaluation or {}).get("layers")
    if layers:
        return "KL divergence with this layer alone compressed (nats)", {line["name"]: line["kl"] for line in layers}
    for key, what in (("output_error", "relative error of the output"), ("relative_error", "relative error")):
        found = {line["name"]: line[key] for line in report.tensors if line["scheme"] and line.get(key) is not None}
        if found:
            return what, found
    return "", {}


def worst_layers(report: Report, most: int = 5) -> tuple[str, list[tuple[str, float]]]:
    """What is measured, and the layers that lost most of it; none where nothing was lost."""
    what, losses = layer_losses(report)
    worst = sorted(((name, loss) for name, loss in losses.items() if loss > 0), key=lambda line: -line[1])
    return what, worst[:most]


def told_target(target: dict[str, Any]) -> str:
    """What was chosen for a target size, and what that should cost."""
    uniform = target["uniform"]
    beside = f", {uniform['predicted_kl']:.3g} with {uniform['candidate']} alone" if uniform else ""
    chosen = ", ".join(f"{count} {name}" for name, count in target["weights"].items() if count)
    bits = f"{target['bits_per_weight']:.3f} bits for each weight that was to be chosen for"
    return f"{bits}, least KL, predicted {target['predicted_kl']:.3g}{beside} ({chosen})"


def is_lossless(report: Report) -> bool:
    """Whether everything that was compressed comes back bit for bit."""
    schemes = {line["scheme"] for line in report.tensors} - {None}
    return bool(schemes) and all(scheme_class(scheme).lossless for scheme in schemes)


def _bar(value: float | None, stderr: float | None = None, digits: int = 4, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
