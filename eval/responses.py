"""lm-eval's view of a model: HFLM, asked only for what is not known already."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

from compress.eval import running
from compress.eval.cache import Cache, digest
from compress.eval.predictions import Progress
from compress.eval.quiet import replaced
from compress.eval.text import LONGEST_WINDOW, context_length
from compress.kernels.cpu import decoded
from compress.structure import build, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEQUENCES = 64
_STREAMED = 2 << 30  # bytes of activations that lie on disk at once
# of one forward pass: (tokens, bytes of float32 logits)
_PASS = {"cpu": (2048, 256 * 2**20), "cuda": (16384, 2 * 2**30)}


class Batched(HFLM):  # type: ignore[misc]
    """HFLM whose automatic batches hold as many sequences as fit a number of tokens, without trying some out first."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None) -> None:
        tokens, logits_bytes = _PASS.get(model.device.type, _PASS["cpu"])
        self._tokens: int = min(tokens, logits_bytes // (4 * model.config.get_text_config().vocab_size))
        self._start, self._size = 0, 0
        with replaced(model, tie_weights=lambda *_, **__: None):
            # HFLM ties again at this point, which a model with a compressed head does not survive. And it may give
            # the tokenizer a padding token, hence the copy.
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size or "auto",
                max_length=context_length(model.config),
                softmax_dtype="float32",
            )

    def _model_call(self, *arguments: Any, **named: Any) -> Any:
        with decoded():  # log-likelihoods that do not depend on what is faster on this machine
            return super()._model_call(*arguments, **named)

    def _fitting(self, length: int) -> int:
        return max(1, min(_SEQUENCES, self._tokens // max(1, length)))

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        """The size of the batch that request `pos` is in; the first of a batch is its longest."""
        if pos == 0 or pos == self._start + self._size:
            _, context, continuation = n_reordered_requests[pos]
            self._start, self._size = pos, self._fitting(min(len(context) + len(continuation), self.max_length))
        return self._size

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        length: int = self.max_length or LONGEST_WINDOW
        return self._fitting(length)


class WholeModelNeeded(Exception):
    """Text is generated token by token, for each of which all blocks would be read."""


class Streamed(Batched):
    """Batched, of a model whose blocks are in memory one at a time: what it is asked is noted first, and then run."""

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None,
        device: str,
        progress: Progress | None,
    ) -> None:
        super().__init__(build(read_config(path)), tokenizer, batch_size)  # without weights
        self._device = torch.device(device)
        self._path, self._progress = path, progress
        self._inputs: list[torch.Tensor] = []
        self._logits: Iterator[torch.Tensor] | None = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self._twice(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self._twice(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise WholeModelNeeded

    def _twice(self, ask: Callable[[list[Any]], Any], requests: list[Any]) -> Any:
        self._inputs = []
        ask(requests)
        self._logits = self._run()
        try:
            return ask(requests)
        finally:
            self._logits = None

    def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self._logits is not None:
            return next(self._logits)
        self._inputs.append(inps)
        return torch.zeros(1, device=inps.device).expand(*inps.shape, self.model.config.get_text_config().vocab_size)

    def _run(self) -> Iterator[torch.Tensor]:
        """The logits of what was asked, a pass through the model for as many tokens as the disk shall hold."""
        width = self.model.config.get_text_config().hidden_size
        ends = itertools.accumulate(inps.numel() * width * 4 for inps in self._inputs)
        for _, group in itertools.groupby(zip(ends, self._inputs, strict=True), lambda item: item[0] // _STREAMED):
            with tempfile.TemporaryDirectory(prefix="compress-activations-") as folder:
                inputs = [inps for _, inps in group]
                yield from running.outputs(self._path, inputs, Path(folder), str(self._device), self._progress)


class Remembering(LM):  # type: ignore[misc]
    """Answers from the cache what was asked of the same model before, all requests of a kind or none of them."""

    def __init__(self, make: Callable[[], LM], cache: Cache | None, key: dict[str, Any]) -> None:
        super().__init__()
        self._make, self._cache, self._key = make, cache, key
        self._made: LM | None = None

    def loglikelihood(self, requests: list[Any]) -> Any:
        return [tuple(answer) for answer in self._answers("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> Any:
        return self._answers("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> Any:
        return self._answers("generate_until", requests)

    def _answers(self, kind: str, requests: list[Any]) -> list[Any]:
        arguments = [request.args for request in requests]
        sampled = kind == "generate_until" and any(how.get("do_sample") for _, how in arguments)
        if self._cache is None or sampled:
            return self._ask(kind, requests)
        path = self._cache.path("tasks.json", {**self._key, "kind": kind, "requests": digest(arguments)})
        known = self._cache.recall(path)
        if isinstance(known, list) and len(known) == len(requests):
            return known
        answers = self._ask(kind, requests)
        self._cache.keep(path, answers)
        return answers

    def _ask(self, kind: str, requests: list[Any]) -> list[Any]:
        if self._made is None:
            self._made = self._make()
        answers: list[Any] = getattr(self._made, kind)(requests)
        return answers
