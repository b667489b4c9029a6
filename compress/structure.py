"""Which stored tensors are the linear weights of a model, whatever its architecture.

The model is built without memory (meta device) from its config; transformers' own conversion rules say which parameter
each stored name ends in. A weight counts as linear when that parameter is the weight of an `nn.Linear` or of GPT-2's
`Conv1D`, or a 3-D stack of expert weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

# What a constructor raises for a config that does not fit, or for a package that it needs.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# What configs call the number of experts of a layer.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
# Experts that transformers multiplies as (in_features, out_features) without an attribute that says so.
TRANSPOSED = ("Llama4TextExperts",)


@dataclass(frozen=True)
class Linear:
    """One 2-D linear weight of a checkpoint, and the place in the model that it belongs to."""

    module: str  # its tensors are stored as f"{module}.{local name}"
    source: str  # the tensor it is stored as before compression
    index: int | None  # which slice of a 3-D source
    transposed: bool  # the source is (in_features, out_features)
    path: str  # the module, or the 3-D parameter, of the model
    expert: int | None  # position in a 3-D parameter,
    part: int  # and within that expert (gate, up)
    native: bool  # an nn.Linear, which other loaders know how to replace
    head: bool  # the model's output embedding
    router: bool  # decides which experts run


def build(config: PretrainedConfig, with_buffers: bool = False) -> PreTrainedModel:
    """The model of a config on the meta device, its buffers computed where asked for. Raises ValueError where
    transformers cannot build it."""
    names = config.architectures
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError('config.json names no architecture; add for example "architectures": ["LlamaForCausalLM"]')
    cls = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise ValueError(
            f"config.json: architecture {names[0]!r} is unknown to transformers {transformers.__version__}; "
            "a newer transformers may know it (code shipped with a checkpoint is not run)"
        )
    try:
        with init_empty_weights(include_buffers=False) if with_buffers else torch.device("meta"):
            model: PreTrainedModel = cls(config)
    except BUILD_ERRORS as error:
        raise ValueError(f"config.json: {names[0]} cannot be built from it: {error}") from None
    return model


def read_config(path: Any) -> PretrainedConfig:
    """AutoConfig of a checkpoint directory, as one ValueError where it cannot be read."""
    if not Path(path).is_dir():
        raise ValueError(f"{path} does not exist, or is no directory")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        first = str(error).strip().split("\n\n")[0]
        raise ValueError(f"{path}: config.json cannot be used: {first}") from None


class Structure:
    """The linear weights of `model` among the stored `names`, by module name in the order of `names`."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self.model = model
        self.parameters = dict(model.state_dict())
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._head = model.get_output_embeddings()
        self.linears: dict[str, Linear] = {}
        self.left_out: set[str] = set()
        for name in names:
            for linear in self._linears_of(name):
                self.linears[linear.module] = linear

    def leave_out(self, sources: Iterable[str]) -> None:
        """Drops the linears that are stored as one of `sources`, because another tensor stands for them."""
        self.left_out = set(sources)
        sources = self.left_out
        self.linears = {module: linear for module, linear in self.linears.items() if linear.source not in sources}

    def native_paths(self) -> list[str]:
        """Every `nn.Linear` of the model, stored or tied: what another loader would look at."""
        return [path for path, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def initializes_packed(self, paths: Iterable[str]) -> bool:
        """Whether the model's own initialisation copes with linears that have no `weight`.

        transformers runs it while loading, after compressed-tensors has put packed tensors in its place; T5's and
        Falcon's, for example, reads the weight.
        """
        linears = [self.model.get_submodule(path) for path in paths]
        weights = [linear._parameters.pop("weight") for linear in linears]
        try:
            for owner in self.model.modules():
                if isinstance(owner, PreTrainedModel):
                    for module in owner.modules():
                        owner._init_weights(module)
        except AttributeError:
            return False
        finally:
            for linear, weight in zip(linears, weights, strict=True):
                linear._parameters["weight"] = weight
        return True

    def is_placed(self, name: str) -> bool:
        """Whether the model has one parameter or buffer for the stored tensor `name`, or nothing at all: transformers
        does not compute what the model holds from this and other tensors."""
        target, pattern = self.target(name)
        return pattern is None or target not in self.parameters

    def is_embedding(self, name: str) -> bool:
        """Whether the stored tensor `name` is the weight of an `nn.Embedding`."""
        target, _ = self.target(name)
        path, _, leaf = target.rpartition(".")
        known = target in self.parameters and leaf == "weight"
        return known and isinstance(self.model.get_submodule(path), nn.Embedding)

    def tied(self) -> dict[str, str]:
        """Parameter -> the parameter whose memory it shares."""
        keys = getattr(self.model, "all_tied_weights_keys", None) or {}
        return dict(keys)

    def target(self, name: str) -> tuple[str, str | None]:
        """The model's parameter that a stored tensor ends in, and the conversion pattern that takes it there."""
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self.model.base_model_prefix, self.parameters
        )
        return target, pattern

    def _linears_of(self, name: str) -> list[Linear]:
        target, pattern = self.target(name)
        parameter = self.parameters.get(target)
        if parameter is None:
            return []
        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        if parameter.dim() == 3 and "expert" in f"{target} {type(module).__name__}".lower():
            return self._experts(name, target, pattern, parameter)
        if pattern is not None or leaf != "weight" or not name.endswith(".weight") or parameter.dim() != 2:
            return []
        if not _only_multiplies(module):
            return []
        return [
            Linear(
                module=name.removesuffix(".weight"),
                source=name,
                index=None,
                transposed=isinstance(module, Conv1D),
                path=path,
                expert=None,
                part=0,
                native=isinstance(module, nn.Linear),
                head=module is self._head,
                router=self._routes(path, parameter.shape[0]),
            )
        ]

    def _routes(self, path: str, rows: int) -> bool:
        """One row for each expert, or for the shared one, in a router or beside modules that are named for experts."""
        config = self.model.config.get_text_config()
        if rows not in {1, *(getattr(config, key, None) for key in EXPERT_COUNTS)}:
            return False
        parts = path.split(".")[:-1]
        near = [self.model.get_submodule(".".join(parts[: len(parts) - up])) for up in range(2)]
        return "router" in path or any("expert" in child for module in near for child, _ in module.named_children())

    def _experts(self, name: str, target: str, pattern: str | None, parameter: Tensor) -> list[Linear]:
        owner = self.model.get_submodule(target.rpartition(".")[0])
        transposed = bool(getattr(owner, "is_transposed", type(owner).__name__ in TRANSPOSED))
        shared: dict[str, Any] = {"source": name, "path": target, "native": False, "head": False, "router": False}
        if pattern is None:
            return [
                Linear(f"{name}.{i}", index=i, transposed=transposed, expert=i, part=0, **shared)
                for i in range(parameter.shape[0])
            ]
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        operations = [type(operation) for operation in converter.operations]
        if operations not in ([MergeModulelist], [MergeModulelist, Concatenate]) or not name.endswith(".weight"):
            return []  # the model rearranges these weights further than we follow: they are copied as they are
        match = re.search(r"\.(\d+)\.[^.]+\.weight$", name)
        if match is None:
            return []
        part = converter.source_patterns.index(pattern)
        module = name.removesuffix(".weight")
        return [Linear(module, index=None, transposed=False, expert=int(match[1]), part=part, **shared)]


def _only_multiplies(module: nn.Module) -> bool:
    """Whether a module computes x @ weight.T + bias as nn.Linear does, or x @ weight + bias as Conv1D, and no more."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear):
        return False
    # A subclass with a forward of its own is a router, say, or Falcon's linear; a small weight in its place tells.
    with torch.device("cpu"):  # also while transformers builds on another
        x, weight = torch.ones(2, 3), torch.arange(15.0).view(5, 3)
        bias = None if module.bias is None else torch.arange(5.0)
    try:
        y = functional_call(module, {"weight": weight} if bias is None else {"weight": weight, "bias": bias}, (x,))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(y, Tensor) and torch.equal(y, F.linear(x, weight, bias))
