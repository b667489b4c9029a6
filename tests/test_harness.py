"""lm-eval on a model in memory: our own task, the user's, and those that cannot be had."""

import functools
import json
import logging
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.eval import cloze, harness, responses
from compress.eval.cache import Cache
from compress.eval.text import Text, read

TEXT = Text("test", " ".join(f"Object {i} keeps {i * i} attributes, and names them {i + 7}." for i in range(900)), "")


@pytest.fixture(scope="module")
def model(llama_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama_dir, dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer(llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama_dir)


@pytest.fixture
def user_tasks(tmp_path: Path) -> Path:
    """A folder with the task `birds`, two questions of three choices, and the task `lost`, whose data is not there."""
    rows = [{"q": "The bird", "c": ["sings", "sang", "ate"], "a": i} for i in range(2)]
    (tmp_path / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, data in (("birds", "birds.jsonl"), ("lost", "nowhere.jsonl")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path / data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
            "test_split: test\noutput_type: multiple_choice\n"
            'doc_to_text: "{{q}}"\ndoc_to_choice: c\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n'
        )
    return tmp_path


def run(model: Any, tokenizer: Any, tasks: list[str], **how: Any) -> harness.Results:
    progress = how.pop("progress", None)
    found, left_out = harness.run(
        lambda: model, model.config, tokenizer, harness.Asked(tuple(tasks), **how), TEXT, progress=progress
    )
    assert not left_out
    return found


def slow_accuracy(model: Any, tokenizer: Any, items: list[cloze.Item]) -> float:
    """Accuracy by one forward pass for each choice."""
    right = 0
    for item in items:
        scores = []
        for choice in item.choices:
            before = tokenizer(item.passage)["input_ids"]
            ids = torch.tensor(tokenizer(item.passage + choice)["input_ids"])
            with torch.inference_mode():
                likelihood = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
            scores.append(float(likelihood.gather(1, ids[1:, None])[len(before) - 1 :].sum()))
        right += scores.index(max(scores)) == item.label
    return right / len(items)


def test_builtin_cloze_equals_a_slow_computation(model: Any, tokenizer: Any) -> None:
    found = run(model, tokenizer, ["builtin_cloze"], batch_size=1)["builtin_cloze"]
    items = cloze.items(TEXT.text, 128, lambda item: len(tokenizer(item)["input_ids"]))
    accuracy = slow_accuracy(model, tokenizer, items)
    assert found["acc"].value == pytest.approx(accuracy)
    # The standard error of a mean of n zeros and ones, with Bessel's correction.
    stderr = (accuracy * (1 - accuracy) / (len(items) - 1)) ** 0.5
    assert found["acc"].stderr == pytest.approx(stderr)
    assert set(found) == {"acc", "acc_norm"}


def test_a_run_repeats_and_leaves_nothing_behind(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(model, tokenizer, ["builtin_cloze"], limit=4)  # imports lm-eval, which sets variables
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def state() -> list[Any]:
        loggers = logging.root.manager.disable, logging.getLogger("lm_eval").level
        randoms = random.getstate(), torch.get_rng_state().tolist()
        return [dict(os.environ), list(warnings.filters), loggers, randoms, vars(model).keys(), tokenizer.pad_token]

    before = state()
    capfd.readouterr()
    first = run(model, tokenizer, ["builtin_cloze"], limit=4)
    assert run(model, tokenizer, ["builtin_cloze"], limit=4) == first
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_batches_of_any_size_score_the_same(model: Any, tokenizer: Any) -> None:
    found = [
        run(model, tokenizer, ["builtin_cloze"], limit=20, batch_size=size)["builtin_cloze"] for size in (1, 7, None)
    ]
    assert found[0]["acc"].items == found[1]["acc"].items == found[2]["acc"].items
    assert found[0]["acc"].value == sum(found[0]["acc"].items) / 20  # type: ignore[arg-type]


def test_examples_come_before_each_item(model: Any, tokenizer: Any, user_tasks: Path, monkeypatch: Any) -> None:
    asked: list[str] = []
    answers = responses.Remembering._ask
    monkeypatch.setattr(
        responses.Remembering,
        "_ask",
        lambda self, kind, requests: asked.extend(r.args[0] for r in requests) or answers(self, kind, requests),
    )
    run(model, tokenizer, ["birds"], include_path=user_tasks, num_fewshot=1)
    assert asked and all(prompt.count("The bird") == 2 for prompt in asked)


def test_responses_are_remembered_by_what_was_asked(
    model: Any, tokenizer: Any, user_tasks: Path, tmp_path: Path
) -> None:
    kept, loads = Cache(tmp_path), [0]

    def load() -> Any:
        loads[0] += 1
        return model

    def answer(key: str, limit: int) -> harness.Results:
        asked = harness.Asked(("birds",), user_tasks, limit=limit)
        return harness.run(load, model.config, tokenizer, asked, TEXT, remembered=(kept, {"model": key}))[0]

    first = answer("a", 2)
    assert loads == [1] and answer("a", 2) == first and loads == [1]
    assert answer("a", 1) != first and loads == [2]
    assert answer("b", 2) == first and loads == [3]
    for path in tmp_path.glob("tasks-*"):
        path.write_text(path.read_text().replace("e", "3", 1))
    assert answer("a", 2) == first and loads == [4]


def test_the_users_own_task_runs_beside_ours(model: Any, tokenizer: Any, user_tasks: Path) -> None:
    calls: list[Any] = []
    found = run(
        model,
        tokenizer,
        ["birds", "builtin_cloze"],
        include_path=user_tasks,
        limit=2,
        progress=lambda *call: calls.append(call),
    )
    assert list(found) == ["birds", "builtin_cloze"]
    # The two questions differ in the answer alone, so at most one is right.
    assert found["birds"]["acc"].value in (0.0, 0.5)
    assert [call for call in calls if call[0] == "tasks"] == [("tasks", 0, 2), ("tasks", 1, 2), ("tasks", 2, 2)]
    assert ("loglikelihood", 6, 6) in calls  # of birds


def test_block_by_block_the_same_tasks_score_the_same(
    llama_dir: Path, model: Any, tokenizer: Any, user_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice, a likelihood of whole texts, and one that generates, for which the whole model is needed."""
    birds = (
        (user_tasks / "birds.yaml").read_text().replace("doc_to_choice: c\n", "").replace(": a\n", ': "{{q}} {{c}}"\n')
    )
    for name, kind, metric, more in (
        ("said", "loglikelihood_rolling", "word_perplexity", ""),
        ("written", "generate_until", "exact_match", "generation_kwargs: {max_gen_toks: 4, until: []}\n"),
    ):
        task = (
            birds.replace("birds\n", f"{name}\n")
            .replace("multiple_choice", kind)
            .replace("metric: acc", f"metric: {metric}")
        )
        (user_tasks / f"{name}.yaml").write_text(task + more)
    monkeypatch.setattr(responses, "_STREAMED", 1 << 20)  # bytes: several passes through the blocks
    tasks, asked = ["builtin_cloze", "birds", "said", "written"], {"include_path": user_tasks, "limit": 40}
    whole = run(AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32), tokenizer, tasks, **asked)
    every = harness.Asked(tuple(tasks), **asked)
    streamed, left_out = harness.run(lambda: llama_dir, model.config, tokenizer, every, TEXT)
    assert set(whole) - set(streamed) == {"written"} and left_out == ["written"]
    for task, metrics in streamed.items():
        for name, metric in metrics.items():
            assert metric.value == pytest.approx(whole[task][name].value, rel=1e-5), (task, name)


def test_a_task_without_its_data_is_named(model: Any, tokenizer: Any, user_tasks: Path) -> None:
    with pytest.raises(ValueError, match=r"task lost: it or its data cannot be had .*nowhere") as caught:
        run(model, tokenizer, ["lost"], include_path=user_tasks)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_refused_with_the_nearest(
    model: Any, tokenizer: Any, user_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Listing the thousands of tasks that lm-eval ships takes seconds, and here they are not needed.
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match="task builtin_close: unknown; did you mean builtin_cloze"):
        run(model, tokenizer, ["builtin_close"])
    harness.check(["builtin_cloze", "birds"], user_tasks)
    with pytest.raises(ValueError, match="task bird: unknown; did you mean birds"):
        harness.check(["bird"], user_tasks)
    with pytest.raises(ValueError, match="include_path .*: no such folder"):
        run(model, tokenizer, ["birds"], include_path=user_tasks / "none")


@pytest.mark.parametrize("context", [64, 100, 128, 512])
def test_items_fit_the_context_and_balance_their_choices(context: int) -> None:
    items = cloze.items(read(["builtin"]).text, context, len)
    assert 100 <= len(items) <= 128
    truths = []
    for item in items:
        assert len(set(item.choices)) == 4 and item.passage
        assert all(len(item.passage + choice) <= context for choice in item.choices)
        truths.append(item.choices[item.label])
    # Every continuation is as often wrong as any other: three times for once right.
    assert sorted(truths * 3) == sorted(c for item in items for c in item.choices if c != item.choices[item.label])
    assert {item.label for item in items} == {0, 1, 2, 3}


def test_text_without_spaces_makes_items() -> None:
    items = cloze.items("".join(chr(0x4E00 + i * 7 % 9999) for i in range(3000)), 128, len)
    assert all(len(set(item.choices)) == 4 for item in items)


def test_too_little_text_or_context_is_refused() -> None:
    with pytest.raises(ValueError, match="300 characters of text are too few"):
        cloze.items("a" * 300, 512, len)
    with pytest.raises(ValueError, match="context of 8 tokens is too short"):
        cloze.items(TEXT.text, 8, len)
