"""Folding scales into other weights: found by watching, believed only when the block computes the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.blocks import Blocks
from compress.fold import Fold, folded_norm, scaled, unscaled
from compress.source import Source
from compress.structure import Structure, build, read_config

SAMPLES = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
# of the first block: producer -> readers
EXPECTED = {
    "llama": {
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        "self_attn.v_proj": ["self_attn.o_proj"],
        "mlp.up_proj": ["mlp.down_proj"],
    },
    "phi3": {  # fused, so that only norms and what reads them can be told apart
        "input_layernorm": ["self_attn.qkv_proj"],
        "post_attention_layernorm": ["mlp.gate_up_proj"],
    },
    "mixtral": {  # the router and all experts read the second norm
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.v_proj": ["self_attn.o_proj"],
    },
    "phi": {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"]},
    "gpt2": {},  # Conv1D
}


def folds(path: Path, folder: Path) -> tuple[Blocks, str, list[Fold]]:
    source = Source(path)
    blocks = Blocks(source, Structure(build(read_config(path)), source.specs).linears, SAMPLES, folder)
    block = blocks.next()
    assert block is not None
    blocks.open(block)
    return blocks, block, blocks.folds(block)


@pytest.mark.parametrize("name", EXPECTED)
def test_producers_and_readers_are_found_in_the_structure(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, block, found = folds(tiny_model(name), tmp_path)
    short = {fold.producer.removeprefix(f"{block}."): fold for fold in found}
    if name == "phi":
        short = {producer: short[producer] for producer in EXPECTED[name] if producer in short}
    readers = {p: [r.removeprefix(f"{block}.") for r in fold.readers] for p, fold in short.items()}
    assert readers == EXPECTED[name]


def test_heads_that_share_a_value_head_share_its_scale(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    _, block, found = folds(tiny_model("llama"), tmp_path)
    fold = next(fold for fold in found if fold.producer.endswith("v_proj"))
    config = read_config(tiny_model("llama"))
    repeats = config.num_attention_heads // config.num_key_value_heads
    assert fold.heads == (repeats, config.head_dim)


def test_gemmas_norms_multiply_with_one_more_than_their_weight(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, _, found = folds(tiny_model("gemma2"), tmp_path)
    norms = [fold for fold in found if "layernorm" in fold.producer]
    assert norms and all(fold.offset == 1 for fold in norms)


def test_finding_folds_changes_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = Source(tiny_model("llama"))
    blocks = Blocks(source, Structure(build(read_config(source.path)), source.specs).linears, SAMPLES, tmp_path)
    block = blocks.next()
    assert block is not None
    blocks.open(block)
    before = {name: p.clone() for name, p in blocks.model.get_submodule(block).named_parameters()}
    assert blocks.folds(block)
    after = dict(blocks.model.get_submodule(block).named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_columns_and_channels_by_hand() -> None:
    fold = Fold("v", ("o",), width=4, heads=(2, 2))  # two value heads of two channels, each read by two query heads
    assert fold.columns(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert fold.channels(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0, 8.0])).tolist() == [2, 3, 7, 7]
    plain = Fold("norm", ("q",), width=3)
    assert torch.equal(plain.columns(torch.arange(3.0)), torch.arange(3.0))
    assert torch.equal(plain.channels(torch.arange(3.0)), torch.arange(3.0))


def test_a_folded_norm_says_the_scale_that_its_rounding_makes() -> None:
    weight, scale = torch.tensor([1.0, 0.0, -2.0, 0.5]).bfloat16(), torch.tensor([3.0, 2.0, 1.5, 1.0])
    stored, effective = folded_norm(weight, scale, 0.0)
    assert stored.dtype == torch.bfloat16 and effective[1] == 1 and stored[1] == 0
    torch.testing.assert_close(stored.float() * effective, weight.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(effective[[0, 2, 3]], scale[[0, 2, 3]], rtol=2**-8, atol=0)
    stored, effective = folded_norm(torch.tensor([0.5]), torch.tensor([2.0]), 1.0)
    assert stored.tolist() == [-0.25] and effective.tolist() == [2.0]


def test_scaling_is_undone() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    inputs, outputs = torch.arange(1.0, 7), torch.arange(2.0, 6)
    found = scaled(weight, inputs, outputs)
    assert found[1, 2] == weight[1, 2] * 3 / 3
    torch.testing.assert_close(unscaled(found, inputs, outputs), weight)
    assert scaled(weight, None, None) is weight
