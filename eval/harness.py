"""lm-eval tasks (EleutherAI's lm-evaluation-harness) on a model in memory, and our own offline task builtin_cloze."""

import difflib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.eval import cloze, paired
from compress.eval.predictions import Progress
from compress.eval.quiet import quiet
from compress.eval.text import Text, context_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from compress.eval.cache import Cache

Metrics = dict[str, dict[str, Any]]
CLOZE = "builtin_cloze"
_TASKS = Path(__file__).parent / "tasks"
_CLOZE_CONTEXT = 128
_BOOTSTRAP = 1000


def check(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Raise ValueError for a task that is unknown. Whether its data can be had shows when it runs."""
    with quiet():
        _manager(tasks, str(_TASKS), include_path)


@dataclass(frozen=True)
class Metric:
    """items: what each item contributes, where the value is their mean; else None. Errors are lm-eval's own."""

    value: float
    stderr: float | None
    higher_is_better: bool
    items: list[float] | None


Results = dict[str, dict[str, Metric]]


@dataclass(frozen=True)
class Asked:
    """What is run: tasks by name, and lm-eval's settings for them. limit: items of each task."""

    tasks: tuple[str, ...]
    include_path: str | Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None


def run(
    model: Callable[[], "PreTrainedModel | Path"],
    config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Asked,
    text: Text,
    *,
    device: str = "cpu",
    remembered: tuple["Cache", dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> tuple[Results, list[str]]:
    """Run each task by itself; return {task: {metric: Metric}}, and the tasks that need more of a model than there is.

    A task is ours (builtin_cloze, made from `text`), one of the YAML files under include_path, or one that lm-eval
    ships. A group adds its own scores and those of its members. Metrics of a named filter read "metric,filter".
    Log-likelihoods are taken in float32 whatever the model's dtype. A prompt that exceeds the context loses its
    beginning, as always in lm-eval; builtin_cloze is cut to fit. batch_size: by default as many sequences as fit a
    number of tokens and of bytes of logits. num_fewshot: as in lm-eval, it does not change a task that says 0.

    model: called when a response is needed that is not remembered. A path is run block by block on `device`; tasks that
    generate text are then left out. remembered: a cache of responses, and what tells this model and how it runs from
    others.
    """
    results: Results = {}
    left_out = []
    with tempfile.TemporaryDirectory(prefix="compress-tasks-") as folder, quiet(progress):
        from compress.eval.responses import Batched, Remembering, Streamed, WholeModelNeeded

        def made() -> Any:
            found = model()
            if isinstance(found, Path):
                return Streamed(found, tokenizer, asked.batch_size, device, progress)
            return Batched(found, tokenizer, asked.batch_size)

        if CLOZE in asked.tasks:
            _write_cloze(Path(folder), text, config, tokenizer)
        manager = _manager(asked.tasks, folder, asked.include_path)
        cache, key = remembered or (None, {})
        lm = Remembering(made, cache, key)
        for done, task in enumerate(asked.tasks):
            if progress:
                progress("tasks", done, len(asked.tasks))
            try:
                results |= _run_one(lm, task, manager, asked)
            except WholeModelNeeded:
                left_out.append(task)
        if progress:
            progress("tasks", len(asked.tasks), len(asked.tasks))
    return results, left_out


def beside(ours: Results, theirs: Results) -> dict[str, Metrics]:
    """The `tasks` object of report.json: our values beside the original's, and the differences item by item.

    The original's are None where there are none; the differences also where a value is no mean over items.
    """
    found: dict[str, Metrics] = {}
    for task, metrics in ours.items():
        found[task] = {}
        for name, metric in metrics.items():
            other = theirs.get(task, {}).get(name)
            line: dict[str, Any] = {"value": metric.value, "stderr": metric.stderr, "reference": None}
            line |= {"reference_stderr": None, "difference": None, "difference_stderr": None, "significant": None}
            line["higher_is_better"] = metric.higher_is_better
            if other is not None:
                line |= {"reference": other.value, "reference_stderr": other.stderr}
                if metric.items and other.items and len(metric.items) == len(other.items):
                    line |= paired.difference(metric.items, other.items)
            found[task][name] = line
    return found


def _run_one(lm: Any, task: str, manager: Any, asked: Asked) -> Results:
    import lm_eval  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

    settings = {"limit": asked.limit, "num_fewshot": asked.num_fewshot, "bootstrap_iters": _BOOTSTRAP}
    try:
        found = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, log_samples=True, **settings)
    except (OSError, ImportError, ValueError, AssertionError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0] or f"{type(error).__name__}, most often an item beyond the context"
        raise ValueError(f"task {task}: it or its data cannot be had or run here: {reason}") from error
    higher, samples = found.get("higher_is_better", {}), found.get("samples") or {}
    return {
        name: _metrics(values, higher.get(name) or {}, samples.get(name, ()))
        for name, values in found["results"].items()
    }


def _metrics(values: dict[str, Any], higher: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    """lm-eval's flat {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} by metric."""
    metrics = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        error = float(stderr) if isinstance(stderr, (int, float)) else None
        items = _items(samples, metric, filter_name, value)
        name = metric if filter_name == "none" else key
        metrics[name] = Metric(float(value), error, higher.get(metric) is not False, items)
    return metrics


def _items(samples: Sequence[dict[str, Any]], metric: str, filter_name: str, value: float) -> list[float] | None:
    """What each item contributes to a value that is the mean of them."""
    found = [sample[metric] for sample in samples if sample.get("filter") == filter_name and metric in sample]
    if not found or not all(isinstance(item, (int, float)) for item in found):
        return None
    items = [float(item) for item in found]
    return items if math.isclose(math.fsum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12) else None


def _manager(tasks: Sequence[str], ours: str, include_path: str | Path | None) -> Any:
    """A TaskManager that knows all the tasks. lm-eval's own tasks take seconds to list: only when one is asked for."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path {include_path}: no such folder; name the one that holds the task files")
    folders = [ours] if include_path is None else [ours, str(include_path)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(tasks) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=folders)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, sorted({*manager.all_tasks, CLOZE}), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"task {task}: unknown; {hint}")
    return manager


def _write_cloze(folder: Path, text: Text, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write builtin_cloze's items, its YAML and the dataset cache it will need to a folder that is thrown away."""
    context = min(context_length(config) or _CLOZE_CONTEXT, _CLOZE_CONTEXT)
    items = cloze.items(text.text, context, lambda item: len(tokenizer(item, verbose=False)["input_ids"]))
    data = folder / "builtin_cloze.jsonl"
    data.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")
    task = yaml.safe_load((_TASKS / "builtin_cloze.yaml").read_text(encoding="utf-8"))
    task["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    (folder / "builtin_cloze.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
