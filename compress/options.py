"""The command-line options that several commands share, and what their values mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from compress.registry import SCHEMES


class Command(click.Command):
    """A command whose options stand under headings."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Those without a heading come first."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(context):
            line = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if line:
                groups.setdefault(getattr(parameter, "heading", "Options"), []).append(line)
        for heading, lines in groups.items():
            with formatter.section(heading):
                formatter.write_dl(lines)


class _Option(click.Option):
    def __init__(self, *names: Any, heading: str, **how: Any) -> None:
        super().__init__(*names, **how)
        self.heading = heading


def under(heading: str) -> Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """click.option, for an option that stands under that heading in the help of a `Command`."""
    return partial(click.option, cls=_Option, heading=heading)


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
    option = under("Scheme")
    for add in (
        option(
            "--kv-cache",
            type=click.Choice(["fp8"]),
            help="Also measure scales of keys and values, for a KV cache in fp8.",
        ),
        option(
            "--exclude",
            multiple=True,
            metavar="RULE",
            help="Leave these modules as they are: a name or its tail, or re:REGEX.",
        ),
        option(
            "--include", multiple=True, metavar="RULE", help="Take these modules only: a name or its tail, or re:REGEX."
        ),
        option("--recipe", type=click.Path(path_type=Path), help="YAML list of rules, each with match and scheme."),
        option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option; `compress schemes` lists them."
        ),
        option("--scheme", default="int4", show_default=True, metavar="NAME", help=f"One of {', '.join(SCHEMES)}."),
    ):
        command = add(command)
    return command


def calibration(command: Callable[..., Any]) -> Callable[..., Any]:
    """The text that a scheme is fitted to."""
    option = under("Calibration")
    for add in (
        option("--seed", default=0, show_default=True, help="Decides which samples of the calibration text are drawn."),
        option(
            "--stats",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="What calibration measures of the uncompressed model: used where FILE exists, else saved there.",
        ),
        option("--seq-len", type=click.IntRange(2), help="Tokens of one; default the context, at most 2048."),
        option("--samples", type=click.IntRange(1), help="How many samples are drawn; default 128."),
        option(
            "--calibration",
            metavar="SRC",
            help="Text for schemes that use it: a .txt or .jsonl file, a dataset id, builtin (default) or self.",
        ),
    ):
        command = add(command)
    return command


def calibration_of(source: str | None, samples: int | None, seq_len: int | None) -> Any:
    """The Calibration that the options name, None where they are left out."""
    from compress.calibrate import Calibration

    if source is None and samples is None and seq_len is None:
        return None
    return Calibration(Calibration.source if source is None else source, samples or Calibration.samples, seq_len)


def scoring(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantize` and `eval` share: what is scored, and on what."""
    option = under("Scoring")
    for add in (
        option("--device", help="Where models run; by default cuda where there is one, else cpu."),
        option("--batch-size", type=click.IntRange(1), help="Windows and requests at a time."),
        option("--no-cache", is_flag=True, help="Forget what the original gave, instead of keeping it."),
        option("--original-memory", metavar="SIZE", help="Run a larger original by blocks; default 80 % of all."),
        option(
            "--dtype",
            type=click.Choice(["auto", "stored", "float32"]),
            default="auto",
            show_default=True,
            help="What models compute in; auto: float32 on CPUs without instructions for the stored one.",
        ),
        option("--num-fewshot", type=click.IntRange(0), help="Examples before each item; default the task's."),
        option("--limit", type=click.IntRange(1), help="At most so many windows, and items of a task."),
        option("--window", type=click.IntRange(2), help="Tokens; the default is the context, at most 2048."),
        option(
            "--text",
            multiple=True,
            metavar="SRC",
            help="A .txt or .jsonl file, a dataset id, or builtin (default).",
        ),
        option("--include-path", type=click.Path(), help="Directory of your own lm-eval task files."),
        option("--tasks", default="builtin_cloze", show_default=True, help="lm-eval tasks, or '' for none."),
    ):
        command = add(command)
    return command


def scoring_of(options: dict[str, Any]) -> dict[str, Any]:
    """The scoring options as keywords of `evaluate`."""
    use_cache = not options.pop("no_cache")
    given = {"tasks": _split(options["tasks"]), "text": options["text"] or ("builtin",)}
    return {**options, **given, "use_cache": use_cache}


def gates(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantize` and `eval` share: limits, with exit code 3 where one is missed."""
    option = under("Gates")
    for add in (
        option(
            "--max-task-drop", type=float, metavar="X", help="Most that a metric of a task may fall below the original."
        ),
        option("--min-top1", type=float, metavar="X", help="Least top-1 agreement with the original, up to 1."),
        option("--max-kl", type=float, metavar="X", help="Most mean KL divergence, nats; missed: exit code 3."),
    ):
        command = add(command)
    return command


def gates_of(options: dict[str, Any]) -> Any:
    """Takes the gates out of the options."""
    from compress.eval.gates import Gates

    return Gates(**{name: options.pop(name) for name in Gates.__dataclass_fields__})
