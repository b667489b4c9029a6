"""Folding scales into other weights: found by watching, believed only when the block computes the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.blocks import Blocks
from compress.change import Change
from compress.fold import Fold, _random, check, folded_norm, rotation
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
    return blocks, block, blocks.folds(block, ["scale"])


@pytest.mark.parametrize("name", EXPECTED)
def test_producers_and_readers_are_found_in_the_structure(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, block, found = folds(tiny_model(name), tmp_path)
    short = {fold.producers[0].removeprefix(f"{block}."): fold for fold in found}
    if name == "phi":
        short = {producer: short[producer] for producer in EXPECTED[name] if producer in short}
    readers = {p: [r.removeprefix(f"{block}.") for r in fold.readers] for p, fold in short.items()}
    assert readers == EXPECTED[name]


def test_heads_that_share_a_value_head_share_its_scale(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    _, block, found = folds(tiny_model("llama"), tmp_path)
    fold = next(fold for fold in found if fold.producers[0].endswith("v_proj"))
    config = read_config(tiny_model("llama"))
    repeats = config.num_attention_heads // config.num_key_value_heads
    assert fold.heads == (repeats, config.head_dim)


def test_gemmas_norms_multiply_with_one_more_than_their_weight(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    _, _, found = folds(tiny_model("gemma2"), tmp_path)
    norms = [fold for fold in found if "layernorm" in fold.producers[0]]
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
    fold = Fold(("v",), ("o",), width=4, heads=(2, 2))  # two value heads of two channels, each read by two query heads
    columns = fold.inputs(Change(scale=torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert columns.scale is not None and columns.scale.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    columns = fold.inputs(Change(order=torch.tensor([1, 0, 2, 3])))
    assert columns.order is not None and columns.order.tolist() == [1, 0, 3, 2, 4, 5, 6, 7]
    assert fold.channels(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0, 8.0])).tolist() == [2, 3, 7, 7]
    whole = replace(fold, attending=("k", "q"))
    order = Change(order=torch.tensor([3, 2, 0, 1]))  # the second head comes first, its channels in reverse
    columns = whole.inputs(order)
    assert columns.order is not None and columns.order.tolist() == [5, 4, 7, 6, 0, 1, 2, 3]
    outputs = {path: change.order.tolist() for path, change in whole.outputs(order).items() if change.order is not None}
    assert outputs == {"v": [3, 2, 0, 1], "k": [2, 3, 0, 1], "q": [4, 5, 6, 7, 0, 1, 2, 3]}
    assert whole.outputs(Change(order=torch.tensor([1, 0, 2, 3]))).keys() == {"v"}
    plain = Fold(("norm",), ("q",), width=3)
    assert torch.equal(plain.channels(torch.arange(3.0)), torch.arange(3.0))


# of the first block: what may change places, between which layers
ORDERED = {
    "llama": {("self_attn.v_proj",): "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"): "mlp.down_proj"},
    "opt": {("self_attn.v_proj",): "self_attn.out_proj", ("fc1",): "fc2"},
    "gpt-neox": {("mlp.dense_h_to_4h",): "mlp.dense_4h_to_h"},
    "phi3": {},  # its gate and up are one layer
    "mamba": {},
}


# whether whole heads can change places with their keys and queries
HEADS = {"llama-tied-biased": True, "qwen3": True, "opt": True, "olmo2": False, "gpt-oss": False}


@pytest.mark.parametrize("name", HEADS)
def test_heads_change_places_where_nothing_else_tells_them_apart(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """OLMo 2 has a norm over all heads, gpt-oss a number for each."""
    blocks, block, _ = folds(tiny_model(name), tmp_path)
    (fold,) = [fold for fold in blocks.folds(block, ["order"]) if fold.heads]
    assert bool(fold.attending) is HEADS[name]


@pytest.mark.parametrize("name", ORDERED)
def test_channels_that_may_change_places_are_found(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    blocks, block, _ = folds(tiny_model(name), tmp_path)
    found = {
        tuple(p.removeprefix(f"{block}.") for p in fold.producers): fold.readers[0].removeprefix(f"{block}.")
        for fold in blocks.folds(block, ["order"])
    }
    assert found == ORDERED[name]


def test_only_value_heads_can_be_rotated(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    blocks, block, _ = folds(tiny_model("llama"), tmp_path)
    (fold,) = blocks.folds(block, ["rotation"])
    assert fold.readers == (f"{block}.self_attn.o_proj",)
    head_dim = fold.run
    assert rotation(fold).rotation.tolist() == [head_dim]  # type: ignore[union-attr]
    blocks, block, _ = folds(tiny_model("llama-ragged"), tmp_path / "ragged")  # heads of ten channels
    (fold,) = blocks.folds(block, ["rotation"])
    assert rotation(fold).rotation.tolist() == [2]  # type: ignore[union-attr]


@pytest.mark.parametrize("heads", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 8, 72, 80, 112])
def test_what_is_tried_moves_every_head(heads: int, size: int) -> None:
    fold = Fold(("v",), ("o",), heads * size, "order", (1, size), ("k", "q"))
    order = _random(fold).order
    assert order is not None and order.sort().values.tolist() == list(range(heads * size))
    assert (order.view(heads, size)[:, 0] // size != torch.arange(heads)).all()
    if size > 1:
        within = _random(replace(fold, attending=())).order
        assert (
            within is not None and (within.view(heads, size) != torch.arange(heads * size).view(heads, -1)).any(1).all()
        )


def test_relu_lets_scales_through_and_gelu_does_not(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    _, block, found = folds(tiny_model("opt"), tmp_path)
    assert (f"{block}.fc1",) in [fold.producers for fold in found]
    _, block, found = folds(tiny_model("phi"), tmp_path / "phi")
    assert (f"{block}.mlp.fc1",) not in [fold.producers for fold in found]


def test_a_folded_norm_says_the_scale_that_its_rounding_makes() -> None:
    weight, scale = torch.tensor([1.0, 0.0, -2.0, 0.5]).bfloat16(), torch.tensor([3.0, 2.0, 1.5, 1.0])
    stored, effective = folded_norm(weight, scale, 0.0)
    assert stored.dtype == torch.bfloat16 and effective[1] == 1 and stored[1] == 0
    torch.testing.assert_close(stored.float() * effective, weight.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(effective[[0, 2, 3]], scale[[0, 2, 3]], rtol=2**-8, atol=0)
    stored, effective = folded_norm(torch.tensor([0.5]), torch.tensor([2.0]), 1.0)
    assert stored.tolist() == [-0.25] and effective.tolist() == [2.0]


@pytest.mark.parametrize("live", [False, True])
def test_a_change_of_what_gives_nothing_is_no_error(live: bool) -> None:
    """Producers of zeros show no difference that a change could be measured beside."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    if not live:
        torch.nn.init.zeros_(model[0].weight)
    wrong, x = Fold(("0",), (), 4, "order"), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def run() -> torch.Tensor:
        return model(x).detach()

    if not live:
        return check(model, wrong, _random(wrong), run)
    with pytest.raises(ValueError, match="with the order of its channels changed"):
        check(model, wrong, _random(wrong), run)
