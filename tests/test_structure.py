"""Structure on models without memory: which stored names are linear weights, and where each belongs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from compress.structure import Structure, build, read_config

Config = Callable[[str], Any]


def structure(tiny_config: Config, name: str, names: list[str] | None = None) -> Structure:
    model = build(tiny_config(name))
    return Structure(model, list(model.state_dict()) if names is None else names)


def tails(found: Structure, layer: str) -> set[str]:
    """The modules of one layer, without what stands before its number."""
    return {module.partition(layer)[2] for module in found.linears if layer in module}


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    "name, layer, expected",
    [
        ("llama", "layers.1.", ATTENTION | MLP),
        ("llama-tied-biased", "layers.0.", ATTENTION | MLP),
        ("qwen2", "layers.0.", ATTENTION | MLP),
        ("qwen3", "layers.0.", ATTENTION | MLP),
        ("gemma2", "layers.0.", ATTENTION | MLP),
        ("phi3", "layers.0.", {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
        ("gpt2", "h.0.", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (
            "gpt-neox",
            "layers.0.",
            {"attention.query_key_value", "attention.dense"} | {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ),
        (
            "falcon",
            "h.0.",
            {"self_attention.query_key_value", "self_attention.dense"} | {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ),
        ("mamba", "layers.0.", {f"mixer.{part}_proj" for part in ("in", "x", "dt", "out")}),
    ],
)
def test_the_linears_of_a_layer_and_nothing_else(
    name: str, layer: str, expected: set[str], tiny_config: Config
) -> None:
    found = structure(tiny_config, name)
    assert tails(found, layer) == expected
    outside = {module for module in found.linears if f".{layer.split('.')[0]}." not in module}
    assert outside <= {"lm_head", "embed_out"}
    assert all(found.linears[module].head for module in outside)


def test_conv1d_is_stored_transposed_and_is_no_native_linear(tiny_config: Config) -> None:
    found = structure(tiny_config, "gpt2")
    fused = found.linears["transformer.h.0.attn.c_attn"]
    assert (fused.transposed, fused.native, fused.head) == (True, False, False)
    assert found.native_paths() == ["lm_head"]


def test_names_without_the_base_model_prefix_find_their_module(tiny_config: Config) -> None:
    found = structure(tiny_config, "gpt2", ["wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"])
    assert list(found.linears) == ["h.0.attn.c_attn"]
    assert found.linears["h.0.attn.c_attn"].path == "transformer.h.0.attn.c_attn"


def test_names_of_no_parameter_are_left_out(tiny_config: Config) -> None:
    names = ["model.layers.9.self_attn.q_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "x.weight"]
    assert structure(tiny_config, "llama", names).linears == {}


def test_the_output_embedding_is_the_head_whether_tied_or_not(tiny_config: Config) -> None:
    untied = structure(tiny_config, "llama")
    assert [module for module, linear in untied.linears.items() if linear.head] == ["lm_head"]
    assert untied.tied() == {}
    tied = structure(tiny_config, "llama-tied-biased")
    assert tied.linears["lm_head"].head
    assert tied.tied() == {"lm_head.weight": "model.embed_tokens.weight"}


def test_experts_stored_one_by_one_are_parts_of_a_3d_parameter(tiny_config: Config) -> None:
    base = "model.layers.1.block_sparse_moe"
    names = [f"{base}.experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w2", "w3")] + [f"{base}.gate.weight"]
    found = structure(tiny_config, "mixtral", names).linears
    assert len(found) == 12
    expected = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
    for leaf, (parameter, part) in expected.items():
        linear = found[f"{base}.experts.2.{leaf}"]
        assert linear.path == f"model.layers.1.mlp.experts.{parameter}"
        assert (linear.expert, linear.part, linear.index, linear.native) == (2, part, None, False)


def test_slices_of_a_stored_3d_tensor_are_linears_of_their_own(tiny_config: Config) -> None:
    found = structure(tiny_config, "gpt-oss").linears
    name = "model.layers.0.mlp.experts.gate_up_proj"
    slices = [found[f"{name}.{i}"] for i in range(4)]
    assert [(s.source, s.index, s.expert, s.transposed) for s in slices] == [(name, i, i, True) for i in range(4)]
    assert not any("bias" in module or "router" in module for module in found)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "llama4", "deepseek-v3"])
def test_routers_are_left_alone(name: str, tiny_config: Config) -> None:
    found = structure(tiny_config, name)
    routers = {"router", "gate"}
    assert not any(module.rpartition(".")[2] in routers for module in found.linears)


def test_shared_experts_are_plain_linears(tiny_config: Config) -> None:
    for name, owner in (("qwen2-moe", "shared_expert"), ("deepseek-v3", "shared_experts")):
        shared = [linear for module, linear in structure(tiny_config, name).linears.items() if f".{owner}." in module]
        assert shared and all(linear.native and linear.expert is None for linear in shared)


class Doubling(nn.Linear):
    """A subclass that does more than multiply."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Choosing(nn.Linear):
    """A router: it gives two tensors."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(torch.topk(super().forward(input), 2))


class Spelled(nn.Linear):
    """The same product in other words, as Falcon has it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


@pytest.mark.parametrize("cls, taken", [(Doubling, False), (Choosing, False), (Spelled, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_of_linear_is_taken_only_if_it_computes_the_same(
    cls: type[nn.Linear], taken: bool, bias: bool, tiny_config: Config
) -> None:
    model = build(tiny_config("llama"))
    with torch.device("meta"):
        model.model.layers[0].mlp.up_proj = cls(64, 128, bias=bias)
    name = "model.layers.0.mlp.up_proj"
    with torch.device("meta"):  # as transformers does while it builds a model to load
        assert (name in Structure(model, [f"{name}.weight"]).linears) == taken


def test_a_config_that_names_no_known_architecture_is_refused() -> None:
    config = LlamaConfig()
    with pytest.raises(ValueError, match="names no architecture"):
        build(config)
    config.architectures = ["LlamaForCausalLM2"]
    with pytest.raises(ValueError, match="'LlamaForCausalLM2' is unknown to transformers"):
        build(config)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_a_config_that_cannot_be_used_is_one_line(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_built_model_has_no_memory(tiny_config: Config) -> None:
    assert all(parameter.is_meta for parameter in build(tiny_config("qwen3-moe")).parameters())


@pytest.mark.parametrize("name, copes", [("llama", True), ("gemma3", True), ("t5", False), ("falcon", False)])
def test_it_is_known_whether_a_model_initialises_without_its_weights(
    name: str, copes: bool, tiny_config: Config
) -> None:
    found = structure(tiny_config, name)
    paths = [linear.path for linear in found.linears.values() if not linear.head]
    assert found.initializes_packed(paths) == copes
    assert all(isinstance(found.model.get_submodule(path).weight, nn.Parameter) for path in paths)
