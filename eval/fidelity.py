"""Fidelity to the original: perplexity, KL divergence and agreement, from the original's predictions kept on disk.

The two models are never needed at once: `record` writes what the original predicts, `compare` reads it back.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.eval import compact, predictions
from compress.eval.predictions import Pass, Predictions, Progress
from compress.kernels.cpu import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Fidelity:
    """Scores over every token after a window's first; KL(original || model) in nats, agreement in 0..1.

    Those that need a reference are None without one. stderr: windows taken as independent; None of a single one.
    top5_agreement: how many of the original's five likeliest tokens are among the five here.
    """

    tokens: int
    perplexity: float
    perplexity_stderr: float | None
    reference_perplexity: float | None
    reference_perplexity_stderr: float | None
    bits_per_byte: float
    reference_bits_per_byte: float | None
    kl_mean: float | None
    kl_stderr: float | None
    kl_median: float | None
    kl_p90: float | None
    kl_p99: float | None
    kl_max: float | None
    top1_agreement: float | None
    top5_agreement: float | None
    tokens_per_second: float


def record(
    model: "PreTrainedModel",
    windows: torch.Tensor,
    path: Path,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write what the model predicts for windows, (n, window) int64, to one file.

    batch_size: windows at a time, by default 2048 tokens.
    """
    predictions.write(passes(model, windows, batch_size), windows, path, progress)


def compare(
    model: "PreTrainedModel",
    windows: torch.Tensor,
    reference: Path | None,
    text_bytes: int,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Score the model on windows, (n, window) int64, against what `record` wrote for the same windows.

    The first forward pass, in which kernels are compiled, does not count for tokens_per_second unless it is the only
    one.
    """
    return compare_passes(passes(model, windows, batch_size), windows, reference, text_bytes, progress)


def compare_passes(
    run: Iterator[Pass],
    windows: torch.Tensor,
    reference: Path | None,
    text_bytes: int,
    progress: Progress | None = None,
) -> Fidelity:
    """`compare` for a model that has its own way of running."""
    kept: dict[str, list[torch.Tensor]] = {}
    seconds: list[tuple[float, int]] = []
    done = 0
    recorded = None if reference is None else Predictions(reference, windows)
    for end, logits, elapsed in run:
        seconds.append((elapsed, logits.shape[0] * logits.shape[1]))
        for row, window in zip(logits, windows[done:end], strict=True):
            theirs = recorded.read(done, logits.shape[-1]) if recorded else None
            for name, values in _scores(row[:-1], window[1:], theirs).items():
                kept.setdefault(name, []).append(values)
            done += 1
        if progress:
            progress("scoring", done, len(windows))
    return _summary({name: torch.stack(values).numpy() for name, values in kept.items()}, text_bytes, seconds)


def passes(model: "PreTrainedModel", windows: torch.Tensor, batch_size: int | None = None) -> Iterator[Pass]:
    """Run the model on windows. Raises ValueError where its logits are not finite."""
    batch_size = max(1, _BATCH_TOKENS // windows.shape[1]) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; pass 1 or more")
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(model.device)
        with torch.inference_mode(), decoded():  # the same scores on all machines, whatever is faster on them
            begin = _now(batch.device)
            # A model that keeps keys and values packed attends to what they stand for, also within one pass.
            logits = model(input_ids=batch, use_cache=hasattr(model, "kv_cache")).logits
            elapsed = _now(batch.device) - begin
        check_finite(logits, start, getattr(model, "name_or_path", "") or type(model).__name__)
        yield start + len(batch), logits, elapsed


def check_finite(logits: torch.Tensor, start: int, name: str) -> None:
    """Raises ValueError where logits hold NaN or infinity."""
    # NaN passes through both extremes; fifteen times faster than isfinite() on bfloat16.
    if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(logits)):
        window = start + int((~logits.isfinite().flatten(1).all(1)).nonzero()[0])
        raise ValueError(f"{name}: logits are not finite at window {window}; the weights or the run are broken")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _scores(logits: torch.Tensor, targets: torch.Tensor, reference: compact.Rows | None) -> dict[str, torch.Tensor]:
    """Values for each position of a window. logits: (T, vocabulary); targets: (T,) int64."""
    found = compact.score(logits, targets, reference)
    if reference is None or found.kl is None:
        return {"nll": found.nll}
    ours, theirs = found.top, reference.top
    shared = ((ours[:, :, None] == theirs[:, None, :]) & (theirs >= 0)[:, None, :]).any(1).sum(1)
    return {
        "nll": found.nll,
        "reference_nll": reference.nll,
        "kl": found.kl,
        "top1": (ours[:, 0] == theirs[:, 0]).double(),
        "top5": shared.double() / (theirs >= 0).sum(1),
    }


def _summary(scores: dict[str, np.ndarray], text_bytes: int, seconds: list[tuple[float, int]]) -> Fidelity:
    """scores: (windows, positions) by name."""
    nll, timed = scores["nll"], seconds[1:] or seconds
    found: dict[str, float | None] = dict.fromkeys(Fidelity.__dataclass_fields__)
    found["perplexity"], found["perplexity_stderr"] = _perplexity(nll)
    found["bits_per_byte"] = _bits(nll) / text_bytes
    if "kl" in scores:
        kl, theirs = scores["kl"], scores["reference_nll"]
        found["reference_perplexity"], found["reference_perplexity_stderr"] = _perplexity(theirs)
        found["reference_bits_per_byte"] = _bits(theirs) / text_bytes
        found |= {"kl_mean": float(kl.mean()), "kl_stderr": _stderr(kl), "kl_max": float(kl.max())}
        for name, share in (("kl_median", 0.5), ("kl_p90", 0.9), ("kl_p99", 0.99)):
            found[name] = float(np.quantile(kl, share))
        found |= {f"{name}_agreement": float(scores[name].mean()) for name in ("top1", "top5")}
    found["tokens_per_second"] = sum(count for _, count in timed) / sum(time for time, _ in timed)
    return Fidelity(**{**found, "tokens": nll.size})  # type: ignore[arg-type]


def _bits(nll: np.ndarray) -> float:
    return float(nll.sum()) / math.log(2)


def _stderr(values: np.ndarray) -> float | None:
    """Of the mean of (windows, positions): tokens of a window depend on each other, windows are taken not to."""
    means = values.mean(1)
    return None if len(means) < 2 else float(means.std(ddof=1) / math.sqrt(len(means)))


def _perplexity(nll: np.ndarray) -> tuple[float, float | None]:
    """exp of the mean, and by the delta method its standard error."""
    perplexity = math.exp(min(float(nll.mean()), math.log(np.finfo(np.float64).max)))
    stderr = _stderr(nll)
    return perplexity, None if stderr is None else perplexity * stderr
