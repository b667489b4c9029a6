"""lm-eval tasks (EleutherAI's lm-evaluation-harness) on a model in memory, and our own offline task builtin_cloze."""

import copy
import difflib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.eval import cloze
from compress.eval.fidelity import Progress
from compress.eval.quiet import quiet, replaced
from compress.eval.text import LONGEST_WINDOW, Text, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Metrics = dict[str, dict[str, float | None]]
CLOZE = "builtin_cloze"
_TASKS = Path(__file__).parent / "tasks"
_CLOZE_CONTEXT = 128
_BOOTSTRAP = 1000
_BATCH = 8
_LOGITS_BYTES = 256 * 2**20


def check(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Raise ValueError for a task that is unknown. Whether its data can be had shows when it runs."""
    with quiet():
        _manager(tasks, str(_TASKS), include_path)


def run(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    text: Text,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Metrics]:
    """Run each task by itself and return {task: {metric: {"value", "stderr"}}}.

    A task is ours (builtin_cloze, made from `text`), one of the YAML files under include_path, or one that lm-eval
    ships. A group adds its own scores and those of its members. Metrics of a named filter read "metric,filter".
    stderr is None where lm-eval gives none. Log-likelihoods are taken in float32 whatever the model's dtype. A prompt
    that exceeds the context loses its beginning, as always in lm-eval; builtin_cloze is cut to fit.
    batch_size: by default up to 8 sequences, fewer where the logits of the longest would take over 256 MiB.
    """
    results: dict[str, Metrics] = {}
    with tempfile.TemporaryDirectory(prefix="compress-tasks-") as folder, quiet():
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

        if CLOZE in tasks:
            _write_cloze(Path(folder), text, model, tokenizer)
        manager = _manager(tasks, folder, include_path)
        with replaced(model, tie_weights=lambda *_, **__: None):
            # HFLM ties again at this point, which a model with a compressed head does not survive. And it may give
            # the tokenizer a padding token, hence the copy.
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size or _batch_size(model),
                max_length=context_length(model.config),
                softmax_dtype="float32",
            )
        for done, task in enumerate(tasks):
            if progress:
                progress(f"task {task}", done, len(tasks))
            results |= _run_one(lm, task, manager, limit)
    return results


def _run_one(lm: Any, task: str, manager: Any, limit: int | None) -> dict[str, Metrics]:
    import lm_eval  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

    try:
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
        )
    except (OSError, ImportError, ValueError, AssertionError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0] or f"{type(error).__name__}, most often an item beyond the context"
        raise ValueError(f"task {task}: it or its data cannot be had or run here: {reason}") from error
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> Metrics:
    """lm-eval's flat {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...} by metric."""
    metrics: Metrics = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else key
        metrics[name] = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, (int, float)) else None}
    return metrics


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


def _batch_size(model: "PreTrainedModel") -> int:
    config = model.config.get_text_config()
    longest = context_length(config) or LONGEST_WINDOW
    position_bytes: int = 4 * config.vocab_size
    return max(1, min(_BATCH, _LOGITS_BYTES // (position_bytes * longest)))


def _write_cloze(folder: Path, text: Text, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write builtin_cloze's items, its YAML and the dataset cache it will need to a folder that is thrown away."""
    context = min(context_length(model.config) or _CLOZE_CONTEXT, _CLOZE_CONTEXT)
    items = cloze.items(text.text, context, lambda item: len(tokenizer(item, verbose=False)["input_ids"]))
    data = folder / "builtin_cloze.jsonl"
    data.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")
    config = yaml.safe_load((_TASKS / "builtin_cloze.yaml").read_text(encoding="utf-8"))
    config["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    (folder / "builtin_cloze.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
