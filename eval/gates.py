"""Gates: the limits that a result must keep to be used. A score that is missing or NaN misses every one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gates:
    """max_kl: nats, mean. min_top1: a fraction. max_task_drop: in a metric's own unit. None: not asked for."""

    max_kl: float | None = None
    min_top1: float | None = None
    max_task_drop: float | None = None

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if limit is not None and not 0 <= limit < math.inf:
                raise ValueError(f"{name}: {limit} is no limit; give a number from 0 up")
        if self.min_top1 is not None and self.min_top1 > 1:
            raise ValueError(f"min_top1: {self.min_top1} is beyond 1, the share of all tokens; give a fraction")

    def check(self, compared: bool, tasks: bool) -> None:
        """Raises ValueError where a gate asks for what will not be scored, before hours are spent on it."""
        asked = ", ".join(name for name, limit in vars(self).items() if limit is not None)
        if asked and not compared:
            raise ValueError(f"{asked}: nothing is compared with the original; score against it (eval: --reference)")
        if self.max_task_drop is not None and not tasks:
            raise ValueError("max_task_drop: no task is run; name some with --tasks")

    def judge(self, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """A line for each gate that was asked for: what was measured, of what, and whether it passed."""
        scores = {
            f"{task} {metric}": score
            for task, metrics in evaluation["tasks"].items()
            for metric, score in metrics.items()
        }
        drops = {name: _drop(score) for name, score in scores.items()}
        # NaN is the largest drop of all
        worst = max(drops, key=lambda name: (math.isnan(drops[name]), drops[name]), default=None)
        drop = None if worst is None else drops[worst]
        if worst and scores[worst]["reference"] is None:
            worst = f"{worst}, on which the original was not scored,"
        lines = []
        if self.max_kl is not None:
            lines.append(_line("max_kl", self.max_kl, evaluation["kl_mean"], "KL divergence, mean (nats)"))
        if self.min_top1 is not None:
            lines.append(_line("min_top1", self.min_top1, evaluation["top1_agreement"], "top-1 agreement"))
        if self.max_task_drop is not None:
            lines.append(_line("max_task_drop", self.max_task_drop, drop, worst or "no task"))
        return lines


def missed(evaluation: dict[str, Any] | None) -> list[str]:
    """A sentence for each gate that was not passed."""
    return [sentence(gate) for gate in (evaluation or {}).get("gates", ()) if not gate["passed"]]


def sentence(gate: dict[str, Any]) -> str:
    """One gate in words."""
    verdict = "passed" if gate["passed"] else "missed"
    value = "unknown" if gate["value"] is None or math.isnan(gate["value"]) else f"{gate['value']:.6g}"
    return f"{gate['gate']} {gate['limit']:g} {verdict}: {gate['of']} is {value}"


def _line(gate: str, limit: float, value: float | None, of: str) -> dict[str, Any]:
    known = math.nan if value is None else value
    passed = known >= limit if gate.startswith("min") else known <= limit  # NaN is neither
    return {"gate": gate, "limit": limit, "value": value, "of": of, "passed": passed}


def _drop(score: dict[str, Any]) -> float:
    """By how much a metric got worse."""
    if score["reference"] is None:
        return math.nan
    fall: float = score["reference"] - score["value"]
    return fall if score.get("higher_is_better", True) else -fall
