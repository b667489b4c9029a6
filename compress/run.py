"""`quantize`: prepare, write, score, seal, and give the directory its name."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numba
import safetensors
import torch
import transformers
from torch import Tensor

from compress import __version__, sizes, stack
from compress.calibrate import Calibrated, Calibration, calibrate, where
from compress.devices import check_device
from compress.eval import text as texts
from compress.eval.evaluate import check, evaluate
from compress.eval.gates import Gates
from compress.eval.report import Report
from compress.eval.running import Dtype
from compress.fisher import STAGE as DIFFERENTIATING
from compress.formats import manifest
from compress.job import Job, check_apart, partial_of
from compress.layout import SHARD_BYTES
from compress.pipeline import Written, write
from compress.prepare import Prepared
from compress.progress import Progress
from compress.samples import Samples, draw
from compress.sealing import seal
from compress.statistics import FISHER, HESSIAN, SAMPLE, Statistics, check_place, measure
from compress.stream import KEY as STREAM
from compress.stream import Reordered, Stream, choose, sides
from compress.target import STAGE as TARGET
from compress.target import Target

STATISTICS = "statistics"  # what the journal and the recipe say of the file


@dataclass(frozen=True)
class Scoring:
    """How a result is scored: the arguments of `evaluate`."""

    tasks: tuple[str, ...] = ("builtin_cloze",)
    include_path: str | None = None
    num_fewshot: int | None = None
    text: tuple[str, ...] = ("builtin",)
    window: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: Dtype = "auto"
    original_memory: int | str | None = None
    use_cache: bool = True


@dataclass(frozen=True)
class Options:
    """How a run goes about it, whatever the scheme."""

    scoring: Scoring | None = Scoring()  # None: unscored
    calibration: Calibration | str | None = None  # text is its source; None: the default, where the scheme needs any
    device: str | None = None  # where it runs; None: cuda where there is one, else cpu
    seed: int = 0
    overwrite: bool = False
    shard_size: int | str = SHARD_BYTES
    command: str = ""  # what the model card calls the run
    gates: Gates = Gates()
    stats: Path | str | None = None  # file of statistics: used where it exists, else measured and written
    stats_parts: tuple[str, ...] = ()  # what it must hold when it is written, beside what the plan wants


def run(prepared: Prepared, model: str, out: Path, options: Options, progress: Progress | None = None) -> Report:
    """Carries a plan out, or goes on with it after an interruption. Returns what report.json says."""
    check_apart(out, prepared.path)
    options.gates.check(options.scoring is not None, bool(options.scoring and options.scoring.tasks))
    if options.scoring:
        check(prepared.path, **asdict(options.scoring))  # now, not after hours of compressing
    check_device(options.device)
    target = None if prepared.target_bytes is None else Target(prepared)
    saved = _saved(prepared, options, out)
    samples = _samples(prepared, options, saved)
    if saved:
        saved.check(prepared.source, samples, wanted_parts(prepared))
    calibration = saved.calibration if saved else samples.to_dict() if samples else None
    recipe = _recipe(prepared, model, options, calibration)
    # Scoring and the card's wording may change between an interruption and the next try; the weights stay good.
    decisive = {key: value for key, value in recipe.items() if key not in ("scoring", "command", "model")}
    decisive |= {"source": prepared.source.identity(), "device": options.device if recipe["calibration"] else None}
    decisive["statistics"] = options.stats is not None
    decisive["plans"] = [plan.to_config() for plan in prepared.plans]
    with Job(out, decisive, options.overwrite) as job:
        if not job.finished:
            prepared, written, calibrated = _write(job, prepared, options, saved or samples, target, progress)
            recipe |= _planned(prepared)
            peak = peak_rss_bytes()  # of the compression: scoring holds a whole model
            scored = _score(job, prepared, options, progress)
            seconds = calibrated.seconds + written.seconds + (scored["seconds"] if scored else 0.0)
            scores = scored["scores"] | {"gates": options.gates.judge(scored["scores"])} if scored else None
            recipe["statistics"] = job.recall(STATISTICS)
            seal(job, prepared, recipe, written, calibrated.fitted, scores, (seconds, peak))
        job.finish()
    return read_report(out)


def read_report(out: Path) -> Report:
    """report.json of an output directory, as an object."""
    document = manifest.unseal(out / manifest.REPORT)
    return Report(**{field.name: document[field.name] for field in fields(Report) if field.name in document})


def _saved(prepared: Prepared, options: Options, out: Path) -> Statistics | None:
    """The file of statistics, where there is one already."""
    if options.stats is None:
        return None
    path = Path(options.stats)
    check_place(path, out, partial_of(out), prepared.path)
    if not prepared.needs_calibration:
        raise ValueError(f"scheme {prepared.scheme.name} uses no calibration data as it is; leave out --stats")
    if any(packed.scheme.refines for plan in prepared.plans for packed in plan.modules.values()):
        raise ValueError("refine: runs the blocks that are compressed, and --stats is there to run none; leave one out")
    return Statistics(path) if os.path.lexists(path) else None


def wanted_parts(prepared: Prepared) -> dict[str, list[str]]:
    """What schemes want measured beside means and maxima: which part -> the modules that want it."""
    schemes = [(module, packed.scheme) for plan in prepared.plans for module, packed in plan.modules.items()]
    linears = prepared.structure.linears
    return {
        HESSIAN: [module for module, scheme in schemes if scheme.needs_hessian],
        SAMPLE: [m for m, scheme in schemes if scheme.needs_sample and linears[m].expert is None],
        FISHER: prepared.weighted,
    }


def _samples(prepared: Prepared, options: Options, saved: Statistics | None) -> Samples | None:
    """The calibration text, where the plan needs one. Of saved statistics only one that is named, to compare it."""
    named = options.calibration
    how = Calibration(named) if isinstance(named, str) else named or Calibration()
    if saved and named is None:
        return None
    if prepared.needs_calibration:
        return draw(how.source, prepared.path, how.samples, how.seq_len, options.seed)
    if options.calibration is not None:
        texts.read([how.source], "calibration")  # a file that cannot be read is the more useful thing to hear of
        raise ValueError(f"scheme {prepared.scheme.name} uses no calibration data as it is; leave out --calibration")
    return None


def _recipe(prepared: Prepared, model: str, options: Options, calibration: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    candidates = [candidate.to_dict() for candidate in prepared.candidates]
    return {
        "model": model,
        "command": options.command,
        **_planned(prepared),
        **({"target": {"bytes": prepared.target_bytes, "candidates": candidates}} if prepared.target_bytes else {}),
        "seed": options.seed,
        "calibration": calibration,
        "shard_bytes": sizes.parse(options.shard_size),
        "scoring": asdict(options.scoring) if options.scoring else None,
        "versions": versions(),
    }


def _planned(prepared: Prepared) -> dict[str, Any]:
    return {"plan": prepared.plan.to_config(), "schemes": [scheme.to_dict() for scheme in prepared.schemes]}


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    return {
        "compress": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numba": numba.__version__,
    }


def _write(
    job: Job,
    prepared: Prepared,
    options: Options,
    text: Samples | Statistics | None,
    target: Target | None,
    progress: Progress | None,
) -> tuple[Prepared, Written, Calibrated]:
    """Returns what was carried out, too: of a target, what was chosen for it."""
    total = sum(spec.bytes for name, spec in prepared.source.specs.items() if name not in prepared.tied)
    done = 0

    def advance(size: int, _: str) -> None:
        nonlocal done
        done += size
        if progress:
            progress("compressing", done, total)

    try:
        calibrated = Calibrated({}, 0.0)
        if options.stats and text:
            text = _measured(job, prepared, options, text, progress)
        if target and text:
            prepared = target.choose(job, text, where(options.device), progress)
        source, plan = prepared.source, prepared.plan
        if text and plan.needs_calibration:
            known = text.tokens if isinstance(text, Samples) else text
            stream = _stream(job, prepared, known, where(options.device))
            if stream:
                source = Reordered(source, stream.axes, stream.order)
                if isinstance(known, Statistics):
                    known = known.reordered(stream.order, sides(prepared.structure, prepared.source))
            calibrated = calibrate(job, source, plan, prepared.structure, known, options.device, progress)
            if stream:
                noted = {m: replace(made, note=stream.note(m, made.note)) for m, made in calibrated.fitted.items()}
                calibrated = replace(calibrated, fitted=noted)
        fitted = calibrated.fitted | stack.fit_rest(job, source, plan, calibrated.fitted)
        before = [job.recall(step) or {"seconds": 0.0} for step in (f"{STREAM}-choice", DIFFERENTIATING, TARGET)]
        calibrated = Calibrated(fitted, calibrated.seconds + sum(noted["seconds"] for noted in before))
        shard_bytes, order = sizes.parse(options.shard_size), stack.order(source, plan, fitted)
        written = write(job, source, plan, prepared.tied, shard_bytes, advance, fitted, order)
        return prepared, written, calibrated
    except ValueError:
        job.discard()  # the input is at fault: nothing of this run can be used again
        raise


def _stream(job: Job, prepared: Prepared, text: Tensor | Statistics, device: str) -> Stream | None:
    """The order of the residual stream's channels, where a scheme asks for one and it helps."""
    if not any("order" in packed.scheme.folds for packed in prepared.plan.modules.values()):
        return None
    known = job.recall(STREAM)
    if known is None:
        folder, started = job.scratch / STREAM, time.monotonic()
        chosen = choose(prepared.source, prepared.plan, prepared.structure, text, folder, device)
        shutil.rmtree(folder, ignore_errors=True)
        job.note(f"{STREAM}-choice", {"seconds": time.monotonic() - started})
        known = {"why": chosen} if isinstance(chosen, str) else chosen.to_dict()
        job.note(STREAM, known)
    return Stream.from_dict(known) if "order" in known else None


def _measured(
    job: Job, prepared: Prepared, options: Options, text: Samples | Statistics, progress: Progress | None
) -> Statistics:
    """The file of statistics, written where there was none; the run that an interruption ended had the same one."""
    assert options.stats is not None
    path = Path(options.stats)
    if isinstance(text, Samples):
        wanted = {part for part, modules in wanted_parts(prepared).items() if modules or part in options.stats_parts}
        measure(job, prepared.source, prepared.structure, text, wanted, path, where(options.device), progress)
    used, known = {"sha256": manifest.file_sha256(path)}, job.recall(STATISTICS)
    if known not in (None, used):
        raise ValueError(f"stats {path}: not the file that the interrupted run used; run this again to start afresh")
    job.note(STATISTICS, used)
    return Statistics(path)


def _score(job: Job, prepared: Prepared, options: Options, progress: Progress | None) -> dict[str, Any] | None:
    """The scores and the seconds they took, in this run or in the one that was interrupted."""
    if options.scoring is None:
        return None
    how = asdict(options.scoring)
    known = job.recall("evaluation")
    if known is None or known["how"] != json.loads(json.dumps(how)):
        started = time.monotonic()
        try:
            scores = evaluate(job.checkpoint, prepared.path, **how, progress=progress).to_dict()
        except ValueError as error:
            kept = f"the weights are kept in {job.partial}: run the same command to score them, or add --no-eval"
            raise ValueError(f"{error}; {kept}") from error
        known = {"how": how, "scores": scores, "seconds": time.monotonic() - started}
        job.note("evaluation", known)
    return known


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
