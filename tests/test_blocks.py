"""Running a model block by block is running it: the same inputs reach every layer, whatever the architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from compress.blocks import Blocks
from compress.hf import model_class
from compress.hollow import OUTSIDE
from compress.source import Source
from compress.stats import Stats
from compress.structure import Structure, build, read_config

ARCHITECTURES = [
    "llama",
    "llama-tied-biased",
    "llama-ragged",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
]
ARCHITECTURES += ["gpt-neox", "opt", "falcon", "mamba", "t5", "jetmoe", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]
ARCHITECTURES += ["llama4", "deepseek-v3"]
SAMPLES = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))


def blockwise(path: Path, folder: Path) -> tuple[Blocks, dict[str, Any]]:
    source = Source(path)
    linears = Structure(build(read_config(path)), source.specs).linears
    return Blocks(source, linears, SAMPLES, folder), dict(linears)


def measured(path: Path, folder: Path) -> dict[str, Stats | None]:
    blocks, linears = blockwise(path, folder)
    found: dict[str, Stats | None] = {}
    while block := blocks.next():
        blocks.open(block)
        found |= blocks.measure(block, linears)
        blocks.close(block)
        blocks.leave([block])
    blocks.open(OUTSIDE)
    return found | blocks.measure(OUTSIDE, linears)


def inputs(path: Path) -> dict[str, Tensor]:
    """What reaches every linear of the whole model in float32."""
    config = AutoConfig.from_pretrained(path)
    model = model_class(config).from_pretrained(path, dtype=torch.float32)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight") and not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            )
    extra = {"decoder_input_ids": SAMPLES} if config.is_encoder_decoder else {}
    with torch.no_grad():
        model(SAMPLES, **extra)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_sees_what_it_sees_in_the_whole_model(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    linears = blockwise(tiny_model(name), tmp_path)[1]
    found, expected = measured(tiny_model(name), tmp_path), inputs(tiny_model(name))
    assert found.keys() == linears.keys()
    for module, linear in linears.items():
        if linear.expert is not None:
            continue
        if linear.path not in expected:  # Mamba multiplies with the weight of dt_proj, and does not call the module
            assert found[module] is None
            continue
        stats, x = found[module], expected[linear.path]
        assert stats is not None and stats.tokens == len(x), module
        torch.testing.assert_close(stats.hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(stats.second_moment, x.square().mean(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(stats.absmax, x.abs().amax(0), rtol=1e-3, atol=1e-5)


EXPERTS = {"mixtral": 4, "qwen3-moe": 4, "gpt-oss": 4, "jetmoe": 4, "llama4": 4, "deepseek-v3": 4, "qwen2-moe": 4}


@pytest.mark.parametrize("name", EXPERTS)
def test_every_expert_that_is_run_is_measured(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    linears = blockwise(tiny_model(name), tmp_path)[1]
    found = measured(tiny_model(name), tmp_path)
    experts = {module: found[module] for module, linear in linears.items() if linear.expert is not None}
    seen = [stats for stats in experts.values() if stats is not None]
    assert len(seen) > len(experts) / 2
    for module, stats in experts.items():
        linear = linears[module]
        partner = [m for m, other in linears.items() if (other.path, other.expert) == (linear.path, linear.expert)]
        assert all(found[m] is stats or same(found[m], stats) for m in partner)


def same(a: Stats | None, b: Stats | None) -> bool:
    return a is not None and b is not None and a.tokens == b.tokens and torch.equal(a.absmean, b.absmean)
