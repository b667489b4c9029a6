"""Rules, recipes and the exact prediction of sizes."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress.fp8 import Fp8
from compress.int4 import Int4
from compress.planning import Plan, Rule, resolve
from compress.recipe import Rules
from compress.scheme import Spec
from compress.structure import Structure, build

CONFIG = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    vocab_size=128,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def plan(*rules: Rule) -> Plan:
    model = build(CONFIG)
    specs = {name: Spec(torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    return resolve(Structure(model, specs), specs, rules, Int4(group_size=64))


def test_without_rules_every_linear_but_the_head_is_taken() -> None:
    resolved = plan()
    assert len(resolved.modules) == 14 and resolved.left == ("lm_head",)
    assert resolved.interchange and resolved.ignore == ("lm_head",)


def test_the_first_rule_that_matches_decides() -> None:
    resolved = plan(
        Rule("layers.0.mlp.up_proj", None, "a"), Rule("re:up_proj$", Fp8(), "b"), Rule("lm_head", Fp8(), "c")
    )
    assert "model.layers.0.mlp.up_proj" not in resolved.modules
    assert resolved.modules["model.layers.1.mlp.up_proj"].scheme == Fp8()
    assert resolved.modules["lm_head"].scheme == Fp8()
    assert resolved.rule_counts == (("a", 1), ("b", 2), ("c", 1))


def test_a_plain_name_matches_whole_parts_only() -> None:
    with pytest.raises(ValueError, match=r"'roj' matches no linear module"):
        plan(Rule("roj", None, "--exclude roj"))


def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'down_proj'.*their names end in down_proj, gate_proj"):
        plan(Rule("dwn_proj", None, "recipe r.yaml, rule 1"))


def test_a_group_that_does_not_fit_is_noted() -> None:
    assert plan().notes["model.layers.0.mlp.down_proj"] == "in_features 172: group_size 64 -> 43"


def test_a_recipe_gives_each_module_its_scheme(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "- {match: down_proj, scheme: int8, group_size: 32}\n- match: k_proj\n  scheme: none\n"
    )
    rules = Rules(tmp_path / "r.yaml", include=("re:layers.1",), exclude=("v_proj",)).read(Int4())
    resolved = plan(*rules)
    schemes = {name.removeprefix("model.layers."): packed.scheme.name for name, packed in resolved.modules.items()}
    assert schemes["0.mlp.down_proj"] == schemes["1.mlp.down_proj"] == "int8"
    assert "1.self_attn.k_proj" not in schemes and "1.self_attn.v_proj" not in schemes
    assert schemes["1.self_attn.q_proj"] == "int4" and "0.self_attn.q_proj" not in schemes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not YAML"),
        ("match: x", "is not a list of rules"),
        ("- {scheme: int4}", "rule 1: needs `match`"),
        ("- {match: a, scheme: int4}\n- {match: b, scheme: int9}", "rule 2: unknown scheme 'int9'"),
        ("- {match: a, scheme: int4, bit: 3}", "did you mean 'bits'"),
        ("- {match: 're:(', scheme: int4}", "not a regular expression"),
    ],
)
def test_a_recipe_that_cannot_be_used_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Rules(tmp_path / "r.yaml").read(Int4())


def test_a_recipe_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        Rules(tmp_path / "none.yaml").read(Int4())


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
def test_what_is_planned_is_what_is_written(tmp_path: Path, scheme: str) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(tmp_path / "model")
    forecast = compress.plan(tmp_path / "model", scheme)
    options = {"method": "rtn"} if scheme == "int4" else {}  # there is no tokenizer
    report = compress.quantize(tmp_path / "model", tmp_path / "out", scheme, scoring=None, **options)
    assert [(line.name, line.bytes) for line in forecast.tensors] == [(t["name"], t["bytes"]) for t in report.tensors]
    assert forecast.totals["bytes"] == report.bytes
    stored = sum(entry.bytes for entry in _entries(tmp_path / "out"))
    assert report.bytes == stored
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 172)
    packed = sum(t["bytes"] for t in report.tensors if t["scheme"])
    assert report.bits_per_weight == 8 * packed / weights
    assert report.parameters == weights + 2 * 128 * 64 + 5 * 64


def test_a_run_that_would_write_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(tmp_path / "model")
    honest = Fp8.encode
    monkeypatch.setattr(Fp8, "encode", lambda self, weight: {**honest(self, weight), "extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match="planned .* made .*extra"):
        compress.quantize(tmp_path / "model", tmp_path / "out", "fp8", scoring=None)
    monkeypatch.setattr(Fp8, "encode", lambda self, weight: honest(Fp8("tensor"), weight))
    with pytest.raises(RuntimeError, match="weight_scale: planned"):
        compress.quantize(tmp_path / "model", tmp_path / "out", "fp8", scoring=None)
    assert not (tmp_path / "out").exists()


def _entries(path: Path):  # type: ignore[no-untyped-def]
    from compress.formats.checkpoint import Checkpoint

    return Checkpoint(path).entries.values()
