"""What a person reads at the end of a command, as rich tables of at most 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from compress.eval.report import Report, score_lines
from compress.prepare import Forecast
from compress.sizes import show


def tensors(lines: list[dict[str, Any]], most: int = 0) -> Table:
    """A line per tensor; with `most`, only so many: compressed ones first, the largest of them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "scheme", "size", "bits", "error"):
        table.add_column(heading, justify="right", no_wrap=heading != "shape")
    largest = sorted(lines, key=lambda line: (line["scheme"] is None, -line["bytes"]))
    shown = largest[:most] if most else lines
    for line in shown:
        error = "" if line["relative_error"] is None else f"{line['relative_error']:.4f}"
        shape = "x".join(map(str, line["shape"]))
        table.add_row(
            line["name"], shape, line["scheme"] or "-", show(line["bytes"]), f"{line['bits_per_weight']:.3f}", error
        )
    if len(shown) < len(lines):
        table.add_row(f"{len(lines) - len(shown)} more: compress inspect", "", "", "", "", "")
    return table


def totals(report: dict[str, Any]) -> Table:
    """Sizes before and after."""
    table = _pairs()
    table.add_row("original", show(report["original_bytes"]))
    table.add_row("compressed", f"{show(report['bytes'])}, {report['ratio']:.2f} times smaller")
    if report["bits_per_weight"] is not None:
        table.add_row("bits per weight", f"{report['bits_per_weight']:.3f} in compressed weights")
    table.add_row("", f"{report['bits_per_weight_model']:.3f} over all {report['parameters']:,} parameters")
    return table


def forecast(plan: Forecast) -> Table:
    """The totals of a plan."""
    table = totals(plan.totals)
    table.add_row("peak memory", f"{show(plan.peak_memory_bytes)} beside the libraries and the scoring")
    for rule, count in plan.plan.rule_counts:
        table.add_row(rule, f"matches {count} modules")
    return table


def run(report: Report) -> Table:
    """The result of `quantize`."""
    table = totals(report.to_dict())
    table.add_row("seconds", f"{report.seconds:.1f}")
    table.add_row("peak memory", show(report.peak_rss_bytes))
    return table


def scores(evaluation: dict[str, Any]) -> Table:
    """The scores, beside the original's where there is one."""
    table = Table(box=None, pad_edge=False)
    table.add_column("score", overflow="fold")
    table.add_column("this model", justify="right")
    table.add_column("original", justify="right")
    for name, value, original in score_lines(evaluation):
        table.add_row(name, value, original)
    return table


def scheme(described: dict[str, Any]) -> Group:
    """What a scheme is, and its options."""
    title = f"{described['name']}: {described['about']} {described['bits_per_weight']:.3f} bits per weight by default."
    table = Table(box=None, padding=(0, 2))
    for heading in ("option", "type", "default", "allowed"):
        table.add_column(heading, overflow="fold")
    for option in described["options"]:
        allowed = ", ".join(option["choices"]) if option["choices"] else ""
        table.add_row(option["name"], option["type"], str(option["default"]).lower(), allowed)
    return Group(Text(title, style="bold"), table)


def _pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table
