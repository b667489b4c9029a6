"""Samples: the tokens that calibration runs through a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from compress.eval import text as texts
from compress.kernels.cpu import decoded
from compress.structure import read_config

SELF = "self"  # text that the model itself writes


@dataclass(frozen=True)
class Samples:
    """tokens: (n, length) int64. name: of the source. sha256: of the tokens."""

    tokens: Tensor
    name: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What the manifest says of them."""
        count, length = self.tokens.shape
        return {"source": self.name, "samples": count, "seq_len": length, "sha256": self.sha256}


def draw(source: str, model: Path, count: int, length: int | None, seed: int) -> Samples:
    """`count` sequences of `length` tokens, by default the context length and at most 2048.

    source: a .txt or .jsonl file, a dataset id, `builtin` (other parts of it are scored on), or `self`: sampled from
    the model, which must then fit into memory. Of a text, windows that do not overlap are drawn with `seed`; fewer
    where it has no more. Each starts with the token that the tokenizer puts first. Raises ValueError where there are
    none.
    """
    config = read_config(model)
    context = texts.context_length(config)
    length = texts.default_window(config) if length is None else length
    if context is not None and length > context:
        raise ValueError(f"seq-len: {length} tokens exceed the context of {model}, {context}; pass --seq-len {context}")
    tokenizer = _tokenizer(model)
    if source == SELF:
        return Samples(_written(model, tokenizer, count, length, seed), SELF)
    text = _excerpt(texts.read([source], "calibration"), count, 8 * length)
    windows, _ = texts.windows(tokenizer, text, length)
    chosen = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]]
    first = _first(tokenizer)
    if first is not None:
        chosen[:, 0] = first
    return Samples(chosen, text.name)


def _excerpt(text: texts.Text, count: int, size: int) -> texts.Text:
    """Parts of `size` characters from all over a text that is far longer than what is drawn from it."""
    whole = text.text
    if len(whole) <= 2 * count * size:
        return text
    step = len(whole) // count
    parts = [whole[i * step : i * step + size] for i in range(count)]
    return texts.Text(text.name, "\n\n".join(parts), text.sha256)


def _written(model: Path, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """What the model writes when it is free: every token drawn from its own distribution."""
    from compress.hf import load

    first = _first(tokenizer)
    start = first if first is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(f"{model}: its tokenizer has no token to start a text with; name a text with --calibration")
    writer: Any = load(model)
    torch.manual_seed(seed)
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": start}
    ids = torch.full((count, 1), start)
    with torch.no_grad(), decoded():
        written = [
            writer.generate(part, min_new_tokens=length - 1, max_new_tokens=length - 1, **how) for part in ids.split(16)
        ]
    return torch.cat(written)


def _first(tokenizer: Any) -> int | None:
    """The token that begins every text of this tokenizer, if one does."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[0] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else None


def _tokenizer(model: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{model}: no tokenizer that loads, which calibration needs (--set method=rtn does without, but for a "
            f"--target-size): {reason}"
        ) from error
