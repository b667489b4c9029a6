"""Scales of a KV cache: measured behind the compressed layers, after RoPE, stored as compressed-tensors has them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoConfig, DynamicCache

import compress
from compress import kv_scales
from compress.blocks import Blocks
from compress.cli import main
from compress.exporting import export
from compress.formats.checkpoint import Checkpoint
from compress.hf import model_class
from compress.samples import Samples

TOKENS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def calibrated() -> Iterator[None]:
    """The tiny models have no tokenizer: they are calibrated with tokens, not with text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.run.draw", lambda *_: Samples(TOKENS, "random"))
        yield


def run(model: Path, out: Path, scheme: str = "fp8", **options: Any) -> Any:
    return compress.quantize(model, out, scheme, **{"kv_cache": "fp8", "scoring": None, "command": "same", **options})


def stored(path: Path, *endings: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.entries if name.endswith(endings)}


def bits(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(path)
    return {name: bytes(checkpoint.raw(name)) if entry.bytes else b"" for name, entry in checkpoint.entries.items()}


def test_a_scale_by_hand() -> None:
    assert torch.equal(kv_scales.scale(896.0, "a"), torch.tensor([2.0], dtype=torch.bfloat16))
    assert torch.equal(kv_scales.scale(0.0, "a"), torch.ones(1, dtype=torch.bfloat16))  # 0 would divide by itself
    # 3 / 448 = 0.0066964...: between 0.006683... and 0.006713..., the nearer of which is the first
    assert kv_scales.scale(3.0, "a").item() == 219 / 2**15
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a: keys or values hold NaN or infinity"):
            kv_scales.scale(wrong, "a")


def test_the_largest_magnitude_of_many_passes_counts() -> None:
    largest = kv_scales.Largest()
    largest.see(torch.tensor([1.0, -448.0]), torch.tensor([0.0]))
    keys, values = torch.tensor([2.0]), torch.tensor([-896.0])
    assert largest.see(keys, values) == (keys, values)
    assert [scale.item() for scale in largest.scales("a").values()] == [1.0, 2.0]
    with pytest.raises(ValueError, match="b: nothing was cached"):
        kv_scales.Largest().scales("b")


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "mixtral", "qwen3-moe"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scales_are_those_of_the_cache_of_the_compressed_model(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A reference that holds the whole model: its own cache, in float32, after the same tokens."""
    run(tiny_model(name), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "plain", "fp32")
    model = model_class(AutoConfig.from_pretrained(tmp_path / "plain")).from_pretrained(tmp_path / "plain")
    cache = DynamicCache()
    with torch.no_grad():
        model(TOKENS, past_key_values=cache, use_cache=True)
    found = stored(tmp_path / "out", "k_scale", "v_scale")
    assert len(found) == 2 * len(cache.layers) == 4
    for i, layer in enumerate(cache.layers):
        for local, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = found[f"model.layers.{i}.self_attn.{local}"]
            assert scale.dtype == torch.bfloat16 and scale.shape == (1,)
            assert states is not None and scale.item() == pytest.approx(states.abs().max().item() / 448, rel=2**-8)


def test_keys_are_measured_after_rope(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "plain", "fp32")
    model = model_class(AutoConfig.from_pretrained(tmp_path / "plain")).from_pretrained(tmp_path / "plain")
    before: list[float] = []
    attention = model.model.layers[0].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda _, __, y: before.append(y.abs().max().item() / 448))
    with torch.no_grad():
        model(TOKENS)
    keys, values = (stored(tmp_path / "out", f"layers.0.self_attn.{local}") for local in ("k_scale", "v_scale"))
    assert next(iter(values.values())).item() == pytest.approx(before[1], rel=2**-8)
    assert next(iter(keys.values())).item() != pytest.approx(before[0], rel=2**-6)


REFUSED = {
    "gpt2": "no attention with k_proj and v_proj, or qkv_proj",
    "gpt-neox": "no attention with k_proj and v_proj, or qkv_proj",
    "mamba": "no attention with k_proj and v_proj, or qkv_proj",
    "t5": "its encoder's output",
    "opt": "no num_key_value_heads",
    "deepseek-v3": "caches latent vectors",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_such_a_cache_is_refused(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        run(tiny_model(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, scheme", [("llama", "df11"), ("llama", "nf4"), ("gpt-oss", "fp8")])
def test_a_layout_without_a_place_for_scales_is_refused(
    name: str, scheme: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    command = ["quantize", str(tiny_model(name)), "-o", str(tmp_path / "out"), "--scheme", scheme, "--kv-cache", "fp8"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "not in the compressed-tensors layout" in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused_with_the_nearest(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache 'fp6' is unknown.*fp8"):
        run(tiny_model("llama"), tmp_path / "out", kv_cache="fp6")
    with pytest.raises(ValueError, match="kv_cache 'fp6' is unknown"):
        compress.plan(tiny_model("llama"), "fp8", kv_cache="fp6")


@pytest.mark.parametrize("scheme, options", [("fp8", {}), ("int4", {"method": "rtn"}), ("int4", {"method": "gptq"})])
def test_scales_are_planned_reported_verified_and_change_no_weight(
    scheme: str, options: dict[str, Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = tiny_model("llama"), tmp_path / "out"
    report = run(source, out, scheme, **options)
    without = run(source, tmp_path / "without", scheme, kv_cache=None, **options)
    forecast = compress.plan(source, scheme, kv_cache="fp8", **options)
    names = {f"model.layers.{i}.self_attn.{local}" for i in (0, 1) for local in ("k_scale", "v_scale")}
    assert {name: value for name, value in bits(out).items() if name not in names} == bits(tmp_path / "without")
    assert [(line.name, line.bytes) for line in forecast.tensors] == [(r["name"], r["bytes"]) for r in report.tensors]
    assert {line["name"] for line in report.tensors if "calibration text" in (line["note"] or "")} == names
    assert report.bytes == without.bytes + 2 * len(names) == forecast.totals["bytes"]
    assert report.bits_per_weight == without.bits_per_weight and report.parameters == without.parameters
    document = json.loads((out / "compress.json").read_text())
    assert {name for name, entry in document["ledger"].items() if entry["action"] == "added"} == names
    assert document["recipe"]["calibration"]["sha256"] == Samples(TOKENS, "").sha256
    assert CliRunner().invoke(main, ["verify", str(out), "--against", str(source)]).exit_code == 0
    assert "self_attn.k_scale" in CliRunner().invoke(main, ["inspect", str(out)]).stderr


def test_plan_and_calibration_options_know_of_it(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = str(tiny_model("llama"))
    shown = CliRunner().invoke(main, ["plan", model, "--scheme", "fp8", "--kv-cache", "fp8", "--json"])
    assert [line["bytes"] for line in json.loads(shown.stdout)["tensors"] if "k_scale" in line["name"]] == [2, 2]
    command = ["quantize", model, "-o", str(tmp_path / "out"), "--scheme", "fp8", "--samples", "4", "--no-eval"]
    assert "uses no calibration data" in CliRunner().invoke(main, command).stderr
    assert CliRunner().invoke(main, [*command, "--kv-cache", "fp8"]).exit_code == 0


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches kill -9."""


def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model("llama"), tmp_path / "whole")
    close, closed = Blocks.close, []

    def dying(self: Blocks, block: str, *arguments: Any) -> Any:
        closed.append(block)
        if len(closed) == 2:
            raise Killed
        return close(self, block, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "close", dying)
        with pytest.raises(Killed):
            run(tiny_model("llama"), tmp_path / "out")
    run(tiny_model("llama"), tmp_path / "out")
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert (tmp_path / "out" / "compress.json").read_bytes() == (tmp_path / "whole" / "compress.json").read_bytes()


def test_what_is_loaded_generates_and_is_saved_with_its_scales(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Tokens one at a time, with a real cache, are what all of them at once are: each is rounded once."""
    run(tiny_model("llama"), tmp_path / "out")
    model: Any = torch.nn.Module.float(compress.load(tmp_path / "out"))
    ids = TOKENS[:1]
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(ids).logits
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0.02, atol=0.02)
    layer, scale = cache.layers[0], model.model.layers[0].self_attn.k_scale
    assert torch.equal((layer.keys / scale).to(torch.float8_e4m3fn).float() * scale, layer.keys)
    model = compress.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    assert bits(tmp_path / "saved") == bits(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(compress.load(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_scales_do_not_outlive_the_config_that_tells_of_them(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "plain")
    assert not stored(tmp_path / "plain", "k_scale", "v_scale")
    report = run(tmp_path / "out", tmp_path / "again", "int4", method="rtn", kv_cache=None)
    assert not stored(tmp_path / "again", "k_scale", "v_scale")
    assert any("the scales of the source's KV cache are left out" in note for note in report.notes)
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None
    )
    run(tmp_path / "out", tmp_path / "lossless", "df11", kv_cache=None)  # all is kept as it is stored
    assert bits(tmp_path / "out").items() >= bits_of_scales(tmp_path / "lossless").items()


def bits_of_scales(path: Path) -> dict[str, bytes]:
    found = {name: value for name, value in bits(path).items() if name.endswith(("k_scale", "v_scale"))}
    assert len(found) == 4
    return found


def test_text_on_which_a_cache_is_not_finite_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see = kv_scales.Largest.see
    broken = torch.tensor([float("nan")])
    monkeypatch.setattr(
        kv_scales.Largest, "see", lambda self, keys, values: (see(self, broken, values), (keys, values))[1]
    )
    with pytest.raises(ValueError, match="model.layers.0.self_attn: keys or values hold NaN"):
        run(tiny_model("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
