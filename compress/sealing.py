"""What a finished run says of itself: report.json, the model card, and the manifest that covers all files."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from compress import kv_scales, stack
from compress.eval.card import CHART, Facts, card, layer_chart
from compress.eval.origin import front_matter
from compress.eval.report import Report
from compress.formats import manifest
from compress.formats.files import write_text
from compress.interchange import loader_note
from compress.job import Job
from compress.pipeline import ADDED, Fitted, Written, changes_stored
from compress.prepare import Prepared, summarize
from compress.stream import KEY as STREAM
from compress.target import STAGE as TARGET


def seal(
    job: Job,
    prepared: Prepared,
    recipe: dict[str, Any],
    written: Written,
    fitted: Mapping[str, Fitted],
    evaluation: dict[str, Any] | None,
    cost: tuple[float, int],  # seconds in all, peak bytes while compressing
) -> None:
    """Writes report.json, README.md and compress.json, in an order in which each covers what came before."""
    (scheme, options), target = prepared.described, job.recall(TARGET) or {"note": None, "report": None}
    report = Report(
        model=recipe["model"],
        scheme=scheme,
        options=options,
        **summarize(written.reports),
        seconds=cost[0],
        peak_rss_bytes=cost[1],
        tensors=written.reports,
        notes=[*prepared.notes(), *_stream_note(job), *filter(None, [target["note"]])],
        evaluation=evaluation,
        target=target["report"],
    )
    write_text(job.checkpoint / manifest.REPORT, manifest.seal(report.to_dict()))
    plan = prepared.plan
    loader = loader_note(prepared.schemes, plan.dense, bool(plan.kv_cache)) if plan.interchange else None
    origin = front_matter(recipe["model"], prepared.path, scheme)
    facts = Facts(recipe["command"], origin, recipe["versions"], recipe["calibration"], loader)
    if chart := layer_chart(report):
        write_text(job.checkpoint / CHART, chart)
    write_text(job.checkpoint / "README.md", card(report, facts))
    document = {
        "format": 1,
        "recipe": recipe,
        "gates": evaluation["gates"] if evaluation else [],
        "ledger": _ledger(prepared, written, fitted),
        **({"stack": errors} if (errors := stack.known_errors(fitted)) else {}),
        **({STREAM: stream} if "order" in (stream := job.recall(STREAM) or {}) else {}),
        "tensors": written.records,
        "files": manifest.describe_files(job.checkpoint, written.shards),
    }
    write_text(job.checkpoint / manifest.NAME, manifest.seal(document))


def _stream_note(job: Job) -> list[str]:
    known = job.recall(STREAM)
    if known is None:
        return []
    return [
        f"the residual stream stays in its order: {known['why']}" if "why" in known else "residual stream reordered"
    ]


def _ledger(prepared: Prepared, written: Written, fitted: Mapping[str, Fitted]) -> dict[str, dict[str, Any]]:
    """Every tensor of the source by name: what became of it, and the SHA-256 of what was read.

    `folded`: changed with the weights that read it (`change.py`). The changes of coded weights are in base64.
    `added`: the source does not have it; calibration measured it.
    """
    modules: dict[str, list[str]] = {}
    for module, packed in prepared.plan.modules.items():
        modules.setdefault(packed.source, []).append(module)
    ledger: dict[str, dict[str, Any]] = {}
    for name in prepared.source.specs:
        if name in prepared.tied:
            ledger[name] = {"action": "tied", "to": prepared.tied[name]}
            continue
        stored = prepared.source.backing[name]
        hashes = dict(zip(stored, written.source_sha256[name], strict=True))
        ledger[name] = {"action": "folded" if name in fitted else "copied", "read": hashes}
        if name in modules:
            ledger[name] |= {"action": "coded", "modules": modules[name], **_changes(modules[name], fitted)}
    for attention in prepared.plan.kv_cache:
        ledger |= {f"{attention}.{local}": {"action": ADDED} for local in kv_scales.SPECS}
    return ledger


def _changes(modules: list[str], fitted: Mapping[str, Fitted]) -> dict[str, Any]:
    stored = {module: changes_stored(*fitted[module].changes(module)) for module in modules if module in fitted}
    texts = {m: {n: b64encode(v.numpy().tobytes()).decode() for n, v in named.items()} for m, named in stored.items()}
    return {"changes": texts} if any(texts.values()) else {}
