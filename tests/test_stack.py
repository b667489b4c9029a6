"""The stack file: its order, any size of it in memory, resized while it runs, and smaller copies."""

import copy
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import compress
from compress import stack
from compress.bitstack import Bitstack
from compress.cli import main
from compress.formats import manifest
from compress.formats.checkpoint import Checkpoint
from compress.layout import Block
from compress.run import read_report
from compress.trimming import trim

Tiny = Callable[[str], Path]
Compressed = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(tiny_compressed: Compressed) -> Path:
    return tiny_compressed("llama", "bitstack", scaling="none")


def blocks_in(path: Path) -> list[Block]:
    """Module and number of each later block, in the order of the file's bytes."""
    names = [name.rpartition(".") for name in Checkpoint(path).entries]
    return [(module, int(local[6:])) for module, _, local in names if local.startswith("plane_") and local != "plane_0"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 23)[None]).logits
    return found


def bytes_of(model: Any) -> int:
    return int(model.resize.__self__.bytes)


def test_a_block_that_gains_more_than_the_one_before_it_lends_it_its_score() -> None:
    assert stack.per_byte([8, 4, 2], [2, 2, 2]) == [4, 2, 1]
    assert stack.per_byte([1, 5], [1, 2]) == [2, 2]
    assert stack.per_byte([6, 1, 5, 0], [1, 1, 1, 1]) == [6, 3, 3, 0]
    assert stack.per_byte([1, 2, 6], [1, 1, 1]) == [3, 3, 3]
    assert stack.per_byte([], []) == []


def test_first_all_that_is_no_block_then_first_blocks_then_the_others_by_score(whole: Path) -> None:
    names = [name for name, entry in Checkpoint(whole).entries.items() if entry.bytes]  # others lie nowhere
    dense = [name for name in names if "norm" in name or "embed" in name or "lm_head" in name]
    assert names[: len(dense)] == dense and len(dense) == 7
    locals = [name.rpartition(".")[2] for name in names]
    later = [local.startswith(("plane_", "steps_")) and local[6:] != "0" for local in locals]
    assert later == sorted(later)
    order = blocks_in(whole)
    for module in {module for module, _ in order}:
        assert [block for owner, block in order if owner == module] == list(range(1, 8))


def test_with_text_the_order_follows_what_errors_do_and_layers_differ(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress.quantize(llama_dir, out, "bitstack", scoring=None, calibration=compress.Calibration("builtin", 4, 32))
    order = blocks_in(out)
    assert len(order) == 7 * 14
    counts: dict[str, int] = {}
    for module, _ in order[: len(order) // 2]:
        counts[module] = counts.get(module, 0) + 1
    assert len(set(counts.values())) > 1
    for errors in manifest.unseal(out / "compress.json")["stack"].values():
        assert len(errors) == 8 and all(relative > 0 and output is not None for relative, output in errors)
        assert all(before[1] > after[1] for before, after in zip(errors, errors[1:], strict=False))
    assert manifest.verify(out) == []
    report = read_report(out)
    assert all(line["output_error"] is not None for line in report.tensors if line["scheme"])


def test_errors_in_the_manifest_are_those_of_what_is_loaded(whole: Path, tiny_model: Tiny) -> None:
    known = manifest.unseal(whole / "compress.json")["stack"]
    module = "model.layers.1.mlp.up_proj"
    weight = Checkpoint(tiny_model("llama")).read(f"{module}.weight").float()
    stored = Checkpoint(whole)
    locals = [name for name in stored.entries if name.startswith(f"{module}.") and not name.endswith(".weight")]
    tensors = {name.removeprefix(f"{module}."): stored.read(name) for name in locals}
    for count, (relative, output) in enumerate(known[module], 1):
        decoded = Bitstack().decode(stack.first_blocks(Bitstack(), tensors, count)).float()
        assert relative == pytest.approx(float((weight - decoded).norm() / weight.norm()), rel=1e-4) and output is None


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2", "qwen3-moe", "gpt-oss"])
def test_every_size_is_kept_and_the_next_block_would_not_fit(name: str, tiny_compressed: Compressed) -> None:
    path = tiny_compressed(name, "bitstack", scaling="none", blocks=3)
    whole = compress.load(path)
    most = bytes_of(whole)
    whole.resize(most)
    assert bytes_of(whole) == most
    least = int(str(re.search(r"takes (\d+) bytes", refused(path, 1000))[1]))  # type: ignore[index]
    refused(path, least - 1)
    largest = max(
        sum(e.bytes for n, e in Checkpoint(path).entries.items() if n.startswith(m) and "_2" in n)
        for m in {f"{module}." for module, _ in blocks_in(path)}
    )
    for budget in (least, least + 1, (least + most) // 2, most - 1, most, 2 * most):
        model = compress.load(path, max_memory=budget)
        assert bytes_of(model) <= budget
        assert budget >= most or bytes_of(model) > budget - largest - 64
        assert model.get_memory_footprint() <= bytes_of(model)
        whole.resize(budget)
        assert bytes_of(whole) == bytes_of(model) and torch.equal(logits(whole), logits(model))
    assert torch.equal(logits(model), logits(compress.load(path)))


def refused(path: Path, size: int) -> str:
    with pytest.raises(ValueError, match=f"max_memory {size} is too small: with one block of each weight") as error:
        compress.load(path, max_memory=size)
    return str(error.value)


def test_more_memory_is_never_further_from_the_original(whole: Path, tiny_model: Tiny) -> None:
    wanted = logits(compress.load(tiny_model("llama"))).float()
    model = compress.load(whole)
    most, errors = bytes_of(model), []
    for part in (0.55, 0.7, 0.85, 1.0):
        model.resize(int(part * most))
        errors.append(float((logits(model).float() - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 < errors[0]


def test_what_is_no_stack_has_no_size_to_choose(tiny_compressed: Compressed, tiny_model: Tiny, tmp_path: Path) -> None:
    for path in (tiny_model("llama"), tiny_compressed("llama", "int4")):
        with pytest.raises(ValueError, match="max_memory decides how much of a bitstack checkpoint is loaded"):
            compress.load(path, max_memory="1GiB")
        with pytest.raises(ValueError, match="was not written with scheme bitstack"):
            trim(path, tmp_path / "small", "1GiB")
    with pytest.raises(ValueError, match="size 'much' is not understood"):
        compress.load(tiny_compressed("llama", "bitstack", scaling="none"), max_memory="much")


def test_a_model_is_resized_while_another_thread_runs_it(whole: Path) -> None:
    model = compress.load(whole)
    most = bytes_of(model)
    budgets = [most, int(0.6 * most), int(0.8 * most)]
    known = []
    for budget in budgets:
        model.resize(budget)
        known.append(logits(model))
    found: list[Tensor] = []
    stopping = threading.Event()

    def run() -> None:
        while not stopping.is_set():
            found.append(logits(model))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            model.resize(budgets[turn % 3])
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert found and all(any(torch.equal(seen, wanted) for wanted in known) for seen in found)


def test_resize_waits_for_the_pass_that_runs_and_not_for_its_own(whole: Path) -> None:
    model = compress.load(whole)
    errors = []

    def resize(*_: Any) -> None:
        with pytest.raises(ValueError, match="from within a forward pass"):
            model.resize("1GiB")
        errors.append(1)

    hook = model.model.layers[0].register_forward_hook(resize)
    logits(model)
    hook.remove()
    assert errors == [1]
    with pytest.raises(IndexError):  # a pass that fails has ended too
        model(torch.tensor([[10**6]]))
    model.resize("1GiB")


def test_a_copy_of_a_model_has_a_size_of_its_own(whole: Path) -> None:
    model = compress.load(whole)
    other, before = copy.deepcopy(model), logits(model)
    other.resize(int(0.6 * bytes_of(model)))
    assert bytes_of(other) < bytes_of(model)
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)


def test_a_model_of_any_size_is_saved_and_loaded(whole: Path, tmp_path: Path) -> None:
    model = compress.load(whole)
    model.resize(int(0.7 * bytes_of(model)))
    model.save_pretrained(tmp_path / "saved")
    again = compress.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and bytes_of(again) == bytes_of(model)
    again.resize(int(0.65 * bytes_of(again)))  # whatever the order that another writer puts blocks in
    logits(again)


def test_memory_of_the_process_falls_and_rises(tmp_path: Path) -> None:
    """3.7 million weights in 8 blocks are 3.7 MB."""
    script = f"""
import ctypes, torch, transformers, compress
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=1,
                     num_attention_heads=16, num_key_value_heads=1, max_position_embeddings=64)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained({str(tmp_path / "model")!r})
compress.quantize({str(tmp_path / "model")!r}, {str(tmp_path / "out")!r}, "bitstack", scaling="none", scoring=None)
def private():
    ctypes.CDLL(None).malloc_trim(0)
    lines = open("/proc/self/smaps_rollup").read().split("\\n")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) * 1024
model = compress.load({str(tmp_path / "out")!r})
live = model.resize.__self__
sizes = []
for turn in range(2):
    for budget in ("1GiB", live.bytes if turn else 700000 + live._fixed()):
        taken = model.resize(budget)
        sizes.append((taken, private()))
print(sizes)
"""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system does not say what a process takes")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (full, most), (small, least), (again, more), _ = json.loads(
        result.stdout.strip().split("\n")[-1].replace("(", "[").replace(")", "]")
    )
    assert full == again and full - small > 2_500_000
    assert 0.8 * (full - small) < most - least < 1.2 * (full - small)
    assert 0.8 * (full - small) < more - least < 1.2 * (full - small)


def test_a_trimmed_copy_is_a_checkpoint_of_its_own(whole: Path, tiny_model: Tiny, tmp_path: Path) -> None:
    files = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    for part, shard_bytes in ((0.9, 10**9), (0.7, 60_000)):
        small, size = tmp_path / str(part), int(part * files)
        written = trim(whole, small, size, shard_bytes=shard_bytes)
        assert written == sum(file.stat().st_size for file in small.glob("*.safetensors")) <= size
        largest = max(entry.bytes for entry in Checkpoint(whole).entries.values())
        assert written > size - largest - 5000 and (len(list(small.glob("*.safetensors"))) > 1) == (part == 0.7)
        assert manifest.verify(small) == []
        model = compress.load(small)
        assert torch.equal(logits(model), logits(compress.load(whole, max_memory=bytes_of(model))))
        assert blocks_in(small) == blocks_in(whole)[: len(blocks_in(small))]
        result = CliRunner().invoke(main, ["verify", str(small), "--against", str(tiny_model("llama")), "--json"])
        assert result.exit_code == 0, result.output
        errors = {line["name"]: line["relative_error"] for line in json.loads(result.stdout)["tensors"]}
        report = read_report(small)
        for line in report.tensors:
            if line["scheme"]:
                assert line["relative_error"] == pytest.approx(errors[f"{line['name']}.weight"], rel=1e-3)
        stored = sum(entry.bytes for entry in Checkpoint(small).entries.values())
        assert report.bytes == stored and report.evaluation is None and "trimmed" in report.notes[-1]
    for less, blocks in enumerate((blocks_in(whole), blocks_in(whole)[:-1])):  # as large as it is, and a byte less
        assert (trim(whole, tmp_path / f"less {less}", files - less) == files) == (less == 0)
        assert blocks_in(tmp_path / f"less {less}") == blocks
    trim(tmp_path / "0.9", tmp_path / "twice", int(0.7 * files))
    assert manifest.verify(tmp_path / "twice") == []


def test_trim_says_the_least_size_and_refuses_damage(whole: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["trim", str(whole), "--size", "10KB", "-o", str(tmp_path / "small")])
    assert result.exit_code == 2 and not (tmp_path / "small").exists()
    least = int(str(re.search(r"with one block of each weight it takes (\d+) bytes", result.output)[1]))  # type: ignore[index]
    with pytest.raises(ValueError, match="too small"):
        trim(whole, tmp_path / "small", least - 1)
    assert trim(whole, tmp_path / "small", least) <= least
    assert blocks_in(tmp_path / "small") == []
    result = CliRunner().invoke(main, ["trim", str(whole), "--size", "1GiB", "-o", str(tmp_path / "small")])
    assert result.exit_code == 2 and "exists" in result.output
    file = next((tmp_path / "small").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ValueError, match="is not what compress.json says; get a whole copy"):
        trim(tmp_path / "small", tmp_path / "smaller", "1GiB")
    assert not (tmp_path / "smaller").exists() and not (tmp_path / "smaller.partial").exists()


def test_a_run_that_was_interrupted_writes_the_same_bytes(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_compressed: Compressed
) -> None:
    want, order = tiny_compressed("one-layer", "bitstack", scaling="none"), stack.order

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stack, "order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress.quantize(tiny_model("one-layer"), tmp_path / "out", "bitstack", scaling="none", scoring=None)
    monkeypatch.setattr(stack, "order", order)
    monkeypatch.setattr(Bitstack, "encode", interrupted)  # nothing is encoded twice
    compress.quantize(tiny_model("one-layer"), tmp_path / "out", "bitstack", scaling="none", scoring=None)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()


def test_beside_other_schemes_and_in_several_files(tiny_model: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: embed_tokens, scheme: df11}\n- {match: down_proj, scheme: int8}\n")
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_model("llama")), "--scheme", "bitstack", "--set", "scaling=none"]
    arguments += ["--recipe", str(recipe), "--shard-size", "40KB", "--no-eval", "-o", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("*.safetensors"))) > 2 and manifest.verify(out) == []
    model = compress.load(out)
    before, most = logits(model), bytes_of(model)
    model.resize(int(0.8 * most))
    assert not torch.equal(logits(model), before)
    model.resize(most)
    assert torch.equal(logits(model), before)
    trim(out, tmp_path / "small", int(0.8 * most))
    assert manifest.verify(tmp_path / "small") == []


@pytest.mark.parametrize("head", [8, "lossless"])
@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "gpt2"])
def test_head_and_embeddings_are_stored_as_asked(
    name: str, head: object, tiny_model: Tiny, tiny_compressed: Compressed, tmp_path: Path
) -> None:
    options = {"scaling": "none", "blocks": 3}
    out, plain = (tiny_compressed(name, "bitstack", **options, **more) for more in ({"head": head}, {}))
    report = read_report(out)
    lines = {line["name"]: line for line in report.tensors}
    ends = [line for at, line in lines.items() if at.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "wpe")]
    assert [line["scheme"] for line in ends] == len(ends) * ["int8" if head == 8 else "df11"]
    assert len(ends) == {"llama": 2, "llama-tied-biased": 1, "gpt2": 2}[name]  # a tied head is stored once
    assert sum(line["bytes"] for line in ends) < (0.55 if head == 8 else 0.8) * sum(e["original_bytes"] for e in ends)
    stored = sum(entry.bytes for entry in Checkpoint(out).entries.values())
    forecast = compress.plan(tiny_model(name), "bitstack", head=head, **options)
    assert report.bytes == stored == forecast.totals["bytes"]
    names = [local for local, entry in Checkpoint(out).entries.items() if entry.bytes]
    first = next(i for i, local in enumerate(names) if local.endswith(".plane_0"))
    assert all(any(local.startswith(f"{end['name']}.") for local in names[:first]) for end in ends)

    result = CliRunner().invoke(main, ["verify", str(out), "--against", str(tiny_model(name)), "--json"])
    assert result.exit_code == 0, result.output
    errors = {line["name"]: line["relative_error"] for line in json.loads(result.stdout)["tensors"]}
    assert all((errors[f"{end['name']}.weight"] == 0) == (head != 8) for end in ends)
    assert all(errors[f"{end['name']}.weight"] < 0.01 for end in ends)

    model, other = compress.load(out), compress.load(plain)
    most, saved = bytes_of(model), sum(line["original_bytes"] - line["bytes"] for line in ends)
    assert most == bytes_of(other) - saved
    error = (logits(model).float() - logits(other).float()).norm() / logits(other).float().norm()
    assert error == 0 if head != 8 else error < 0.02
    model.resize(int(0.9 * most))
    assert bytes_of(model) <= 0.9 * most
    assert torch.equal(logits(model), logits(compress.load(out, max_memory=int(0.9 * most))))
    trim(out, tmp_path / "small", int(0.9 * most) + 20_000)
    assert manifest.verify(tmp_path / "small") == []
    logits(compress.load(tmp_path / "small"))


def test_a_rule_for_the_head_comes_before_the_option(tiny_model: Tiny) -> None:
    rules = compress.Rules(exclude=("embed_tokens",))
    options = {"scheme": "bitstack", "scaling": "none", "head": "8"}
    plan = compress.plan(tiny_model("llama"), rules=rules, **options).plan
    assert "model.embed_tokens" not in plan.modules and plan.modules["lm_head"].scheme.name == "int8"
    plan = compress.plan(tiny_model("llama"), rules=compress.Rules(include=("re:layers",)), **options).plan
    assert "lm_head" not in plan.modules
    plan = compress.plan(tiny_model("llama"), rules=compress.Rules(exclude=("re:layers",)), **options).plan
    assert list(plan.modules) == ["lm_head", "model.embed_tokens"] and plan.interchange is None


def test_eval_takes_a_budget(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress.quantize(llama_dir, out, "bitstack", scoring=None, scaling="none")
    scores = []
    for size in ("90KB", "1GB"):
        arguments = [
            "eval",
            str(out),
            "--reference",
            str(llama_dir),
            "--max-memory",
            size,
            "--tasks",
            "",
            "--limit",
            "2",
        ]
        result = CliRunner().invoke(main, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        scores.append(json.loads(result.stdout)["kl_mean"])
    assert 0 <= scores[1] < scores[0]
    result = CliRunner().invoke(main, ["eval", str(out), "--max-memory", "1KB", "--tasks", ""])
    assert result.exit_code == 2 and "with one block of each weight the model takes" in result.output
