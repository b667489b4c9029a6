"""Texts and windows: what is read, what is refused, and the bytes that the scored tokens cover."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from compress.eval import text as texts
from compress.eval.text import Text


@pytest.fixture(scope="module")
def tokenizer(llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama_dir)


def sentencepiece() -> PreTrainedTokenizerFast:
    """A character-level tokenizer in Llama's manner: spaces as U+2581, one in front of the text, byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    vocabulary |= {letter: 257 + i for i, letter in enumerate("\u2581abcdefghij")}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


def as_text(text: str) -> Text:
    return Text("test", text, "")


def test_the_builtin_splits_share_no_paragraph_and_are_the_same_every_time() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    evaluation, calibration = texts.read(["builtin"]), texts.read(["builtin"], "calibration")
    assert texts.read(["builtin"]) == evaluation
    assert len(evaluation.text) > 40_000 and len(calibration.text) > 2 * len(evaluation.text)
    ours, theirs = ({part.strip() for part in read.text.split("\n\n")} for read in (evaluation, calibration))
    assert not ours & theirs
    assert ours | theirs == {part.strip() for topic in topics.values() for part in topic.split("\n\n")} - {""}


def test_files_are_joined_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9\r\n".encode())
    lines = [json.dumps({"text": "one\u2028two"}, ensure_ascii=False), "", json.dumps({"text": "three"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    read = texts.read([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert read.text == "caf\u00e9\r\n\n\none\u2028two\n\nthree"
    assert read.name == "a.txt+b.jsonl"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read"),
        ("empty.txt", b" \n", "it is empty"),
        ("latin.txt", b"ok\ncaf\xe9\n", "line 2: not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("other.jsonl", b'{"content": "a"}\n', 'line 1: no "text"'),
        ("list.jsonl", b"[1]\n", 'line 1: no "text"'),
        ("weights.bin", b"abc", "neither a .txt nor a .jsonl"),
        ("sub/folder/file", None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts.read([str(tmp_path / name)])
    assert name in str(caught.value)


def test_a_dataset_that_cannot_be_had_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="text owner/name:test: .* cannot be had: Couldn't reach the Hub$"):
        texts.read(["owner/name:test"])


def test_a_dataset_is_read_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def rows(*args: Any, **kwargs: Any) -> Any:
        calls.append((*args, kwargs["split"]))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert texts.read(["owner/name:raw:valid"]).text == "a\n\nb"
    texts.read(["name"], "calibration")
    assert calls == [("owner/name", "raw", "valid"), ("name", None, "train")]


def test_windows_follow_one_another_and_drop_the_tail(tokenizer: Any) -> None:
    text = as_text("The quick brown fox jumps. " * 40)
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    windows, _ = texts.windows(tokenizer, text, 50)
    assert windows.dtype == torch.int64 and windows.shape == (len(ids) // 50, 50)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert torch.equal(texts.windows(tokenizer, text, 50, limit=2)[0], windows[:2])


def test_a_limit_gives_the_first_windows_of_a_long_text(tokenizer: Any) -> None:
    text = as_text("".join(f"Object {i} has {i * i} attributes; caf\u00e9.\n" for i in range(2000)))
    windows, _ = texts.windows(tokenizer, text, 64)
    assert torch.equal(texts.windows(tokenizer, text, 64, limit=3)[0], windows[:3])


@pytest.mark.parametrize("make", ["byte_level", "sentencepiece"])
def test_the_bytes_are_those_of_the_scored_tokens(tokenizer: Any, make: str) -> None:
    tokenizer = tokenizer if make == "byte_level" else sentencepiece()
    text = "abc d\u00e9f ghij  abc\nfed \u20ac cab " * 7
    windows, text_bytes = texts.windows(tokenizer, as_text(text), 1000)
    first = tokenizer.decode(windows[0, :1])
    assert windows.shape[0] == 1 and text.startswith(first)
    # The space that is put before the text has the first letter's place in it, so that letter goes with it, unscored.
    assert text_bytes == len(text.encode()) - (len(first.encode()) or 1)
    # Cut in many windows, the bytes of each window's first token are missing: one or two of them here.
    windows, text_bytes = texts.windows(tokenizer, as_text(text), 10)
    exact = sum(len(tokenizer.decode(row).encode()) - len(tokenizer.decode(row[:1]).encode()) for row in windows)
    assert abs(text_bytes - exact) <= 3 * len(windows)


def test_a_tokenizer_without_offsets_counts_decoded_bytes() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

        def decode(self, ids: torch.Tensor, **options: Any) -> str:
            return "".join(chr(i) for i in ids.tolist())

    slow: Any = Slow()
    windows, text_bytes = texts.windows(slow, as_text("\u00e9ab\u20acd"), 4)
    assert windows.shape == (1, 4) and text_bytes == len("ab\u20ac".encode())


def test_a_short_text_makes_one_shorter_window(tokenizer: Any) -> None:
    windows, text_bytes = texts.windows(tokenizer, as_text("~~~"), 128)
    assert windows.shape == (1, 3) and text_bytes == 2
    with pytest.raises(ValueError, match="1 tokens; 2 or more"):
        texts.windows(tokenizer, as_text("~"), 128)


def test_window_and_limit_have_lower_bounds(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="window: 1 is too small"):
        texts.windows(tokenizer, as_text("abc"), 1)
    with pytest.raises(ValueError, match="limit: 0"):
        texts.windows(tokenizer, as_text("abc"), 8, limit=0)


def test_the_default_window_is_the_context_up_to_2048() -> None:
    assert texts.default_window(GPT2Config(n_positions=64)) == 64
    assert texts.default_window(LlamaConfig(max_position_embeddings=131072)) == 2048
