"""What a person reads at the end of a command, as rich tables of at most 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from compress.eval import chart
from compress.eval.report import SIGNIFICANT, Report, score_lines, task_score, told_target, worst_layers
from compress.sizes import show

if TYPE_CHECKING:  # what these import takes seconds
    from compress.bench import Bench
    from compress.prepare import Forecast


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
    if report.target:
        table.add_row("target", f"{show(report.target['bytes'])}; {told_target(report.target)}")
    encoding = sum(line["seconds"] or 0.0 for line in report.tensors)
    table.add_row("seconds", f"{report.seconds:.1f}, {encoding:.1f} of them encoding")
    table.add_row("peak memory", show(report.peak_rss_bytes))
    what, worst = worst_layers(report)
    for row, (name, loss) in enumerate(worst):
        table.add_row("" if row else "worst layers", f"{name} {loss:.4g}")
    if worst:
        table.add_row("", f"by {what}")
    return table


def scores(evaluation: dict[str, Any]) -> Table:
    """The scores, beside the original's where there is one."""
    lines = score_lines(evaluation)
    marked = [SIGNIFICANT] if any(value.endswith("*") for _, value, _ in lines) else []
    table = Table(box=None, pad_edge=False, caption="\n".join([*marked, *evaluation["notes"]]) or None)
    table.caption_justify = "left"
    table.add_column("score", overflow="fold")
    table.add_column("this model", justify="right")
    table.add_column("original", justify="right")
    for name, value, original in lines:
        table.add_row(name, value, original)
    return table


def comparison(evaluations: dict[str, dict[str, Any]]) -> Group:
    """Several models by name, a line for each; and their tasks below."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("KL (nats)", "top-1", "perplexity", "bits/byte"):
        table.add_column(heading, justify="right")
    tasks = Table(box=None, pad_edge=False)
    for heading in ("task", "model"):
        tasks.add_column(heading, overflow="fold")
    tasks.add_column("score", justify="right")
    tasks.add_column("difference", justify="right")
    for name, scores in evaluations.items():
        kl = "" if scores["kl_mean"] is None else f"{scores['kl_mean']:.6f}"
        top1 = "" if scores["top1_agreement"] is None else f"{scores['top1_agreement']:.4f}"
        table.add_row(name, kl, top1, f"{scores['perplexity']:.4f}", f"{scores['bits_per_byte']:.4f}")
    by_task = [(t, m, name) for name, scores in evaluations.items() for t, ms in scores["tasks"].items() for m in ms]
    for task, metric, name in sorted(by_task, key=lambda line: line[:2]):
        score = evaluations[name]["tasks"][task][metric]
        value, change = task_score(score)
        tasks.add_row(f"{task} {metric}", name, value, change)
    return Group(table, Text(), tasks) if by_task else Group(table)


def sweep(found: dict[str, Any]) -> Table:
    """A line for each candidate, smallest first; those that no other beats are marked."""
    table = Table(box=None, pad_edge=False, caption="* no other is both smaller and closer to the original")
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    table.add_column("scheme", overflow="fold")
    for heading in ("size", "bits", "KL (nats)", "top-1", "perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in sorted(found["lines"], key=lambda line: line["bytes"]):
        bits = "" if line["bits_per_weight"] is None else f"{line['bits_per_weight']:.3f}"
        scores = (f"{line['kl_mean']:.6f}", f"{line['top1_agreement']:.4f}", f"{line['perplexity']:.4f}")
        table.add_row("*" if line["front"] else "", line["name"], show(line["bytes"]), bits, *scores)
    return table


def layer_chart(lines: list[dict[str, Any]], most: int = 24) -> str:
    """An SVG of the layers whose compression alone costs most."""
    note = f"the {most} worst of {len(lines)}" if len(lines) > most else ""
    values = [(line["name"], line["kl"]) for line in lines[:most]]
    return chart.bars("Where it went", "KL divergence with this layer alone compressed (nats)", values, note)


def layers(lines: list[dict[str, Any]], most: int = 10) -> Table | Text:
    """The layers whose compression alone costs most."""
    if not lines:
        return Text("No layer was compressed with loss.")
    table = Table(box=None, pad_edge=False, caption=f"of {len(lines)}, each compressed alone; --json and -o have all")
    table.caption_justify = "left"
    table.add_column("layer", overflow="fold")
    table.add_column("KL (nats)", justify="right")
    for line in lines[:most]:
        error = "" if line["kl_stderr"] is None else f" ± {line['kl_stderr']:.6f}"
        table.add_row(line["name"], f"{line['kl']:.6f}{error}")
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


def bench(found: Bench) -> Table:
    """A line for each scheme: microseconds for the fewest tokens, and times the uncompressed speed for each number."""
    where = f"{found.processor}, {found.threads} threads" if found.device == "cpu" else found.processor
    shape = "x".join(map(str, found.shape))
    table = Table(box=None, pad_edge=False, title=f"{shape} on {where}, torch {found.torch}", title_justify="left")
    table.add_column("scheme", no_wrap=True)
    table.add_column("bits", justify="right")
    counts = list(found.lines[0].seconds)
    table.add_column(f"ms, {_tokens(counts[0])}", justify="right")
    for count in counts:
        table.add_column(f"speed, {_tokens(count)}", justify="right")
    for line in found.lines:
        speeds = [f"{line.speedup[count]:.2f}" for count in counts]
        table.add_row(line.name, f"{line.bits_per_weight:.2f}", f"{1e3 * line.seconds[counts[0]]:.3f}", *speeds)
    return table


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    return table
