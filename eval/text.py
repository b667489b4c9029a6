"""Texts and their token windows: builtin text, .txt and .jsonl files, dataset ids. No cleaning, no chat template."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Split = Literal["evaluation", "calibration"]
LONGEST_WINDOW = 2048
# Of the builtin text's topics in sorted order, every fourth is for evaluation.
_EVALUATION_STRIDE = 4
# Tokens next to a cut in the text could differ from those of the whole text; this many are thrown away there.
_CUT_MARGIN = 64


@dataclass(frozen=True)
class Text:
    """What was read: the sources by name, the text, and the SHA-256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str


def read(sources: Sequence[str], split: Split = "evaluation") -> Text:
    """Read and join the sources, one empty line between them.

    A source is `builtin` (Python's documentation topics, pydoc_data, divided between the splits by topic), the path
    of a .txt or .jsonl file ({"text": ...} on each line), or a dataset id: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.
    Files are read whole whatever the split; of a dataset it is `test` for evaluation and `train` for calibration
    unless named.
    """
    if not all(sources) or not sources:
        raise ValueError("text: no source; name a .txt or .jsonl file, a dataset id or builtin")
    text = "\n\n".join(_read_one(source, split) for source in sources)
    name = "+".join(Path(source).name if _is_file(source) else source for source in sources)
    return Text(name, text, hashlib.sha256(text.encode()).hexdigest())


def default_window(config: "PretrainedConfig") -> int:
    """The model's context length, at most 2048."""
    return min(context_length(config) or LONGEST_WINDOW, LONGEST_WINDOW)


def context_length(config: "PretrainedConfig") -> int | None:
    """The positions a model can attend to, or None where its config does not say."""
    inner = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if isinstance(length := getattr(inner, key, None), int) and length > 0:
            return length
    return None


def windows(
    tokenizer: "PreTrainedTokenizerBase", text: Text, window: int, limit: int | None = None
) -> tuple[torch.Tensor, int]:
    """Non-overlapping windows of tokens, and the UTF-8 bytes of text that their scored tokens cover.

    Returns (n, window) int64 and a count of bytes. No BOS or other special token is inserted. The tail that fills no
    window is dropped; a text shorter than one window makes one shorter window. At most `limit` windows.

    Every token but a window's first is scored. Its bytes are those after the end of the token before it, up to its own
    end, as the tokenizer's offsets into the text give them; a character made of several byte tokens belongs to the
    first. Tokenizers without offsets (not backed by `tokenizers`): the bytes of the decoded window less those of its
    first token decoded.
    """
    if window < 2:
        raise ValueError(f"window: {window} is too small; a window needs 2 tokens or more, the first is not scored")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} windows; pass 1 or more")
    tokens, ends = _tokens(tokenizer, text.text, None if limit is None else limit * window)
    if len(tokens) < 2:
        raise ValueError(f"text {text.name}: {len(tokens)} tokens; 2 or more are needed to score anything")
    window = min(window, len(tokens))
    count = min(len(tokens) // window, limit or len(tokens))
    batch = torch.tensor(tokens[: count * window], dtype=torch.int64).view(count, window)
    rows = (ends[i * window : (i + 1) * window] for i in range(count))
    return batch, sum(_covered(tokenizer, text.text, row, row_ends) for row, row_ends in zip(batch, rows, strict=True))


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str, needed: int | None) -> tuple[list[int], list[int]]:
    """Token ids, and the character at which each ends (empty without offsets); enough of the text for `needed`."""
    length = len(text) if needed is None else 8 * (needed + _CUT_MARGIN)
    while True:
        # verbose=False: a text longer than the context is what we want, not something to warn about.
        encoded = tokenizer(
            text[:length], add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        if length >= len(text) or needed is None or len(ids) >= needed + _CUT_MARGIN:
            return ids, [end for _, end in encoded.get("offset_mapping", [])]
        length *= 2


def _covered(tokenizer: "PreTrainedTokenizerBase", text: str, row: torch.Tensor, ends: list[int]) -> int:
    """Bytes of text under a window's scored tokens. row: (window,) int64; ends: the characters its tokens end at."""
    if ends:
        return len(text[ends[0] : ends[-1]].encode())
    decoded = [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (row, row[:1])]
    return len(str(decoded[0]).encode()) - len(str(decoded[1]).encode())


def _is_file(source: str) -> bool:
    return source.endswith((".txt", ".jsonl")) or Path(source).exists()


def _read_one(source: str, split: Split) -> str:
    if source == "builtin":
        text = _builtin(split)
    elif _is_file(source):
        text = _read_file(Path(source))
    else:
        text = _read_dataset(source, "test" if split == "evaluation" else "train")
    if not text.strip():
        raise ValueError(f"text {source}: it is empty; name a source with text in it")
    return text


def _builtin(split: Split) -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("text builtin: this Python was installed without pydoc_data; name a .txt file") from error
    names = sorted(topics)
    evaluation = names[::_EVALUATION_STRIDE]
    # Topics quote each other at length. A paragraph is kept where it comes first, and evaluation comes first, so that
    # nothing is scored that a model was calibrated on.
    seen: set[str] = set()
    kept = {name: _unseen(topics[name], seen) for name in [*evaluation, *(n for n in names if n not in evaluation)]}
    return "\n\n".join(kept[name] for name in names if (name in evaluation) == (split == "evaluation") and kept[name])


def _unseen(text: str, seen: set[str]) -> str:
    """The paragraphs of text that are not in `seen`, to which they are added."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.strip() not in seen:
            seen.add(paragraph.strip())
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _read_file(path: Path) -> str:
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"text {path}: neither a .txt nor a .jsonl file; convert or rename it")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"text {path}: cannot be read ({error.strerror}); check the path") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"text {path}, line {line}: not UTF-8; convert the file to UTF-8") from error
    return text if path.suffix == ".txt" else "\n\n".join(_documents(path, text))


def _documents(path: Path, text: str) -> list[str]:
    documents = []
    # Not splitlines(): it would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'text {path}, line {number}: not JSON; each line must be {{"text": ...}}') from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'text {path}, line {number}: no "text" string; each line must be {{"text": ...}}')
        documents.append(record["text"])
    return documents


def _read_dataset(source: str, default_split: str) -> str:
    name, *options = source.split(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or len(options) > 2:
        raise ValueError(f"text {source}: no such file, and not a dataset id (NAME, NAME:SPLIT, NAME:CONFIG:SPLIT)")
    import datasets  # type: ignore[import-untyped]

    config = options[0] if len(options) == 2 else None
    split = options[-1] if options else default_split
    try:
        rows: Any = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"text {source}: no such file, and the dataset cannot be had: {reason}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"text {source}: the dataset has no column `text`, only {', '.join(rows.column_names)}")
    return "\n\n".join(rows["text"])
