"""The command-line options that several commands share, and what their values mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from compress.registry import SCHEMES


def settings(values: tuple[str, ...]) -> dict[str, str]:
    """The KEY=VALUE texts of --set."""
    for value in values:
        if "=" not in value:
            raise ValueError(f"--set {value}: write KEY=VALUE, for example --set group_size=64")
    pairs = [value.split("=", 1) for value in values]
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"--set {twice[0]}: given twice; leave one out")
    return dict(pairs)


def _split(tasks: str) -> tuple[str, ...]:
    return tuple(task.strip() for task in tasks.split(",") if task.strip())


def scheme(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantize` and `plan` share: the scheme, its options, and which modules it takes."""
    for option in (
        click.option(
            "--kv-cache",
            type=click.Choice(["fp8"]),
            help="Also measure scales of keys and values, for a KV cache in fp8.",
        ),
        click.option(
            "--exclude",
            multiple=True,
            metavar="RULE",
            help="Leave these modules as they are: a name or its tail, or re:REGEX.",
        ),
        click.option(
            "--include", multiple=True, metavar="RULE", help="Take these modules only: a name or its tail, or re:REGEX."
        ),
        click.option(
            "--recipe", type=click.Path(path_type=Path), help="YAML list of rules, each with match and scheme."
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option; `compress schemes` lists them."
        ),
        click.option(
            "--scheme", default="int4", show_default=True, metavar="NAME", help=f"One of {', '.join(SCHEMES)}."
        ),
    ):
        command = option(command)
    return command


def calibration(command: Callable[..., Any]) -> Callable[..., Any]:
    """The text that a scheme is fitted to."""
    for option in (
        click.option(
            "--stats",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="What calibration measures of the uncompressed model: used where FILE exists, else saved there.",
        ),
        click.option("--seq-len", type=click.IntRange(2), help="Tokens of one; default the context, at most 2048."),
        click.option("--samples", type=click.IntRange(1), help="How many samples are drawn; default 128."),
        click.option(
            "--calibration",
            metavar="SRC",
            help="Text for schemes that use it: a .txt or .jsonl file, a dataset id, builtin (default) or self.",
        ),
    ):
        command = option(command)
    return command


def calibration_of(source: str | None, samples: int | None, seq_len: int | None) -> Any:
    """The Calibration that the options name, None where they are left out."""
    from compress.calibrate import Calibration

    if source is None and samples is None and seq_len is None:
        return None
    return Calibration(Calibration.source if source is None else source, samples or Calibration.samples, seq_len)


def scoring(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantize` and `eval` share: what is scored, and on what."""
    for option in (
        click.option("--device", help="Where models run; by default cuda where there is one, else cpu."),
        click.option("--batch-size", type=click.IntRange(1), help="Windows and requests at a time."),
        click.option("--no-cache", is_flag=True, help="Forget what the original gave, instead of keeping it."),
        click.option("--original-memory", metavar="SIZE", help="Run a larger original by blocks; default 80 % of all."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "stored", "float32"]),
            default="auto",
            show_default=True,
            help="What models compute in; auto: float32 on CPUs without instructions for the stored one.",
        ),
        click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each item; default the task's."),
        click.option("--limit", type=click.IntRange(1), help="At most so many windows, and items of a task."),
        click.option("--window", type=click.IntRange(2), help="Tokens; the default is the context, at most 2048."),
        click.option(
            "--text",
            multiple=True,
            metavar="SRC",
            help="A .txt or .jsonl file, a dataset id, or builtin (default).",
        ),
        click.option("--include-path", type=click.Path(), help="Directory of your own lm-eval task files."),
        click.option("--tasks", default="builtin_cloze", show_default=True, help="lm-eval tasks, or '' for none."),
    ):
        command = option(command)
    return command


def scoring_of(options: dict[str, Any]) -> dict[str, Any]:
    """The scoring options as keywords of `evaluate`."""
    use_cache = not options.pop("no_cache")
    given = {"tasks": _split(options["tasks"]), "text": options["text"] or ("builtin",)}
    return {**options, **given, "use_cache": use_cache}


def gates(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantize` and `eval` share: limits, with exit code 3 where one is missed."""
    for option in (
        click.option(
            "--max-task-drop", type=float, metavar="X", help="Most that a metric of a task may fall below the original."
        ),
        click.option("--min-top1", type=float, metavar="X", help="Least top-1 agreement with the original, up to 1."),
        click.option("--max-kl", type=float, metavar="X", help="Most mean KL divergence, nats; missed: exit code 3."),
    ):
        command = option(command)
    return command


def gates_of(options: dict[str, Any]) -> Any:
    """Takes the gates out of the options."""
    from compress.eval.gates import Gates

    return Gates(**{name: options.pop(name) for name in Gates.__dataclass_fields__})
