"""Calibrated runs: fitted block by block to what compressed layers give, the same after any interruption."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import compress
from compress import hollow
from compress.blocks import Blocks
from compress.calibrate import Calibration, output_error
from compress.cli import main
from compress.fold import Fold, _random
from compress.formats.checkpoint import Checkpoint
from compress.hf import model_class
from compress.int4 import Int4
from compress.samples import Samples, draw
from compress.stats import Accumulator, Stats

TEXT = Calibration(samples=6, seq_len=32)


def run(model: Path, out: Path, **options: Any) -> Any:
    how = {"bits": 3, "group_size": 32, "method": "gptq", "calibration": TEXT, "scoring": None, **options}
    return compress.quantize(model, out, "int4", **how)


def tensors(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(path)
    return {name: bytes(checkpoint.raw(name)) if entry.bytes else b"" for name, entry in checkpoint.entries.items()}


STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def watched(model: nn.Module, block: nn.Module, stage: tuple[str, ...], ids: torch.Tensor) -> dict[str, Any]:
    """By module the inputs, and what is to be like the original: outputs, or the sums that they are part of."""
    found: dict[str, Any] = {}
    layers = {name: layer for name, layer in block.named_modules() if name.endswith(stage)}
    hooks = [m.register_forward_hook(lambda _, x, y, n=n: found.update({n: [x[0], y]})) for n, m in layers.items()]
    with torch.no_grad():
        after = [block.post_attention_layernorm.register_forward_pre_hook(lambda _, x: found.update(norm=x[0]))]
        after.append(block.register_forward_hook(lambda _, __, y: found.update(block=y)))
        model(ids)
    for hook in hooks + after:
        hook.remove()
    for name in layers:
        if name.endswith(("o_proj", "down_proj")):
            found[name][1] = found["norm" if name.endswith("o_proj") else "block"]
    return {name: [part.flatten(0, -2) for part in found[name]] for name in layers}


def test_layers_are_fitted_to_what_the_original_gives_on_what_compressed_layers_give(
    llama_dir: Path, tmp_path: Path
) -> None:
    """The same in the most obvious way: both models whole in memory, run once for every stage of every block."""
    run(llama_dir, tmp_path / "out")
    model, original = (AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32) for _ in range(2))
    ids, scheme = draw("builtin", llama_dir, 6, 32, 0).tokens, Int4(bits=3, group_size=32, method="gptq")
    stored, source = Checkpoint(tmp_path / "out"), Checkpoint(llama_dir)
    alike, count = 0, 0
    for i, block in enumerate(model.model.layers):
        for stage in STAGES:
            wanted = watched(original, original.model.layers[i], stage, ids)
            for name, (x, y) in watched(model, block, stage, ids).items():
                sums = Accumulator(hessian=True)
                sums.add(x)
                stats = dataclasses.replace(sums.stats(), missing=(wanted[name][1] - y).T @ x / len(x))
                weight = source.read(f"model.layers.{i}.{name}.weight")
                fitted = scheme.fit(tuple(weight.shape))
                made = fitted.encode(weight, stats)
                decoded = fitted.decode({n: stored.read(f"model.layers.{i}.{name}.{n}") for n in made})
                close = (decoded - fitted.decode(made)).abs() < 0.02 * decoded.abs().max()
                alike, count = alike + int(close.sum()), count + close.numel()
                block.get_submodule(name).weight.data = decoded.float()
    assert alike / count > 0.97  # sums in another order may tip what lies between two steps


def test_outputs_are_nearer_than_with_rounding_and_the_report_says_by_how_much(llama_dir: Path, tmp_path: Path) -> None:
    reports = {}
    for method in ("rtn", "gptq"):
        scoring = compress.Scoring(tasks=(), limit=4, window=64)
        calibration = TEXT if method == "gptq" else None
        reports[method] = run(
            llama_dir, tmp_path / method, method=method, bits=2, calibration=calibration, scoring=scoring
        )
    assert reports["gptq"].bytes == reports["rtn"].bytes
    coded = [line for line in reports["gptq"].tensors if line["scheme"]]
    assert coded and all(0 < line["output_error"] < line["relative_error"] for line in coded)
    assert all(line["output_error"] is None for line in reports["rtn"].tensors)
    assert reports["gptq"].evaluation["kl_mean"] < reports["rtn"].evaluation["kl_mean"]
    recipe = json.loads((tmp_path / "gptq" / "compress.json").read_text())["recipe"]
    assert recipe["calibration"]["source"] == "builtin" and len(recipe["calibration"]["sha256"]) == 64


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches kill -9."""


# The call in which the run dies, when the first of two blocks is done: both models are left before the first block and
# after it and closed once a block, and a block has four stages.
@pytest.mark.parametrize("step, call", [("close", 3), ("close", 4), ("leave", 4), ("measure", 6), ("shard", 1)])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(
    step: str, call: int, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama_dir, tmp_path / "whole", command="same")
    calls = 0

    def dying(original: Any) -> Any:
        def method(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return original(*arguments, **keywords)

        return method

    with monkeypatch.context() as patch:
        if step == "shard":
            patch.setattr("compress.run.write", dying(None))
        else:
            patch.setattr(Blocks, step, dying(getattr(Blocks, step)))
        with pytest.raises(Killed):
            run(llama_dir, tmp_path / "out", command="same")
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    measured: list[str] = []
    measure = Blocks.measure
    monkeypatch.setattr(
        Blocks, "measure", lambda self, block, *a, **k: (measured.append(block), measure(self, block, *a, **k))[1]
    )
    run(llama_dir, tmp_path / "out", command="same")
    assert set(measured) == (set() if step == "shard" else {"model.layers.1"})
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")
    assert (tmp_path / "out" / "compress.json").read_bytes() == (tmp_path / "whole" / "compress.json").read_bytes()
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def sparse_experts(llama_dir: Path, tiny_config: Callable[[str], Any], tmp_path: Path) -> Path:
    """A mixture of experts whose router never takes the last one."""
    config, path = tiny_config("mixtral"), tmp_path / "experts"
    config.vocab_size = AutoConfig.from_pretrained(llama_dir).vocab_size
    torch.manual_seed(0)
    model = model_class(config)(config).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.fill_(1)
        router = layer.mlp.gate.weight.data
        router[-1] = -router[:-1].sum(0)  # below the others' mean, whatever the token
    model.save_pretrained(path)
    for file in llama_dir.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def test_an_expert_that_no_token_reaches_is_rounded_and_the_report_says_so(
    sparse_experts: Path, tmp_path: Path
) -> None:
    report = run(sparse_experts, tmp_path / "out", calibration=Calibration(samples=1, seq_len=2))
    lines = {line["name"]: line for line in report.tensors if ".experts." in line["name"]}
    without = {name for name, line in lines.items() if line["note"]}
    assert without and without != set(lines)
    for name in without:
        assert lines[name]["note"] == "rounded to nearest: nothing was measured at its input"
        assert lines[name]["output_error"] is None
    assert compress.load(tmp_path / "out")(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_the_inputs_of_an_expert_that_no_token_reaches_are_taken_to_be_as_large_as_others(
    sparse_experts: Path, tmp_path: Path
) -> None:
    text = Calibration(samples=1, seq_len=2)
    how: dict[str, Any] = {"activations": "static", "calibration": text, "scoring": None}
    report = compress.quantize(sparse_experts, tmp_path / "out", "fp8", **how)
    lines = {line["name"]: line for line in report.tensors if ".experts." in line["name"]}
    without = {name for name, line in lines.items() if line["note"]}
    assert without and all(lines[name]["output_error"] is None for name in without)
    stored = Checkpoint(tmp_path / "out")
    for name in without:
        block = name.partition(".experts.")[0]
        alike = [n for n in lines if n.startswith(block) and lines[n]["shape"][1] == lines[name]["shape"][1]]
        seen = [stored.read(f"{other}.input_scale").item() for other in alike if other not in without]
        assert stored.read(f"{name}.input_scale").item() == max(seen)


def test_a_rule_may_leave_layers_out_or_give_them_a_scheme_without_data(llama_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: down_proj, scheme: fp8}\n- {match: q_proj, scheme: none}\n")
    report = run(llama_dir, tmp_path / "out", rules=compress.Rules(recipe))
    errors = {line["name"].rpartition(".")[2]: line for line in report.tensors if "layers.1" in line["name"]}
    assert errors["down_proj"]["scheme"] == "fp8" and errors["up_proj"]["output_error"] is not None


def test_the_head_is_calibrated_when_a_rule_takes_it(sparse_experts: Path, tmp_path: Path) -> None:
    report = run(sparse_experts, tmp_path / "out", rules=compress.Rules(include=("lm_head", "o_proj")))
    assert {line["name"].rpartition(".")[2] for line in report.tensors if line["output_error"]} == {"lm_head", "o_proj"}


def test_output_error_by_hand() -> None:
    stats = Stats(1, torch.tensor([1.0, 4.0]), torch.ones(2), torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    weight, decoded = torch.tensor([[3.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert output_error(weight, decoded, stats) == pytest.approx((4 / 25) ** 0.5)
    assert output_error(weight, weight, stats) == 0
    independent = Stats(1, stats.second_moment, stats.absmean, stats.absmax)
    assert output_error(weight, decoded, independent) == pytest.approx((4 / 25) ** 0.5)
    assert output_error(torch.zeros(1, 2), torch.zeros(1, 2), stats) == 0


def test_samples_are_drawn_by_seed_and_start_as_the_tokenizer_wants(llama_dir: Path) -> None:
    found = draw("builtin", llama_dir, 5, 16, 0)
    assert found.tokens.shape == (5, 16) and found.tokens.dtype == torch.int64
    assert torch.equal(found.tokens, draw("builtin", llama_dir, 5, 16, 0).tokens)
    assert not torch.equal(found.tokens, draw("builtin", llama_dir, 5, 16, 1).tokens)
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    first = tokenizer("a")["input_ids"][0]
    assert (found.tokens[:, 0] == first).all() == (first == tokenizer.bos_token_id)


def test_a_short_text_gives_the_samples_that_it_has(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("some words, and a few more of them. " * 8)
    count = len(AutoTokenizer.from_pretrained(llama_dir)((tmp_path / "short.txt").read_text())["input_ids"]) // 16
    assert abs(len(draw(str(tmp_path / "short.txt"), llama_dir, 500, 16, 0).tokens) - count) <= 1


def test_the_model_writes_its_own_samples(llama_dir: Path) -> None:
    found = draw("self", llama_dir, 3, 12, 0)
    assert found.tokens.shape == (3, 12) and found.name == "self"
    assert torch.equal(found.tokens, draw("self", llama_dir, 3, 12, 0).tokens)
    assert len({tuple(row) for row in found.tokens.tolist()}) == 3


def quantize(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments), "--no-eval", "--json"])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--seq-len", "100000"), "seq-len: 100000 tokens exceed the context"),
        (("--calibration", "missing.txt"), "missing.txt"),
        (("--set", "method=rtn", "--samples", "5"), "uses no calibration data"),
        (("--scheme", "fp8", "--calibration", "builtin"), "scheme fp8 uses no calibration data"),
    ],
    ids=str,
)
def test_bad_calibration_options_are_refused_in_one_line(
    options: tuple[str, ...], message: str, llama_dir: Path, tmp_path: Path
) -> None:
    result = quantize(llama_dir, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer_names_the_way_out(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    result = quantize(tiny_model("llama"), "-o", tmp_path / "out", "--set", "method=gptq")
    assert result.exit_code == 2 and "--set method=rtn does without" in result.stderr
    assert not list(tmp_path.iterdir())


def test_folded_scales_are_undone_when_the_result_is_verified(llama_dir: Path, tmp_path: Path) -> None:
    source = loud(llama_dir, tmp_path / "source")
    report = run(source, tmp_path / "out", method="awq+gptq", bits=4)
    ledger = json.loads((tmp_path / "out" / "compress.json").read_text())["ledger"]
    folded = [name for name, entry in ledger.items() if entry["action"] == "folded"]
    assert folded and all(name.endswith("layernorm.weight") for name in folded)
    assert any("changes" in entry for entry in ledger.values())
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--against", str(source), "--json"])
    assert result.exit_code == 0, result.output
    compared = {line["name"]: line for line in json.loads(result.stdout)["tensors"]}
    for line in report.tensors:
        if line["scheme"]:
            error = compared[f"{line['name']}.weight"]["relative_error"]
            assert error == pytest.approx(line["relative_error"], rel=0.02) and error < 0.5
    notes = {line["name"]: line["note"] for line in report.tensors if line["note"]}
    assert all(notes.pop(name) == "changed with the weights that read it" for name in folded)
    assert notes and all(note.startswith("input channels scaled: squared error down by") for note in notes.values())


def loud(model: Path, path: Path) -> Path:
    """A model of which a few channels behind each norm are much larger than the others, as in large models."""
    shutil.copytree(model, path)
    stored = load_file(path / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith("layernorm.weight"):
            tensor[:3] *= 20
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    return path


def test_scaling_helps_where_some_channels_are_loud(llama_dir: Path, tmp_path: Path) -> None:
    source, name = loud(llama_dir, tmp_path / "source"), "model.layers.0.self_attn.q_proj"
    report = run(source, tmp_path / "out", bits=3, method="awq")
    found = next(line["output_error"] for line in report.tensors if line["name"] == name)
    sums = Accumulator(hessian=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: sums.add(x[0]))
    with torch.no_grad():
        model(draw("builtin", source, 6, 32, 0).tokens)
    weight, stats, plain = Checkpoint(source).read(f"{name}.weight"), sums.stats(), Int4(3, 32, method="rtn")
    assert stats is not None
    assert found < output_error(weight, plain.decode(plain.encode(weight)), stats)


ARCHITECTURES = [
    "llama-tied-biased",
    "llama-ragged",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "opt",
]
ARCHITECTURES += [
    "gpt-neox",
    "falcon",
    "mamba",
    "t5",
    "jetmoe",
    "mixtral",
    "qwen2-moe",
    "gpt-oss",
    "llama4",
    "deepseek-v3",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_calibrated(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("compress.run.draw", lambda *_: Samples(tokens, "random"))
    report = run(tiny_model(name), tmp_path / "out", method="awq+gptq", bits=4, calibration=None)
    coded = [line for line in report.tensors if line["scheme"]]
    unseen = {line["name"] for line in coded if line["output_error"] is None}
    assert all(".experts." in module or "dt_proj" in module or "_linear.weight." in module for module in unseen)
    assert len(unseen) < len(coded) / 2 and all(line["output_error"] < 0.3 for line in coded if line["output_error"])
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids} if name == "t5" else {}
    original = model_class(AutoConfig.from_pretrained(tiny_model(name))).from_pretrained(tiny_model(name))
    with torch.no_grad():
        found, expected = (model(ids, **extra).logits for model in (compress.load(tmp_path / "out"), original))
    assert (found - expected).norm() < 0.4 * expected.norm()


@pytest.mark.parametrize("left_out", ["up_proj", "v_proj", "o_proj", "k_proj"])
def test_scales_move_only_between_what_is_planned(left_out: str, llama_dir: Path, tmp_path: Path) -> None:
    rules = compress.Rules(exclude=(left_out,))
    source = loud(llama_dir, tmp_path / "source")
    run(source, tmp_path / "out", method="awq+gptq", bits=4, rules=rules)
    ledger = json.loads((tmp_path / "out" / "compress.json").read_text())["ledger"]
    assert all(entry["action"] == "copied" for name, entry in ledger.items() if f".{left_out}." in name)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--against", str(source)])
    assert result.exit_code == 0, result.output


def test_a_model_that_is_not_finite_on_the_text_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    stored["model.embed_tokens.weight"][:] = torch.inf
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\..*: its inputs hold NaN or infinity on the calibration text"):
        run(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("lost", ["*.safetensors", "activations/*", "*"])
def test_what_was_lost_of_an_interrupted_run_is_made_again(
    lost: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama_dir, tmp_path / "whole", command="same")
    with monkeypatch.context() as patch:
        patch.setattr("compress.run.write", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(llama_dir, tmp_path / "out", command="same")
    scratch = tmp_path / "out.partial" / "scratch"
    for path in list(scratch.glob(lost)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.write_bytes(b"")
    run(llama_dir, tmp_path / "out", command="same")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")


def test_a_model_that_needs_more_than_text_is_refused_in_one_line(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    def forward(*_: Any, **__: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be run on text alone.*choose a scheme that needs no"):
        run(llama_dir, tmp_path / "out")


def test_blocks_that_share_weights_are_refused(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = hollow._build

    def sharing(source: Any) -> Any:
        model = built(source)
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    monkeypatch.setattr(hollow, "_build", sharing)
    with pytest.raises(ValueError, match="model.layers.0 and model.layers.1 share weights"):
        run(llama_dir, tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"samples": -1}, {"seq_len": 1}])
def test_samples_that_are_none_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give 1 sample or more, of 2 tokens or more"):
        Calibration(**wrong)


def test_of_a_long_text_parts_from_all_over_are_read(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("".join(f"word {i} and then " for i in range(20000)))
    found = draw(str(tmp_path / "long.txt"), llama_dir, 4, 16, 0)
    texts = AutoTokenizer.from_pretrained(llama_dir).batch_decode(found.tokens)
    assert found.tokens.shape == (4, 16)
    assert len({text[:12] for text in texts}) == 4


def test_a_norm_that_a_lossless_scheme_stores_keeps_its_scale(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.df11.SMALLEST", 16)  # norms of this model are short
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: 're:layernorm', scheme: df11}\n")
    source = loud(llama_dir, tmp_path / "source")
    report = run(source, tmp_path / "out", method="awq+gptq", bits=8, rules=compress.Rules(recipe))
    assert any(line["scheme"] == "df11" for line in report.tensors if "layernorm" in line["name"])
    ids = torch.arange(3, 40)[None]
    original = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        found, expected = (model(ids).logits.float() for model in (compress.load(tmp_path / "out"), original))
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_progress_tells_of_every_layer_when_its_error_is_known(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, str]] = []

    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "calibrating":
            told.append((done, total, detail))

    def dying(self: Blocks, block: str, *arguments: Any) -> Any:
        if block.endswith("1"):
            raise Killed
        return measure(self, block, *arguments)

    measure = Blocks.measure
    with monkeypatch.context() as patch:  # what was told of before a run is killed is not told of again
        patch.setattr(Blocks, "measure", dying)
        with pytest.raises(Killed):
            run(llama_dir, tmp_path / "out", progress=progress, command="same")
    report = run(llama_dir, tmp_path / "out", progress=progress, command="same")
    errors = {line["name"]: line["output_error"] for line in report.tensors if line["scheme"]}
    assert [done for done, _, _ in told] == list(range(1, 15)) and {total for _, total, _ in told} == {14}
    for i, (_, _, detail) in enumerate(told):
        block, layer, error = re.fullmatch(r"block (\d) of 2, (.*): error (.*)", detail).groups()
        assert int(block) == i // 7 + 1
        assert error == f"{errors[f'model.layers.{i // 7}.{layer}']:.4f}"


def test_a_change_that_is_none_of_a_block_stops_the_run(llama_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Were a fold accepted that does not hold, the block would compute something else."""

    wrong = Fold(("model.layers.0.mlp.up_proj",), ("model.layers.0.mlp.down_proj",), 128, "order")  # and not its gate
    monkeypatch.setattr("compress.folding.Folding.choose", lambda *_: (_random(wrong), 0.5))
    monkeypatch.setattr("compress.calibrate.Blocks.folds", lambda *_: [wrong])
    with pytest.raises(ValueError, match="order of its channels changed, the block computes something else"):
        compress.quantize(llama_dir, tmp_path / "out", "bfp", method="rtn", scoring=None)
    assert not (tmp_path / "out").exists()
