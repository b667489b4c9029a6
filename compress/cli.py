"""The `compress` command. Heavy imports stay inside the commands, so that `--help` is instant."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from compress import __version__, console, options
from compress.registry import SCHEMES, did_you_mean


class _Group(click.Group):
    """Suggests the nearest command for an unknown one."""

    command_class = options.Command

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            context.fail(f"no command {args[0]!r}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(context, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="compress")
def main() -> None:
    """Make a language model's checkpoint smaller, and measure what that cost.

    \b
    compress quantize MODEL --scheme int4 -o OUT
    compress eval OUT --reference MODEL
    """


@main.command()
@click.argument("model")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@options.scheme
@options.under("Scheme")(
    "--target-size",
    metavar="SIZE",
    help="What all tensors may take, 3.2GiB or bytes: each weight gets one of the widths of --scheme, or of the "
    "schemes that it lists (int4:bits=3,int4,fp8), so that the predicted loss is least.",
)
@options.calibration
@options.under("Scoring")("--eval/--no-eval", "score", default=True, help="Score the result against the original.")
@options.scoring
@options.gates
@click.option("--shard-size", default="5GB", show_default=True, help="Largest output file: bytes, 5GB or 5GiB.")
@click.option("--overwrite", is_flag=True, help="Replace the output, when the new one is complete.")
@console.reports
def quantize(
    model: str,
    out: Path,
    scheme: str,
    settings: tuple[str, ...],
    recipe: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    kv_cache: str | None,
    target_size: str | None,
    calibration: str | None,
    samples: int | None,
    seq_len: int | None,
    stats: Path | None,
    seed: int,
    score: bool,
    shard_size: str,
    overwrite: bool,
    as_json: bool,
    **scoring: Any,
) -> None:
    """Compress MODEL, then score the result.

    MODEL is a directory or a hub id.

    \b
    compress quantize meta-llama/Llama-3.2-1B --scheme int4 -o OUT
    compress quantize MODEL --scheme int4 --set bits=3 --exclude down_proj -o OUT
    compress quantize MODEL --scheme int4 --target-size 3.2GiB -o OUT
    """
    from compress import tables
    from compress.prepare import Prepared
    from compress.recipe import Rules
    from compress.run import Options, Scoring, run

    if not model or not out.name:
        raise ValueError("MODEL and --output need a name")
    gates = options.gates_of(scoring)
    how = Scoring(**options.scoring_of(scoring)) if score else None
    text, device = options.calibration_of(calibration, samples, seq_len), scoring["device"]
    command = shlex.join(["compress", *sys.argv[1:]])
    run_options = Options(how, text, device, seed, overwrite, shard_size, command, gates, stats)
    with console.progress() as progress:
        rules = Rules(recipe, include, exclude)
        prepared = Prepared(model, scheme, options.settings(settings), rules, kv_cache, target_size)
        report = run(prepared, model, out, run_options, progress)
    console.emit(report.to_dict(), as_json)
    shown = [tables.scores(report.evaluation)] if report.evaluation else []
    console.show(tables.tensors(report.tensors, most=8), tables.run(report), *shown)
    for note in report.notes:
        click.echo(f"Note: {note}", err=True)
    click.echo(f"Wrote {out}", err=True)
    console.judge(report.evaluation)


@main.command()
@click.argument("model")
@options.scheme
@console.reports
def plan(
    model: str,
    scheme: str,
    settings: tuple[str, ...],
    recipe: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    kv_cache: str | None,
    as_json: bool,
) -> None:
    """Predict every tensor's size, from headers.

    A lossless scheme's sizes depend on the values, so for it these are read too.

    The table goes to stderr, as all text for people does; --json goes to stdout.

    \b
    compress plan MODEL --scheme int4 --set group_size=32
    """
    from compress import tables
    from compress.prepare import Prepared
    from compress.recipe import Rules

    with console.progress() as progress:
        prepared = Prepared(model, scheme, options.settings(settings), Rules(recipe, include, exclude), kv_cache)
        forecast = prepared.forecast(progress)
    lines = [vars(line) for line in forecast.tensors]
    rules = [{"rule": rule, "modules": count} for rule, count in forecast.plan.rule_counts]
    extra = {"peak_memory_bytes": forecast.peak_memory_bytes, "rules": rules, "notes": forecast.notes}
    console.emit({"model": model, "scheme": scheme, **forecast.totals, **extra, "tensors": lines}, as_json)
    console.show(tables.tensors(lines), tables.forecast(forecast))
    for note in forecast.notes:
        click.echo(f"Note: {note}", err=True)


@main.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--reference", metavar="ORIGINAL", help="Compare with this model: KL divergence, agreement, task scores.")
@click.option("--max-memory", metavar="SIZE", help="What the weights of a bitstack MODEL may take: 3.2GiB, or bytes.")
@options.scoring
@click.option("--kv-cache", type=click.Choice(["bfp", "kivi"]), help="Score MODEL with keys and values packed.")
@click.option("--kv-bits", type=click.IntRange(2), help="Of bfp: 4 (default), 5, 6 or 8; of kivi: 4 (default) or 2.")
@options.gates
@click.option("--layers", is_flag=True, help="KL divergence that each compressed layer causes alone: a pass for each.")
@click.option(
    "--capacity",
    is_flag=True,
    help="Information capacity (arXiv:2511.08066): the bits of text that a token stands for, less those it is coded "
    "in, less 24, over log2 of the operations it takes.",
)
@click.option("--speed", is_flag=True, help="Tokens per second: scored, and generated one after the other.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Also write the scores to this file.")
@console.reports
def evaluate(
    models: tuple[str, ...],
    reference: str | None,
    max_memory: str | None,
    kv_cache: str | None,
    kv_bits: int | None,
    layers: bool,
    capacity: bool,
    speed: bool,
    out: Path | None,
    as_json: bool,
    **scoring: Any,
) -> None:
    """Score MODEL, compressed or not; several are compared.

    Perplexity, bits per byte and lm-eval tasks; with --reference also KL divergence, and differences item by item. What
    the reference gave is kept in COMPRESS_CACHE (~/.cache/compress), at most COMPRESS_CACHE_LIMIT (10GiB).

    \b
    compress eval OUT --reference MODEL --tasks hellaswag,arc_easy --limit 200
    compress eval MODEL --reference MODEL --kv-cache bfp --kv-bits 4
    """
    from compress import tables
    from compress.api import evaluate as run
    from compress.formats.files import write_text

    if out and not out.resolve().parent.is_dir():
        raise ValueError(f"output {out}: {out.resolve().parent} is no directory")
    if len(set(models)) < len(models):
        raise ValueError(f"{', '.join(models)}: one of them is named twice")
    gates, how = options.gates_of(scoring), options.scoring_of(scoring)
    gates.check(reference is not None, bool(how["tasks"]))
    loading = {"max_memory": max_memory, "kv_cache": kv_cache, "kv_bits": kv_bits}
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        with console.progress() as progress:
            asked = {"layers": layers, "capacity": capacity, "speed": speed}
            found[model] = run(model, reference, **how, **loading, **asked, progress=progress).to_dict()
        found[model]["gates"] = gates.judge(found[model])
    document = found if len(models) > 1 else found[models[0]]
    console.emit(document, as_json)
    console.show(*([tables.comparison(found)] if len(models) > 1 else [tables.scores(found[models[0]])]))
    if layers:
        console.show(*(tables.layers(scores["layers"]) for scores in found.values()))
    if out:
        write_text(out, json.dumps(document, indent=1) + "\n")
        click.echo(f"Wrote {out}", err=True)
        if layers and len(models) == 1:
            write_text(out.with_suffix(".svg"), tables.layer_chart(found[models[0]]["layers"]))
            click.echo(f"Wrote {out.with_suffix('.svg')}", err=True)
    console.judge(*found.values())


@main.command()
@click.argument("model")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option(
    "--schemes", "candidates", required=True, metavar="A,B:KEY=VALUE", help="For example int4,int4:bits=3,fp8."
)
@click.option("--include", multiple=True, metavar="RULE", help="Take these modules only, as in `quantize`.")
@click.option("--exclude", multiple=True, metavar="RULE", help="Leave these modules as they are.")
@options.calibration
@options.scoring
@click.option("--within-kl", type=float, metavar="X", help="Name the smallest within this mean KL divergence, in nats.")
@click.option("--within-size", metavar="SIZE", help="Name the best within this size: bytes, 4GB or 4GiB.")
@click.option("--discard", is_flag=True, help="Keep the scores of each, and not the model.")
@click.option("--overwrite", is_flag=True, help="Replace those that were made in another way before.")
@console.reports
def sweep(
    model: str,
    out: Path,
    candidates: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    calibration: str | None,
    samples: int | None,
    seq_len: int | None,
    stats: Path | None,
    seed: int,
    within_kl: float | None,
    within_size: str | None,
    discard: bool,
    overwrite: bool,
    as_json: bool,
    **scoring: Any,
) -> None:
    """Try many schemes on MODEL: size against loss.

    Each is compressed to a directory of its own below the output, and scored; run again, it goes on with what is
    missing. pareto.json and pareto.svg show them all.

    \b
    compress sweep MODEL -o DIR --schemes int4,int4:bits=3,fp8 --within-kl 0.01
    """
    from compress import tables
    from compress.candidates import parse
    from compress.recipe import Rules
    from compress.run import Options, Scoring
    from compress.sweep import Goals
    from compress.sweep import sweep as run

    how, text = Scoring(**options.scoring_of(scoring)), options.calibration_of(calibration, samples, seq_len)
    run_options = Options(how, text, scoring["device"], seed, overwrite, stats=stats)
    goals = Goals(within_kl, within_size, discard)
    with console.progress() as progress:
        found = run(model, out, parse(candidates), run_options, Rules(None, include, exclude), goals, progress)
    console.emit(found.to_dict(), as_json)
    if found.lines:
        console.show(tables.sweep(found.to_dict()))
    for answer in found.answers:
        click.echo(answer, err=True)
    for name, reason in found.refused.items():
        click.echo(f"Error: {name}: {reason}", err=True)
    click.echo(f"Wrote {out}/pareto.json and pareto.svg", err=True)
    if found.refused:
        sys.exit(console.FAILED)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@console.reports
def inspect(out: Path, as_json: bool) -> None:
    """Show scheme, size and error of every tensor.

    \b
    compress inspect OUT
    """
    from compress import tables
    from compress.run import read_report

    if not out.is_dir():
        raise ValueError(f"{out} does not exist, or is no directory")
    if not (out / "report.json").exists():
        raise ValueError(f"{out}: no report.json, so it was not written by `compress quantize`")
    report = read_report(out)
    console.emit(report.to_dict(), as_json)
    shown = [tables.scores(report.evaluation)] if report.evaluation else []
    console.show(tables.tensors(report.tensors), tables.run(report), *shown)


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Also decode every tensor and compare it with the original.")
@console.reports
def verify(out: Path, against: str | None, as_json: bool) -> None:
    """Check every byte against the manifest.

    \b
    compress verify OUT --against MODEL
    """
    from compress.formats import manifest

    lines: list[dict[str, Any]] = []
    if against is None:  # at once: nothing of torch is needed
        problems = manifest.verify(out)
    else:
        from compress.api import verify as run

        found = run(out, against)
        problems, lines = found.problems, [vars(line) for line in found.tensors]
    console.emit({"ok": not problems, "problems": problems, "tensors": lines}, as_json)
    for line in lines:
        same = "equal" if line["equal"] else f"relative error {line['relative_error']:.5f}"
        click.echo(f"{line['name']}: {line['action']}, {same}", err=True)
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    if problems:
        sys.exit(console.FAILED)
    click.echo(f"{out} is as it was written", err=True)


@main.command()
@click.argument("model")
@click.option(
    "--to",
    "form",
    type=click.Choice(["bf16", "fp16", "fp32", "original"]),
    default="bf16",
    show_default=True,
    help="What to write; original: as it was before a lossless scheme.",
)
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output, when the new one is complete.")
@console.reports
def export(model: str, form: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write a compressed MODEL as a plain one.

    \b
    compress export OUT --to bf16 -o PLAIN
    """
    from compress.api import export as run

    with console.progress() as progress:
        run(model, out, form, overwrite, progress)
    console.emit({"wrote": str(out), "form": form}, as_json)
    click.echo(f"Wrote {out}", err=True)


@main.command()
@click.argument("model")
@click.option("--size", required=True, metavar="SIZE", help="What the copy's weight files may take: 4GiB, or bytes.")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output, when the new one is complete.")
@console.reports
def trim(model: str, size: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write a smaller copy of a bitstack MODEL.

    \b
    compress trim OUT --size 4GiB -o SMALL
    """
    from compress.api import trim as run

    written = run(model, out, size, overwrite, command=shlex.join(["compress", *sys.argv[1:]]))
    console.emit({"wrote": str(out), "bytes": written}, as_json)
    click.echo(f"Wrote {out}, {written} bytes of weights", err=True)


@main.command()
@click.option("--device", help="Where to multiply; by default cuda where there is one, else cpu.")
@click.option("--shape", metavar="OUTxIN", default="4096x4096", show_default=True, help="Of the weight: 14336x4096.")
@console.reports
def bench(device: str | None, shape: str, as_json: bool) -> None:
    """Time each scheme's product on this machine.

    Beside the uncompressed one, for 1, 16 and 256 tokens at a time; in about a minute.

    \b
    compress bench --shape 14336x4096
    """
    from compress import tables
    from compress.bench import bench as run

    sizes = shape.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"shape is {shape!r}; give two numbers, for example 4096x4096")
    with console.progress() as progress:
        found = run(device, (int(sizes[0]), int(sizes[1])), progress=progress)
    console.emit({**found.to_dict(), "warnings": found.warnings}, as_json)
    console.show(tables.bench(found))
    for warning in found.warnings:
        click.echo(f"Note: {warning}", err=True)


@main.command()
@console.reports
def schemes(as_json: bool) -> None:
    """List schemes and their options."""
    from compress import tables
    from compress.registry import describe

    described = [describe(name) for name in SCHEMES]
    console.emit(described, as_json)
    console.show(*map(tables.scheme, described))


if __name__ == "__main__":
    main()
