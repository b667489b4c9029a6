"""`sweep`: one model, many schemes and options; which of them no other beats, and which one to take."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress import sizes
from compress.candidates import Candidate
from compress.eval import chart
from compress.eval.chart import Point
from compress.formats import manifest
from compress.formats.files import write_text
from compress.prepare import Prepared
from compress.progress import Progress
from compress.recipe import Rules
from compress.run import Options, run, versions, wanted_parts

_KEPT = (
    "bytes original_bytes ratio bits_per_weight bits_per_weight_model seconds",
    "kl_mean kl_stderr kl_median kl_p99 top1_agreement top5_agreement perplexity perplexity_stderr tasks",
)


@dataclass(frozen=True)
class Sweep:
    """lines: what was measured of each candidate, `front` among it. refused: by name, why it could not be made."""

    model: str
    lines: list[dict[str, Any]]
    refused: dict[str, str]
    answers: list[str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Goals:
    """max_kl: nats. max_size: bytes or text. discard: keep the reports, and not the models."""

    max_kl: float | None = None
    max_size: int | str | None = None
    discard: bool = False

    def __post_init__(self) -> None:
        if self.max_size is not None:
            sizes.parse(self.max_size)  # says what is wrong with it now


def sweep(
    model: str,
    out: Path,
    candidates: Sequence[Candidate],
    options: Options,
    rules: Rules | None = None,
    goals: Goals = Goals(),  # noqa: B008  # frozen
    progress: Progress | None = None,
) -> Sweep:
    """Compresses and scores each candidate to a directory of its own in `out`; those that are done stay as they are.

    Writes pareto.json and pareto.svg after each. The original is scored once, and its scores come from the cache after
    that; those that are calibrated share one file of statistics (`statistics.py`). Raises ValueError, before anything
    is made, for candidates that no scheme takes.
    """
    if options.scoring is None:
        raise ValueError("a sweep compares scores, and scoring is switched off")
    planned = [(c, Prepared(model, c.scheme, dict(c.options), rules or Rules())) for c in candidates]
    out.mkdir(parents=True, exist_ok=True)
    given = options.stats is not None
    options = replace(options, **_shared([prepared for _, prepared in planned], out, options))
    lines: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for candidate, prepared in planned:
        try:
            lines.append(_one(candidate, prepared, model, out, options, goals.discard, progress))
        except ValueError as error:
            refused[candidate.name] = str(error)
        found = _finished(model, lines, refused, goals)
        write_text(out / "pareto.json", json.dumps(found.to_dict(), indent=1) + "\n")
        write_text(out / "pareto.svg", drawn(found))
    if goals.discard and options.stats_parts and not given:
        Path(options.stats or "").unlink(missing_ok=True)
    return found


def _one(
    candidate: Candidate,
    prepared: Prepared,
    model: str,
    out: Path,
    options: Options,
    discard: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """One candidate's line, made or read."""
    directory, note = out / candidate.name, out / f"{candidate.name}.json"
    calibrated = prepared.plan.needs_calibration
    own = options if calibrated else replace(options, calibration=None, stats=None)
    key = _key(prepared, own)
    try:
        noted = manifest.unseal(note)
    except (FileNotFoundError, ValueError):
        noted = {}
    if noted.get("key") == key and (discard or directory.is_dir()):
        line: dict[str, Any] = noted["line"]
        return line
    saved = ["--stats", str(own.stats)] if own.stats else []
    command = shlex.join(["compress", "quantize", model, *candidate.arguments, *saved, "-o", str(directory)])
    report = run(prepared, model, directory, replace(own, command=command), progress)
    scores = report.evaluation or {}
    line = {"name": candidate.name, "scheme": candidate.scheme, "options": dict(candidate.options)}
    line |= {name: getattr(report, name) for name in _KEPT[0].split()}
    line |= {name: scores[name] for name in _KEPT[1].split()} | {"missed_gates": report.missed_gates}
    write_text(note, manifest.seal({"key": key, "line": line}))
    if discard:
        shutil.rmtree(directory)
    return line


def _shared(planned: Sequence[Prepared], out: Path, options: Options) -> dict[str, Any]:
    """Calibrated once: the file of statistics that several candidates use, and what it must hold for all of them."""
    calibrated = [prepared for prepared in planned if prepared.plan.needs_calibration]
    if not calibrated:
        return {}
    parts = sorted({part for prepared in calibrated for part, modules in wanted_parts(prepared).items() if modules})
    decisive = [calibrated[0].source.identity(), repr(options.calibration), options.seed, parts]
    name = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    if options.stats is not None:
        return {"stats_parts": tuple(parts)}
    return {"stats": out / f"statistics-{name}.safetensors", "stats_parts": tuple(parts)}


def _key(prepared: Prepared, options: Options) -> str:
    """A hash of all that decides a candidate's line."""
    scoring = asdict(options.scoring) if options.scoring else {}
    decisive = {
        "source": prepared.source.identity(),
        "plan": prepared.plan.to_config(),
        "calibration": repr(options.calibration),
        "statistics": options.stats is not None,
        "seed": options.seed,
        "gates": asdict(options.gates),
        "scoring": {name: value for name, value in scoring.items() if name != "use_cache"},
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _finished(model: str, lines: list[dict[str, Any]], refused: dict[str, str], goals: Goals) -> Sweep:
    points = [Point(line["name"], line["bytes"], line["kl_mean"]) for line in lines]
    best = {point.name for point in chart.front(points)}
    marked = [{**line, "front": line["name"] in best} for line in lines]
    return Sweep(model, marked, refused, answers(points, goals))


def answers(points: Sequence[Point], goals: Goals) -> list[str]:
    """What was asked, in words."""
    found = []
    if goals.max_kl is not None:
        within = [point for point in points if point.loss <= goals.max_kl]
        what = f"Smallest within a KL divergence of {goals.max_kl:g} nats"
        found.append(_answer(what, min(within, key=lambda p: (p.size, p.loss), default=None)))
    if goals.max_size is not None:
        limit = sizes.parse(goals.max_size)
        within = [point for point in points if point.size <= limit and math.isfinite(point.loss)]
        what = f"Best within {sizes.show(limit)}"
        found.append(_answer(what, min(within, key=lambda p: (p.loss, p.size), default=None)))
    return found


def _answer(what: str, point: Point | None) -> str:
    if point is None:
        return f"{what}: none of these."
    return f"{what}: {point.name}, {sizes.show(int(point.size))}, KL {point.loss:.6f}."


def drawn(found: Sweep) -> str:
    """pareto.svg."""
    points = [Point(line["name"], line["bytes"] / 2**20, line["kl_mean"]) for line in found.lines]
    name = found.model.rstrip("/").rpartition("/")[2]
    return chart.pareto(f"{name}: size against loss", points, "size of all tensors, MiB", "mean KL divergence, nats")
