"""Score a model on text and tasks, against the original when there is one. The two are never in memory together."""

import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compress import kv_cache as packed_cache
from compress.devices import check_device
from compress.eval import cache, fidelity, harness, predictions, running
from compress.eval import layers as sensitivity
from compress.eval import text as texts
from compress.eval.cache import Cache
from compress.eval.capacity import information_capacity, operations_per_token
from compress.eval.fidelity import Fidelity
from compress.eval.harness import Asked, Metrics, Results
from compress.eval.predictions import Progress
from compress.eval.running import Dtype, Running
from compress.structure import read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Sixteen windows of 2048: seconds for a small model, and minutes, not hours, for 8 billion parameters on a CPU.
_DEFAULT_TOKENS = 32768
_GENERATED = 32  # tokens


@dataclass(frozen=True)
class Evaluation:
    """The scores, the text they were taken on and how it was cut, how the models ran, and what a reader should know."""

    fidelity: Fidelity
    tasks: dict[str, Metrics]
    text_name: str
    text_sha256: str
    window: int
    windows: int
    dtype: str
    notes: list[str]
    asked: dict[str, Any]  # what is measured on request: layers, information_capacity, generation, kv_cache

    def to_dict(self) -> dict[str, Any]:
        """The `evaluation` object of report.json."""
        scores = dataclasses.asdict(self.fidelity)
        speed = scores.pop("tokens_per_second")
        text = {"name": self.text_name, "sha256": self.text_sha256, "window": self.window, "windows": self.windows}
        rest = {"text": text, "dtype": self.dtype, "notes": self.notes}
        return scores | {"tasks": self.tasks, "tokens_per_second": speed} | rest | self.asked


@dataclass(frozen=True)
class _Job:
    """What to score on, and how; the same for the original and the compressed model."""

    tokenizer: "PreTrainedTokenizerBase"
    config: "PretrainedConfig"
    text: texts.Text
    windows: torch.Tensor  # (n, window) int64
    text_bytes: int  # UTF-8 bytes of the scored tokens
    asked: Asked
    device: str
    progress: Progress | None

    def run_tasks(
        self,
        model: Callable[[], Any],
        remembered: tuple[Cache, dict[str, Any]] | None = None,
    ) -> tuple[Results, list[str]]:
        if not self.asked.tasks:
            return {}, []
        return harness.run(
            model,
            self.config,
            self.tokenizer,
            self.asked,
            self.text,
            device=self.device,
            remembered=remembered,
            progress=self.progress,
        )


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    tasks: Sequence[str] = (harness.CLOZE,),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    text: Sequence[str] = ("builtin",),
    window: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
    original_memory: int | str | None = None,
    use_cache: bool = True,
    max_memory: int | str | None = None,
    kv_cache: str | None = None,
    kv_bits: int | None = None,
    layers: bool = False,
    capacity: bool = False,
    speed: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity, bits per byte and lm-eval tasks of a model; with a reference, also KL divergence and agreement.

    window: tokens, by default the context length, at most 2048. limit: at most so many windows, and so many items of
    each task; by default windows of 32768 tokens in all, and every item. batch_size: windows, and sequences of a task,
    at a time; by default as many as fit. dtype: `stored`, `float32`, or `auto`, float32 where a CPU multiplies it
    faster. original_memory: bytes of weights beyond which the reference is run block by block, by default four fifths
    of the device's memory. use_cache: keep what the reference gave, for the next time (`cache.py` says where).
    max_memory: of a `bitstack` model, as `compress.load` takes it. kv_cache: `bfp` or `kivi`, to score the model with
    keys and values packed to `kv_bits`; all of them, without recent ones in full precision, because every query of a
    forward pass reads the same. The reference has its own.
    On request: layers: the divergence that each compressed layer causes alone, a pass for each (`layers.py`); capacity:
    information capacity (`capacity.py`); speed: tokens a second that one sequence is continued by.
    """
    if layers:
        if reference is None:
            raise ValueError("layers: they are compared with those of the original; name it (--reference)")
        sensitivity.check(Path(model))
    asked = Asked(tuple(tasks), include_path, num_fewshot, limit, batch_size)
    job = _prepare(model, asked, text, window, device, progress)
    if dtype == "auto" and kv_cache is not None:
        dtype = "stored"  # that of the cache whose bytes are told
    how = running.choose(Path(model if reference is None else reference), job.device, dtype, original_memory)
    loading: dict[str, Any] = {} if max_memory is None else {"max_memory": max_memory}
    if kv_cache is not None or kv_bits is not None:
        loading |= {"kv_cache": kv_cache, "kv_bits": kv_bits, "kv_window": 0}
    if reference is None and how.streamed and (loading or speed or running.is_compressed(Path(model))):
        how = replace(how, streamed=False)  # blocks in memory one at a time would run otherwise than it is stored
    if layers and how.streamed:
        raise ValueError("layers: the original must fit into memory, where they are exchanged one by one")
    notes: list[str] = []
    with cache.opened(use_cache) as kept:
        predicted, before, found = None, Results(), dict[str, Any]()
        if reference is not None:
            predicted, before = _score_original(Path(reference), job, how, kept, notes)
            gc.collect()
        if how.streamed and reference is None:
            scores, after = _score_streamed(Path(model), job, how, notes)
        else:
            scores, after, found = _score(Path(model), job, how, predicted, loading, speed)
        gc.collect()
        if layers and reference is not None:
            found["layers"] = _layers(Path(model), running.loaded(reference, how), job)
    if capacity:
        found["information_capacity"] = _capacity(scores, job)
    count, length = job.windows.shape
    tasks_beside = harness.beside(after, before)
    return Evaluation(scores, tasks_beside, job.text.name, job.text.sha256, length, count, how.dtype, notes, found)


def check(model: str | Path, **how: Any) -> None:
    """Raise the ValueError that `evaluate` would, as far as it shows before a model is loaded. how: its keywords."""
    names = ("tasks", "include_path", "num_fewshot", "limit", "batch_size")
    asked = Asked(**{name: how[name] for name in names})
    job = _prepare(model, asked, how["text"], how["window"], how["device"], None)
    running.choose(Path(model), job.device, how["dtype"], how["original_memory"])


def _prepare(
    model: str | Path,
    asked: Asked,
    text: Sequence[str],
    window: int | None,
    device: str | None,
    progress: Progress | None,
) -> _Job:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    config = _config(model)
    context = texts.context_length(config)
    window = texts.default_window(config) if window is None else window
    if context is not None and window > context:
        raise ValueError(f"window: {window} tokens exceed the context of {model}, {context}; pass --window {context}")
    if asked.tasks:
        harness.check(asked.tasks, asked.include_path)
    tokenizer, source = _tokenizer(model), texts.read(text)
    most = max(1, _DEFAULT_TOKENS // max(window, 1)) if asked.limit is None else asked.limit
    windows, text_bytes = texts.windows(tokenizer, source, window, most)
    return _Job(tokenizer, config, source, windows, text_bytes, asked, device, progress)


def _score_original(reference: Path, job: _Job, how: Running, kept: Cache, notes: list[str]) -> tuple[Path, Results]:
    """Where the original's predictions lie, and its task scores; both from the cache as far as they are there."""
    _config(reference)
    if _tokenizer(reference).get_vocab() != job.tokenizer.get_vocab():
        raise ValueError(
            f"{reference}: its tokenizer is not that of the model; only the model's original can be compared"
        )
    key = {"model": cache.fingerprint(reference, kept, job.progress), **dataclasses.asdict(how)}
    key |= {"batch_size": job.asked.batch_size, "threads": torch.get_num_threads()}
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            loaded.append(running.loaded(reference, how))
        return loaded[0]

    path = kept.path("original.zip", {**key, "windows": predictions.windows_sha256(job.windows)})
    if predictions.is_whole(path):
        cache.touch(path)
    else:
        with kept.replacing(path) as unfinished, ExitStack() as stack:
            if how.streamed:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-activations-")))
                run = running.streamed(reference, job.windows, folder, how.device, job.progress)
            else:
                run = fidelity.passes(model(), job.windows, job.asked.batch_size)
            predictions.write(run, job.windows, unfinished, job.progress)
    if not how.streamed:
        return path, job.run_tasks(model, (kept, key))[0]
    return path, _streamed_tasks(reference, "original", job, notes, (kept, key))


def _score(
    path: Path, job: _Job, how: Running, predicted: Path | None, loading: dict[str, Any], speed: bool
) -> tuple[Fidelity, Results, dict[str, Any]]:
    model = running.loaded(path, how, **loading)
    run = fidelity.passes(model, job.windows, job.asked.batch_size)
    scores = fidelity.compare_passes(run, job.windows, predicted, job.text_bytes, job.progress)
    tasks, _ = job.run_tasks(lambda: model)
    found: dict[str, Any] = {"generation_tokens_per_second": _generation_speed(model, job)} if speed else {}
    if "kv_cache" in loading:
        found["kv_cache"] = packed_cache.describe(model, job.windows[:1])
    return scores, tasks, found


def _score_streamed(path: Path, job: _Job, how: Running, notes: list[str]) -> tuple[Fidelity, Results]:
    with tempfile.TemporaryDirectory(prefix="compress-activations-") as folder:
        run = running.streamed(path, job.windows, Path(folder), how.device, job.progress)
        scores = fidelity.compare_passes(run, job.windows, None, job.text_bytes, job.progress)
    return scores, _streamed_tasks(path, "model", job, notes)


def _streamed_tasks(
    path: Path, what: str, job: _Job, notes: list[str], remembered: tuple[Cache, dict[str, Any]] | None = None
) -> Results:
    results, left_out = job.run_tasks(lambda: path, remembered)
    rest = f", and not on tasks that generate text: {', '.join(left_out)}" if left_out else ""
    notes.append(f"the {what} is too large for the memory: it was run block by block{rest}")
    return results


def _generation_speed(model: Any, job: _Job) -> float:
    """Tokens a second, greedily, one sequence; the first ones, in which kernels are compiled, do not count."""
    prompt = job.windows[:1, : max(1, job.windows.shape[1] // 2)].to(model.device)
    count = max(1, min(_GENERATED, job.windows.shape[1] - prompt.shape[1]))
    how = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **how).cpu()
        seconds.append(time.perf_counter() - begin)
    return count / seconds[1]


def _layers(out: Path, original: Any, job: _Job) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="compress-layers-") as folder:
        return sensitivity.sensitivity(out, original, job.windows, Path(folder), job.progress)


def _capacity(scores: Fidelity, job: _Job) -> dict[str, float | None]:
    operations = operations_per_token(job.config, job.windows.shape[1])
    ours, theirs = (
        None if bits is None else information_capacity(bits, job.text_bytes, scores.tokens, operations)
        for bits in (scores.bits_per_byte, scores.reference_bits_per_byte)
    )
    return {"value": ours, "reference": theirs, "operations_per_token": operations}


def _config(path: str | Path) -> "PretrainedConfig":
    """The config of a causal language model."""
    config = read_config(path)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    causal = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _several(names)}
    architectures = config.architectures or list(_several(known))
    if config.is_encoder_decoder or not causal & set(architectures):
        named = ", ".join(architectures) or config.model_type
        raise ValueError(f"{path}: {named} is not a causal language model; only those can be scored")
    return config


def _several(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: no tokenizer that loads, which scoring needs (--no-eval does without): {reason}"
        ) from error
